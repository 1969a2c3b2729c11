; A guest whose other I/O never depends on what the extension answers: it touches ports 0x510 to 0x517 and
; address 0xd0000 sixteen times and writes the round to COM1 after each, then powers off.
%include "lib.inc"
        begin
        mov     ax, 0xD000
        mov     es, ax
        mov     cx, 16
round:  mov     dx, 0x510
        in      eax, dx
        mov     dx, 0x514
        out     dx, eax
        mov     eax, [es:0x10]
        mov     [es:0x10], ax
        mov     al, cl
        add     al, '@'
        call    putc
        mov     dx, 0x61        ; a core device
        in      al, dx
        loop    round
        jmp     poweroff
        finish
