; The classic way out of protected mode: an interrupt without a descriptor table.
%include "lib.inc"
        begin
        cli
        lgdt    [gdtr]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        jmp     8:pm
        bits 32
pm:     lidt    [none]
        int3
        jmp     $
        align 8
gdt:    dq      0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   dw      23
        dd      gdt
none:   dw      0
        dd      0
        finish
