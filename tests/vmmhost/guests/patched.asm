; Puts "mov al, 'A'; retf" at 1000:0000, calls it and writes what it gives to COM1; then lets an extension change it by a write
; to port 0x510, calls it again, and powers off.
        bits 16
        org 0x7C00
start:  jmp 0:main
main:   xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7C00
        mov ax, 0x1000
        mov es, ax
        mov dword [es:0], 0x00CB41B0
        mov cx, 2
again:  call 0x1000:0
        mov dx, 0x3F8
        out dx, al
        mov dx, 0x510
        out dx, al
        loop again
        mov dx, 0x604
        mov ax, 0x2000
        out dx, ax
        hlt
        times 510 - ($ - $$) db 0
        dw 0xAA55
