; Calls vectors 20h to 2Fh with every function number: 4096 names of calls.
%include "lib.inc"
        begin
        mov     bx, 0x2000      ; vector, function
.next:  mov     ah, bl
        mov     [.vector+1], bh ; the jump makes the CPU see what was changed
        jmp     .vector
.vector: int    0x20
        inc     bl
        jnz     .next
        inc     bh
        cmp     bh, 0x30
        jb      .next
        jmp     poweroff
        finish
