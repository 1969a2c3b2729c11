%include "lib.inc"
        begin
        mov     si, text
        call    puts
        jmp     $
text:   db      "spinning", 0
        finish
