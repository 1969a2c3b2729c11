; The first instructions of a 32-bit kernel: everything a program can see of the state it was entered in goes to DUMP,
; in the order that test_loaders.py knows; then power off. -DORIGIN=... -DDUMP=... -DLIMITS=1 (LAR and LSL work here)
        bits 32
        org ORIGIN
%ifdef MULTIBOOT
; Multiboot header with the addresses of a file that is no ELF file.
header: dd      0x1badb002, 0x00010003, -(0x1badb002 + 0x00010003)
        dd      header, ORIGIN, end, DUMP + 0x1000, start
%endif
start:  mov     [DUMP], eax
        mov     [DUMP + 4], ebx
        mov     [DUMP + 8], ecx
        mov     [DUMP + 12], edx
        mov     [DUMP + 16], esi
        mov     [DUMP + 20], edi
        mov     [DUMP + 24], ebp
        mov     [DUMP + 28], esp
        pushf
        pop     dword [DUMP + 32]
        mov     eax, cr0
        mov     [DUMP + 36], eax
        mov     eax, cr4
        mov     [DUMP + 40], eax
        mov     ecx, 0xc0000080
        rdmsr
        mov     [DUMP + 44], eax
        xor     eax, eax
        mov     ax, cs
        mov     [DUMP + 48], eax
        mov     ax, ds
        mov     [DUMP + 52], eax
        mov     ax, es
        mov     [DUMP + 56], eax
        mov     ax, fs
        mov     [DUMP + 60], eax
        mov     ax, gs
        mov     [DUMP + 64], eax
        mov     ax, ss
        mov     [DUMP + 68], eax
        str     ax
        mov     [DUMP + 72], eax
        sldt    ax
        mov     [DUMP + 76], eax
        sgdt    [DUMP + 80]
%ifdef LIMITS
        mov     edi, DUMP + 88
        mov     ecx, 6
        mov     esi, DUMP + 48
.next:  lodsd
        lar     ebx, eax
        mov     [edi], ebx
        lsl     ebx, eax
        mov     [edi + 4], ebx
        add     edi, 8
        loop    .next
%endif
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        cli
        hlt
end:
