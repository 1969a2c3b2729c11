%include "lib.inc"
        begin
        mov     al, 0xfe
        out     0x64, al
        jmp     $
        finish
