; Asks an extension, the core and the disk for something, for ever: what a long run does most.
bits 16
org 0x7c00
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
again:
    mov dx, 0x510                       ; the extension: read, then write
    in eax, dx
    out dx, eax
    in al, 0x61                         ; a device of the core
    mov ax, 0x0201                      ; one sector of the image
    mov bx, 0x8000
    mov cx, 0x0001
    mov dx, 0x0080
    int 0x13
    mov ax, 0x0301                      ; and one into the overlay
    mov cx, 0x0002
    int 0x13
    mov ah, 0x02                        ; the clock
    int 0x1a
    jmp again
times 510 - ($ - $$) db 0
    dw 0xaa55
