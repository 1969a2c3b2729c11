%include "lib.inc"
        begin
        mov     [drive], dl
        mov     ah, 0x41
        mov     bx, 0x55aa
        int     0x13
        movzx   eax, bx
        call    hex32           ; aa55
        mov     ah, 0x42        ; LBA 2 to 8000h
        mov     si, packet
        call    disk
        mov     eax, [0x8000]
        call    hex32
        mov     ax, 0x0201      ; the same sector by CHS 0/0/3
        mov     bx, 0x8200
        mov     cx, 0x0003
        mov     dh, 0
        call    disk
        mov     eax, [0x8200]
        call    hex32
        mov     dword [0x8000], 0x12345678
        mov     byte [packet+8], 3
        mov     ax, 0x4300      ; write LBA 3
        mov     si, packet
        call    disk
        mov     dword [0x8000], 0
        mov     ah, 0x42
        mov     si, packet
        call    disk
        mov     eax, [0x8000]
        call    hex32           ; 12345678
        mov     ah, 0x08
        call    disk
        movzx   eax, cx
        call    hex32
        movzx   eax, dx
        call    hex32
        mov     word [0x8000], 26
        mov     si, 0x8000
        mov     ah, 0x48
        call    disk
        mov     eax, [0x8010]   ; sectors in all
        call    hex32
        mov     dword [packet+8], 0x7fffffff
        mov     ah, 0x42
        mov     si, packet
        call    disk            ; far beyond the end: 04xx and carry
        mov     dword [packet+8], 2
        mov     word [packet+6], 0xd000
        mov     ah, 0x42
        mov     si, packet
        call    disk            ; into the hole: 09xx and carry
        jmp     poweroff
; INT 13h, and AX as it came back with carry in bit 16
disk:   mov     dl, [drive]
        int     0x13
        push    eax
        push    ecx
        pushf
        pop     cx
        movzx   eax, ax
        and     ecx, 1
        shl     ecx, 16
        or      eax, ecx
        and     eax, 0x1ff00
        call    hex32
        pop     ecx
        pop     eax
        ret
drive:  db      0
        align   4
packet: db      16, 0
        dw      1, 0x8000, 0
        dq      2
        finish
