%include "lib.inc"
        begin
.wait:  mov     ah, 1           ; poll first, as boot loaders do
        int     0x16
        pushf
        pop     ax
        movzx   eax, ax
        and     eax, 0x40
        call    hex32
.next:  mov     ah, 0
        int     0x16
        cmp     al, 13
        je      poweroff
        movzx   eax, ax
        call    hex32
        jmp     .next
        finish
