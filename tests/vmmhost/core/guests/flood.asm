; Sleeps in HLT and is woken by the timer as fast as it goes.
%include "lib.inc"
        begin
        mov     word [8*4], tick
        mov     word [8*4+2], 0
        mov     al, 0x34
        out     0x43, al
        mov     al, 2
        out     0x40, al
        xor     al, al
        out     0x40, al
        mov     al, 0xfe
        out     0x21, al
        sti
.sleep: hlt
        jmp     .sleep
tick:   push    ax
        mov     al, 0x20
        out     0x20, al
        pop     ax
        iret
        finish
