; Waits for three interrupts of IRQ 11, which a device outside must raise.
%include "lib.inc"
        begin
        cli
        mov     word [0x73*4], irq
        mov     word [0x73*4+2], 0
        in      al, 0xa1
        and     al, ~8
        out     0xa1, al
        sti
.wait:  hlt
        cmp     byte [count], 3
        jb      .wait
        mov     si, text
        call    puts
        jmp     poweroff
irq:    push    ax
        inc     byte [cs:count]
        mov     al, 0x20
        out     0xa0, al
        out     0x20, al
        pop     ax
        iret
count:  db      0
text:   db      "three", 0
        finish
