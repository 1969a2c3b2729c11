; Asks a device at port 510h for an interrupt on line 5 and waits for it; acknowledges it by a write to port 511h, three
; times in all, then tells on COM1.
%include "lib.inc"
        begin
        cli
        mov     word [0x0d*4], irq
        mov     word [0x0d*4+2], 0
        in      al, 0x21
        and     al, ~0x20
        out     0x21, al
        mov     bp, 3
.again: mov     dx, 0x510
        out     dx, al          ; raise
        sti
.wait:  cmp     byte [count], 0
        jne     .came
        hlt
        jmp     .wait
.came:  cli
        mov     byte [count], 0
        dec     bp
        jnz     .again
        mov     si, text
        call    puts
        jmp     poweroff
irq:    push    ax
        push    dx
        inc     byte [cs:count]
        mov     dx, 0x511
        out     dx, al          ; lower
        mov     al, 0x20
        out     0x20, al
        pop     dx
        pop     ax
        iret
count:  db      0
text:   db      "three", 0
        finish
