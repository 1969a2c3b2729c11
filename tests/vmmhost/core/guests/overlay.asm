; Runs a routine, loads another one over it with INT 13h, and runs that: translated code must not survive.
%include "lib.inc"
        begin
        mov     [packet.drive], dl
        mov     byte [packet+8], 2
        call    load
        call    0x8000
        mov     byte [packet+8], 3
        call    load
        call    0x8000
        mov     word [0x8000], 0x58b0 ; and once more by the guest itself: mov al, 'X'
        call    0x8000
        jmp     poweroff
load:   mov     ah, 0x42
        mov     dl, [packet.drive]
        mov     si, packet
        int     0x13
        ret
.x:     align   4
packet: db      16, 0
        dw      1, 0x8000, 0
        dq      0
.drive: db      0
        finish
; sectors 1-3: sector 2 sends A, sector 3 sends B
        times 1024-($-$$) db 0
        mov     al, 'A'
        mov     dx, 0x3f8
        out     dx, al
        ret
        times 1536-($-$$) db 0
        mov     al, 'B'
        mov     dx, 0x3f8
        out     dx, al
        ret
        times 2048-($-$$) db 0
