%include "lib.inc"
        begin
        mov     si, text
        call    puts
        jmp     poweroff
text:   db      "hello from the guest", 10, 0
        finish
