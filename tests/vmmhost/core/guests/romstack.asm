; Takes an interrupt whose frame falls into the ROM.
%include "lib.inc"
        begin
        mov     ax, 0xf000
        mov     ss, ax
        mov     sp, 0x9000
        int     0x20
        jmp     poweroff
        finish
