%include "lib.inc"
        begin
        mov     ax, 0xd000
        mov     ds, ax
        mov     dword [0x10], 0x11223344
        mov     eax, [0x10]
        call    hex32
        mov     al, [0x20]
        movzx   eax, al
        call    hex32
        mov     dx, 0x1234      ; nobody's port
        in      eax, dx
        call    hex32
        mov     dx, 0x5678
        in      al, dx
        movzx   eax, al
        call    hex32
        mov     ax, 0xf000      ; the ROM's model byte does not change
        mov     ds, ax
        mov     byte [0xfffe], 1
        sti
        hlt
        movzx   eax, byte [0xfffe]
        call    hex32
        jmp     poweroff
        finish
