%include "lib.inc"
        begin
        xor     ebx, ebx
.next:  mov     eax, 0xe820
        mov     edx, 0x534d4150
        mov     ecx, 20
        mov     di, 0x9000
        int     0x15
        jc      .done
        mov     eax, [0x9000]
        call    hex32
        mov     eax, [0x9008]
        call    hex32
        mov     eax, [0x9010]
        call    hex32
        test    ebx, ebx
        jnz     .next
.done:  int     0x12
        movzx   eax, ax
        call    hex32
        mov     ax, 0xe801
        int     0x15
        movzx   eax, bx
        call    hex32
        mov     ax, 0x2403
        int     0x15
        movzx   eax, bx
        call    hex32
        jmp     poweroff
        finish
