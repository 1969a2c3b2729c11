; Counts on the serial port, with timer ticks, memory and disk in between, so that a snapshot has something to keep.
bits 16
org 0x7c00
        cli
        xor ax, ax
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov sp, 0x7c00
        sti
        mov cx, 0
again:  push cx
        mov al, cl
        and al, 0x0f
        add al, 'a'
        mov dx, 0x3f8
        out dx, al
        mov al, cl              ; what the clock and the timer show goes into the trace
        out 0x70, al
        in al, 0x71
        mov al, 0
        out 0x43, al
        in al, 0x40
        in al, 0x40
        mov [0x9000], cx        ; memory
        mov bx, 0x8000          ; disk: write sector 3 in every fourth round, read it back
        test cl, 3
        jnz read
        mov [0x8000], cx
        mov ax, 0x0301
        mov cx, 3
        mov dx, 0x80
        int 0x13
read:   mov word [0x8000], 0
        mov ax, 0x0201
        mov cx, 3
        mov dx, 0x80
        int 0x13
        mov al, [0x8000]
        out 0xe9, al
        hlt                     ; until the next tick
        pop cx
        inc cx
        cmp cx, 24
        jb again
        mov ax, 0x2000
        mov dx, 0x604
        out dx, ax
        hlt
times 510-($-$$) db 0
dw 0xaa55
