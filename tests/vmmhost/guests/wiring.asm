; Shows what an extension says: hypercalls 16 and 17 (four letters each), 18 (nobody's), then waits for its tick counter.
bits 16
cpu 386
org 0x7c00
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    mov eax, 16
    xor ebx, ebx                ; argument 0: offset into the config
    call ask
    mov eax, 17
    mov ebx, 4
    call ask
    mov eax, 18
    mov dx, 0x564
    out dx, eax
    inc eax                     ; all ones: nobody answers
    jnz ticks
    mov al, '!'
    call put
ticks:
    mov dx, 0x510
    in al, dx
    cmp al, 2                   ; two ticks
    jb ticks
    mov al, 't'
    call put
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
    hlt
ask:
    mov dx, 0x564
    out dx, eax
    mov ecx, 4
next:
    call put
    shr eax, 8
    loop next
    ret
put:
    mov dx, 0x3f8
    out dx, al
    ret
times 510 - ($ - $$) db 0
    dw 0xaa55
