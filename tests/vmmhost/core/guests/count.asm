; A long loop over an instruction that ends in F4h, with interrupts off: must run to its end.
%include "lib.inc"
        begin
        cli
        mov     bp, 0x7000
        mov     ecx, 400000
        xor     ebx, ebx
.loop:  mov     edx, [bp-12]
        inc     ebx
        dec     ecx
        jnz     .loop
        mov     eax, ebx
        call    hex32
        jmp     poweroff
        finish
