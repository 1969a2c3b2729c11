; Sends to COM1: 16 bytes of its own disk's second sector, the label of the first CD, and 5 bytes of that CD's sector
; given at 7DF0h. Then it writes its second sector, reads it again, sends 16 bytes of it, and powers off.
bits 16
org 0x7c00
    xor ax, ax
    mov ds, ax
    mov es, ax
    cld
    mov dl, 0x80
    mov ah, 0x42
    mov cx, 16
    mov bx, 0
    call show
    mov dword [sector], 16
    mov dl, 0xe0
    mov ah, 0x42
    mov cx, 6
    mov bx, 40
    call show
    mov eax, [0x7df0]
    mov [sector], eax
    mov dl, 0xe0
    mov ah, 0x42
    mov cx, 5
    mov bx, 0
    call show
    mov byte [0x8002], '!'
    mov dword [sector], 1
    mov dl, 0x80
    mov ax, 0x4300
    mov cx, 0
    call show
    mov dl, 0x80
    mov ah, 0x42
    mov cx, 16
    mov bx, 0
    call show
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
    cli
    hlt

; CX bytes from 8000h+BX, after the disk call in AH for drive DL; '?' when it fails
show:
    push cx
    push bx
    mov si, packet
    int 0x13
    pop si
    pop cx
    mov dx, 0x3f8
    jc .failed
    add si, 0x8000
    rep outsb
    ret
.failed:
    mov al, '?'
    out dx, al
    ret

packet: db 16, 0
    dw 1
    dw 0x8000, 0
sector: dq 1

    times 0x1f0 - ($ - $$) db 0
    dd 0
