; Real, protected, paged and long mode, each sending a letter; then a timer interrupt in protected mode.
%include "lib.inc"
        begin
        mov     al, 'R'
        call    putc
        cli
        lgdt    [gdtr]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        jmp     8:pm
        bits 32
pm:     mov     ax, 16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7c00
        mov     dx, 0x3f8
        mov     al, 'P'
        out     dx, al
        ; interrupt gate 20h for IRQ 0, and gate 30h for INT 30h
        mov     edi, 0x10000
        mov     dword [edi + 0x20*8], irq - 0x7c00 + (8 << 16) + 0x7c00
        mov     dword [edi + 0x20*8 + 4], 0x8e00
        mov     dword [edi + 0x30*8], soft - 0x7c00 + (8 << 16) + 0x7c00
        mov     dword [edi + 0x30*8 + 4], 0x8e00
        lidt    [idtr]
        int     0x30
        mov     al, 0x11
        out     0x20, al
        mov     al, 0x20
        out     0x21, al
        mov     al, 4
        out     0x21, al
        mov     al, 1
        out     0x21, al
        mov     al, 0xfe
        out     0x21, al
        xor     ebx, ebx
        sti
.ticks: hlt
        cmp     ebx, 2
        jb      .ticks
        cli
        mov     dx, 0x3f8
        mov     al, 'T'
        out     dx, al
        ; identity map of the first 2 MiB, then long mode
        mov     edi, 0x20000
        mov     cr3, edi
        mov     dword [edi], 0x21003
        mov     dword [edi + 0x1000], 0x22003
        mov     dword [edi + 0x2000], 0x83
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        jmp     24:lm
irq:    inc     ebx
        push    eax
        mov     al, 0x20
        out     0x20, al
        pop     eax
        iret
soft:   push    eax
        mov     dx, 0x3f8
        mov     al, 'I'
        out     dx, al
        pop     eax
        iret
        bits 64
lm:     mov     r8, 0x123456789a
        shr     r8, 32
        cmp     r8, 0x12
        jne     $
        mov     dx, 0x3f8
        mov     al, 'L'
        out     dx, al
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        hlt
        align 8
gdt:    dq      0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff
gdtr:   dw      31
        dd      gdt
idtr:   dw      0x1ff
        dd      0x10000
        finish
