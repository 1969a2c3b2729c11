; HLT with interrupts off that nothing gives away: no CLI before it, no jump behind it.
%include "lib.inc"
        begin
        cli
        mov     cx, 100
.loop:  mov     edx, [bp-12]    ; ends in F4h, which is not HLT
        inc     eax
        loop    .loop
        mov     si, text
        call    puts
        hlt
        mov     si, bad
        call    puts
        jmp     poweroff
text:   db      "before", 0
bad:    db      "after", 0
        finish
