; Looks at the drives 00h, 80h, 81h and E0h as a boot program does, and says what it finds.
%include "lib.inc"
        begin
        movzx   eax, dl         ; booted from
        call    hex32
        mov     ah, 8
        mov     dl, 0
        xor     di, di
        int     0x13
        jc      .none
        movzx   eax, cx         ; geometry, count, type, and the parameters' sectors a track
        call    hex32
        movzx   eax, dx
        call    hex32
        movzx   eax, bx
        call    hex32
        movzx   eax, byte [es:di+4]
        call    hex32
.none:  xor     ax, ax
        mov     es, ax
        movzx   eax, byte [0x475]
        call    hex32
        int     0x11
        and     eax, 0xc1
        call    hex32
        mov     dl, 0           ; first bytes of each: by CHS, by CHS, by LBA, by LBA
        call    chs
        mov     dl, 0x80
        call    chs
        mov     dl, 0x81
        call    lba
        mov     dl, 0xe0
        call    lba
        jmp     poweroff
chs:    mov     dword [0x8000], 0
        mov     ax, 0x0201
        mov     bx, 0x8000
        mov     cx, 2
        mov     dh, 0
        int     0x13
        jmp     show
lba:    mov     dword [0x8000], 0
        mov     ah, 0x42
        mov     si, packet
        int     0x13
show:   mov     eax, [0x8000]
        call    hex32
        ret
        align   4
packet: db      16, 0
        dw      1, 0x8000, 0
        dq      1
        finish
