; Lets interrupts in for one instruction in a thousand, as firmware does that waits: three timer ticks must arrive.
bits 16
org 0x7c00
        cli
        xor ax, ax
        mov ds, ax
        mov bx, [0x46c]
        add bx, 3
again:  mov cx, 1000
busy:   dec cx
        jnz busy
        sti
        nop
        cli
        mov ax, [0x46c]
        sub ax, bx
        js again
        mov dx, 0x3f8
        mov al, '3'
        out dx, al
        mov ax, 0x2000
        mov dx, 0x604
        out dx, ax
        hlt
times 510-($-$$) db 0
dw 0xaa55
