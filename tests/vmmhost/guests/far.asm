; Reads one port of an extension twice, then sectors far into the disk, and sends their first five bytes to COM1.
bits 16
org 0x7c00
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov dx, 0x510
    in al, dx
    in al, dx
    mov bx, 3                   ; 64 KiB block
next:
    mov ax, bx
    shl ax, 7
    mov [sector], ax
    mov ah, 0x42
    mov dl, 0x80
    mov si, packet
    int 0x13
    jc off
    mov si, 0x8000
    mov cx, 5
    mov dx, 0x3f8
    cld
    rep outsb
    add bx, 20
    cmp bx, 64
    jb next
off:
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
    hlt
packet:
    db 16, 0
    dw 1, 0x8000, 0
sector:
    dq 0
times 510 - ($ - $$) db 0
    dw 0xaa55
