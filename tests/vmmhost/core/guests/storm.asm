; Sleeps in HLT while the timer, as fast as it goes, may not interrupt.
%include "lib.inc"
        begin
        mov     al, 0x34        ; counter 0, mode 2, reload 2
        out     0x43, al
        mov     al, 2
        out     0x40, al
        xor     al, al
        out     0x40, al
        mov     al, 0xff
        out     0x21, al
        sti
.sleep: hlt
        jmp     .sleep
        finish
