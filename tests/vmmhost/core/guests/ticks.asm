%include "lib.inc"
        begin
        mov     ebx, [0x46c]
.again: hlt
        mov     eax, [0x46c]
        sub     eax, ebx
        cmp     eax, 3
        jb      .again
        mov     ah, 0x86        ; and 30 ms more
        mov     cx, 0
        mov     dx, 30000
        int     0x15
        mov     si, text
        jc      .bad
        call    puts
        mov     ah, 2
        int     0x1a
        movzx   eax, cx
        call    hex32
        mov     ah, 4
        int     0x1a
        shl     ecx, 16
        mov     cx, dx
        mov     eax, ecx
        call    hex32
        mov     al, 0x32
        out     0x70, al
        in      al, 0x71
        movzx   eax, al
        call    hex32
.bad:   jmp     poweroff
text:   db      "ticked ", 0
        finish
