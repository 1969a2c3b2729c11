; An invalid instruction, taken by the guest's own handler, which steps over it; then one that nobody takes.
%include "lib.inc"
        begin
        mov     eax, [6*4]
        mov     [old], eax
        mov     word [6*4], handler
        mov     word [6*4+2], 0
        mov     al, '1'
        call    putc
        ud2
        mov     al, '3'
        call    putc
        ud2
        mov     eax, [old]
        mov     [6*4], eax
        mov     al, '4'
        call    putc
        ud2
        jmp     poweroff
handler:
        push    bp
        mov     bp, sp
        add     word [bp+2], 2
        mov     al, '2'
        call    putc
        pop     bp
        iret
old:    dd      0
        finish
