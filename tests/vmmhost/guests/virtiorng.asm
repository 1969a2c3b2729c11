; Has a virtio entropy device fill 48 bytes in two buffers, sleeps until its interrupt, writes the bytes to COM1 with the
; length from the used ring before them, then powers off.
%include "virtio.inc"

main:   mov ax, 0xD000
        mov es, ax
        mov ax, 0x1000
        mov fs, ax
        take 5
        call begin
        queue 0, 0x10000, 0x10100, 0x10200
        reg 0x70, 15
        descriptor 0x00, 0x11000, 40, 3, 1
        descriptor 0x10, 0x11028, 8, 2, 0
        mov dword [fs:0x100], 1 << 16           ; one request,
        mov word [fs:0x104], 0                  ; the chain from descriptor 0
        reg 0x50, 0
        call wait_irq
        cmp word [fs:0x202], 1
        jne broken
        mov si, 0x208                           ; its length
        mov cx, 1
        call put
        mov si, 0x1000
        mov cx, 48
        call put
        jmp off
