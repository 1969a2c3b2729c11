%include "lib.inc"
        begin
        mov     ax, 0x0003
        int     0x10
        mov     si, one         ; teletype, with CR LF
.tty:   lodsb
        test    al, al
        jz      .placed
        mov     ah, 0x0e
        mov     bx, 7
        int     0x10
        jmp     .tty
.placed:
        mov     ah, 2           ; cursor to row 10, column 70
        mov     bh, 0
        mov     dx, 0x0a46
        int     0x10
        mov     ax, 0x09c4      ; twenty times a box line: wraps into the next row
        mov     bx, 0x001e
        mov     cx, 20
        int     0x10
        mov     ah, 3
        int     0x10
        movzx   eax, dx         ; the cursor stays
        call    hex32
        mov     ah, 8
        mov     bh, 0
        int     0x10
        movzx   eax, ax
        call    hex32
        mov     ah, 2           ; last row, last column: the next character scrolls
        mov     bh, 0
        mov     dx, 0x184f
        int     0x10
        mov     ax, 0x0e58
        int     0x10
        mov     ax, 0x0e59
        int     0x10
        mov     ax, 0x1301      ; a whole string at row 5
        mov     bx, 0x0007
        mov     cx, 6
        mov     dx, 0x0502
        mov     bp, two
        int     0x10
        mov     ax, 0x0701      ; rows 6-8, columns 0-9 down by one
        mov     bh, 7
        mov     cx, 0x0600
        mov     dx, 0x0809
        int     0x10
        mov     ah, 0x0f
        int     0x10
        movzx   eax, ax
        call    hex32
        cli
        hlt
one:    db      "first line", 13, 10, "second", 8, "D", 0
two:    db      "string"
        finish
