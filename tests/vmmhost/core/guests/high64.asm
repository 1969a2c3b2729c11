; A 64-bit kernel that goes on at an address above 4 GiB, as Linux does, works there for longer than a slice of the soft
; CPU, and says from where: bits 32-39 of its address. -DORIGIN=...
        bits 64
        org ORIGIN
        mov     rax, cr3
        mov     rbx, [rax]
        mov     [rax + 511 * 8], rbx    ; the last 512 GiB like the first
        mov     cr3, rax
        mov     rax, 0xffffff8000000000 + high
        jmp     rax
high:   mov     ecx, 300000
.again: dec     ecx
        jnz     .again
        lea     rax, [rel high]
        shr     rax, 32
        mov     dx, 0x402
        out     dx, al
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        cli
        hlt
