; The first instructions of a 64-bit kernel: what it can see of the state it was entered in goes to DUMP, in the order
; that test_loaders.py knows; then power off. -DORIGIN=... -DDUMP=...
        bits 64
        org ORIGIN
        mov     [abs DUMP], rax
        mov     [abs DUMP + 8], rbx
        mov     [abs DUMP + 16], rcx
        mov     [abs DUMP + 24], rdx
        mov     [abs DUMP + 32], rsi
        mov     [abs DUMP + 40], rdi
        mov     [abs DUMP + 48], rbp
        mov     [abs DUMP + 56], rsp
%assign number 8
%rep 8
        mov     [abs DUMP + number * 8], r %+ number
  %assign number number + 1
%endrep
        pushf
        pop     qword [abs DUMP + 128]
        mov     rax, cr0
        mov     [abs DUMP + 136], rax
        mov     rax, cr3
        mov     [abs DUMP + 144], rax
        mov     rax, cr4
        mov     [abs DUMP + 152], rax
        mov     ecx, 0xc0000080
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        mov     [abs DUMP + 160], rax
        xor     eax, eax
        mov     ax, cs
        mov     [abs DUMP + 168], rax
        mov     ax, ds
        mov     [abs DUMP + 176], rax
        mov     ax, es
        mov     [abs DUMP + 184], rax
        mov     ax, fs
        mov     [abs DUMP + 192], rax
        mov     ax, gs
        mov     [abs DUMP + 200], rax
        mov     ax, ss
        mov     [abs DUMP + 208], rax
        sgdt    [abs DUMP + 216]
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        cli
        hlt
