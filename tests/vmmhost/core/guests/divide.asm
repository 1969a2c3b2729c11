%include "lib.inc"
        begin
        xor     cx, cx
        div     cx
        jmp     poweroff
        finish
