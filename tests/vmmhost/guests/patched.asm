; Puts "mov al, 'A'; retf" at 1000:0000, calls it and writes what it gives to COM1; then lets an extension change it by a write
; to port 0x510, calls it again, and powers off.
%include "lib.inc"
        begin
        mov     ax, 0x1000
        mov     es, ax
        mov     dword [es:0], 0x00CB41B0
        mov     cx, 2
again:  call    0x1000:0
        call    putc
        mov     dx, 0x510
        out     dx, al
        loop    again
        jmp     poweroff
        finish
