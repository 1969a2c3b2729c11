%include "lib.inc"
        begin
        mov     si, text
        mov     cx, 20000
        mov     dx, 0x402
        mov     si, 0x7c00
.many:  outsb
        and     si, 0x7cff
        loop    .many
        mov     si, text
        mov     cx, 26
        mov     dx, 0x3f8
        rep     outsb
        mov     di, 0x9000
        mov     cx, 8
        mov     dx, 0x1234
        rep     insw
        mov     eax, [0x900c]
        call    hex32
        jmp     poweroff
text:   db      "abcdefghijklmnopqrstuvwxyz"
        finish
