; A guest whose other I/O never depends on what the extension answers: it touches ports 0x510 to 0x517 and
; address 0xd0000 sixteen times and writes the round to COM1 after each, then powers off.
        bits 16
        org 0x7C00
start:  jmp 0:main
main:   xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7C00
        mov ax, 0xD000
        mov es, ax
        mov cx, 16
round:  mov dx, 0x510
        in eax, dx
        mov dx, 0x514
        out dx, eax
        mov eax, [es:0x10]
        mov [es:0x10], ax
        mov dx, 0x3F8
        mov al, cl
        add al, '@'
        out dx, al
        mov dx, 0x61            ; a core device
        in al, dx
        loop round
        mov dx, 0x604
        mov ax, 0x2000
        out dx, ax
        hlt
        times 510 - ($ - $$) db 0
        dw 0xAA55
