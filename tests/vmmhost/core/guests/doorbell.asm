%include "lib.inc"
        begin
        mov     dx, 0x564
        xor     eax, eax
        out     dx, eax         ; discovery
        call    both
        mov     ebx, 0x11111111
        mov     ecx, 0x22222222
        mov     esi, 0x33333333
        mov     edi, 0x44444444
        mov     dx, 0x564
        mov     eax, 16
        out     dx, eax
        call    both
        mov     dx, 0x564
        mov     eax, 99         ; nobody's
        out     dx, eax
        call    both
        mov     dx, 0x564
        mov     ax, 16          ; not 32 bits wide: no call
        out     dx, ax
        mov     dx, 0x510       ; a claimed device
        mov     eax, 0x01020304
        out     dx, eax
        in      eax, dx
        call    hex32
        mov     ax, 0xd000
        mov     ds, ax
        mov     dword [8], 0x55667788
        mov     eax, [8]
        call    hex32
        jmp     poweroff
both:   push    edx
        call    hex32
        pop     eax
        call    hex32
        ret
        finish
