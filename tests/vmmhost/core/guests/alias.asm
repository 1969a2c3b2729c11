; Paging: writes into the ROM through a page elsewhere, and lets the host write over code that runs there.
%include "lib.inc"
        begin
        cli
        lgdt    [gdt]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        jmp     8:wide
gdt:    dw      23
        dd      .table
.table: dq      0, 0x00cf9a000000ffff, 0x00cf92000000ffff
        bits    32
wide:   mov     ax, 16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7c00
        mov     dword [0x30000], 0x909041b0     ; mov al, 'A'
        mov     byte [0x30004], 0xc3
        mov     edi, 0x20000    ; one directory, one table: 4 MiB as they are
        xor     eax, eax
        mov     ecx, 1024
        rep stosd
        mov     dword [0x20000], 0x21003
        mov     edi, 0x21000
        mov     eax, 3
        mov     ecx, 1024
.page:  stosd
        add     eax, 0x1000
        loop    .page
        mov     dword [0x21000+0x40*4], 0xf5003 ; 40000h shows the ROM, 50000h the code, which is not where it lies
        mov     dword [0x21000+0x50*4], 0x30003
        mov     dword [0x21000+0x30*4], 0
        mov     eax, 0x20000
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        jmp     .on
.on:    mov     dword [0x40123], 0x77777777
        mov     dx, 0x3f8
        mov     eax, 0x50000
        call    eax
        out     dx, al
        mov     dword [0x5000], 0x0a000000      ; fw_cfg DMA, big-endian: choose item 0, read
        mov     dword [0x5004], 0x04000000      ; 4 bytes
        mov     dword [0x5008], 0
        mov     dword [0x500c], 0x00000300      ; to 30000h: "QEMU", which are four harmless instructions
        mov     dx, 0x518
        mov     eax, 0x00500000
        out     dx, eax
        mov     dx, 0x3f8
        mov     ebp, .new       ; "U" pushes it, and the RET behind takes it
        mov     eax, 0x50000
        call    eax
        out     dx, al
        jmp     .off
.new:   inc     al
        mov     al, 'B'
        out     dx, al
.off:   mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        cli
        hlt
        finish
