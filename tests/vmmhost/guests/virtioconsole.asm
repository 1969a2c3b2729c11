; Receives from a virtio console what waits there, transmits two lines in one request, receives again, and writes what came
; to COM1, each time after an interrupt; then powers off.
%include "virtio.inc"

main:   mov ax, 0xD100
        mov es, ax
        mov ax, 0x2000
        mov fs, ax
        take 6
        call begin
        queue 0, 0x20000, 0x20100, 0x20200
        queue 1, 0x20400, 0x20500, 0x20600
        reg 0x70, 15
        descriptor 0x00, 0x21000, 64, 2, 0
        descriptor 0x400, 0x22000, lines_end - lines - 4, 1, 1
        descriptor 0x410, 0x22000 + lines_end - lines - 4, 4, 0, 0
        mov dword [fs:0x100], 1 << 16
        mov word [fs:0x104], 0
        reg 0x50, 0
        call wait_irq
        call show
        inc word [fs:0x102]                     ; the same buffer again: it waits
        mov word [fs:0x106], 0
        reg 0x50, 0
        cmp word [fs:0x202], 1
        jne broken
        mov si, lines
        mov di, 0x2000
.copy:  mov al, [si]
        mov [fs:di], al
        inc si
        inc di
        cmp si, lines_end
        jne .copy
        mov dword [fs:0x500], 1 << 16
        mov word [fs:0x504], 0
        reg 0x50, 1
        call wait_irq
        cmp word [fs:0x602], 1
        jne broken
        cmp word [fs:0x202], 2
        jne broken
        mov si, 0x20C + 4
        call show.at
        jmp off

show:   mov si, 0x204 + 4
.at:    mov cx, [fs:si]
        mov si, 0x1000
        jmp put

lines:  db "first line", 10, "the second", 10
lines_end:
