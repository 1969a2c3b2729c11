; Shows what the default services give, one after the other on COM1: time of day from CMOS, ticks of INT 1Ah, CPUID
; leaf 40000000h, then the hypercalls: discovery, console write, name of extension 0, entropy, number 9. It reads
; sector 2 of its disk and writes it back, tells the status of both, and powers off.
%include "lib.inc"
        begin
        mov     ax, 0x0400      ; hours, minutes and seconds in AH order: registers 4, 2, 0
        xor     ebx, ebx
.clock: mov     al, ah
        out     0x70, al
        in      al, 0x71
        shl     ebx, 8
        mov     bl, al
        sub     ah, 2
        jns     .clock
        mov     eax, ebx
        call    hex32
        xor     ax, ax          ; INT 1Ah AH=00h
        int     0x1a
        mov     ax, cx
        shl     eax, 16
        mov     ax, dx
        call    hex32
        mov     eax, 0x40000000
        cpuid
        mov     eax, ebx
        call    hex32
        xor     eax, eax        ; discovery
        call    ring
        call    hex32
        mov     eax, 3          ; console write: 3 bytes at "text"
        mov     ebx, text
        mov     ecx, 3
        call    ring
        call    hex32
        mov     eax, 4          ; name of extension 0, at 0x600
        xor     ebx, ebx
        mov     ecx, 0x600
        mov     esi, 64
        call    ring
        call    hex32
        mov     si, 0x600
        cmp     eax, 0xffffffff
        je      .random
        mov     di, ax
        mov     byte [0x600 + di], 0
        call    puts
.random:
        mov     eax, 1
        call    ring
        call    hex32
        mov     eax, 9          ; no default
        mov     ebx, 5
        call    ring
        call    hex32
        mov     ax, 0x0201      ; read sector 2
        call    move
        mov     ax, 0x0301      ; write it back
        call    move
        jmp     poweroff
move:   mov     bx, 0x800
        mov     cx, 0x0002
        mov     dx, 0x0080
        int     0x13
        movzx   eax, ah
        jmp     hex32
ring:   xor     edx, edx
        mov     dx, 0x564
        out     dx, eax
        ret
text:   db      "hi!"
        finish
