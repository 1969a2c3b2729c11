; A fault with an error code in protected mode, behind a table that has a gate for it.
%include "lib.inc"
        begin
        cli
        lgdt    [gdtr]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        jmp     8:pm
        bits 32
pm:     lidt    [idtr]
        mov     ax, 0x50
        mov     fs, ax          ; beyond the table of descriptors: general protection
        jmp     $
handler:
        mov     dx, 0x604
        mov     ax, 0x2000
        out     dx, ax
        jmp     $
        align 8
gdt:    dq      0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   dw      23
        dd      gdt
idtr:   dw      0x7f
        dd      idt
idt:    times 13 dq 0
        dw      handler, 8, 0x8e00, 0
        finish
