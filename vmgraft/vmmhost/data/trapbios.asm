; vmgraft trap BIOS: a 64 KiB ROM at F0000h for a 16-bit PC.
;
; It holds almost no code. Every interrupt vector points to a 16-byte stub whose first instruction writes to the trap
; port; the host sees the write, reads the vector number from the instruction pointer, serves the call and patches the
; caller's flags in the interrupt frame. Assemble with: nasm -f bin -o trapbios.bin trapbios.asm

        bits 16
        org 0

TRAP            equ 0xba        ; the trap port
STUBS           equ 0x1000      ; offset of the stub of vector 0
STUB_SIZE       equ 16
WAIT_FLAG       equ 0xac        ; byte in the BIOS data area (40h:ACh): set by the host, "sleep, then ask again"
POINTER_FLAG    equ 0xad        ; byte at 40h:ADh: set by the host, "load ES:DI from vector 1Eh"

KERNEL          equ 0x0c00      ; offset of the code that enters a kernel
; What the host leaves for it in the extended BIOS data area, as offsets from that area's segment.
EBDA            equ 0x9fc0
AREA            equ EBDA * 16   ; the same as a flat address
TABLE           equ 0x140       ; limit (2) and base (4) of the descriptor table
WIDE            equ 0x146       ; 0: enter in 32-bit protected mode; 1: in 64-bit mode
PAGES           equ 0x148       ; root of the page tables, for 64-bit mode
STACK           equ 0x14c       ; stack pointer
TARGET          equ 0x150       ; entry point (4), then the selector of the code segment (2); 8 bytes of address in 64-bit mode
REGISTERS       equ 0x160       ; EDI ESI EBP - EBX EDX ECX EAX, 32 bits each

%macro fill_to 1
        times %1-($-$$) db 0
%endmacro

; --- power on -------------------------------------------------------------------------------------------------------
reset:
        cli
        cld
        xor     ax, ax
        mov     ss, ax
        mov     sp, 0x7c00
        mov     al, 0x11        ; 8259A: ICW1, edge triggered, cascaded, ICW4 follows
        out     0x20, al
        out     0xa0, al
        mov     al, 0x08        ; ICW2: IRQ 0-7 at vectors 08h-0Fh
        out     0x21, al
        mov     al, 0x70        ; ICW2: IRQ 8-15 at vectors 70h-77h
        out     0xa1, al
        mov     al, 0x04        ; ICW3: the second chip hangs on IRQ 2
        out     0x21, al
        mov     al, 0x02
        out     0xa1, al
        mov     al, 0x01        ; ICW4: 8086 mode
        out     0x21, al
        out     0xa1, al
        mov     al, 0xb8        ; open: timer, keyboard, cascade, diskette
        out     0x21, al
        mov     al, 0x8f
        out     0xa1, al
        mov     al, 0x34        ; 8254: counter 0, both bytes, mode 2, divisor 65536 (18.2 Hz)
        out     0x43, al
        xor     al, al
        out     0x40, al
        out     0x40, al
        mov     ds, ax
        mov     es, ax
        xor     bx, bx
        xor     cx, cx
        xor     dx, dx
        xor     si, si
        xor     di, di
        xor     bp, bp
        sti
        int     0x19            ; the host loads the boot program and patches the return address
.dead:  cli
        hlt
        jmp     .dead

; --- after a call that may have to wait (INT 15h AH=86h, INT 16h) -----------------------------------------------------
%macro wait_or_return 1
        push    ds
        push    word 0x40
        pop     ds
        cmp     byte [WAIT_FLAG], 0
        pop     ds
        jne     %%sleep
        iret
%%sleep:
        sti
        hlt                     ; any interrupt wakes it; then the same call is made again
        jmp     STUBS + %1 * STUB_SIZE
%endmacro

wait_15: wait_or_return 0x15
wait_16: wait_or_return 0x16

; --- after INT 13h: the parameters of a diskette drive (AH=08h) are told by a pointer in ES:DI --------------------------
disk_13:
        push    ds
        push    word 0x40
        pop     ds
        cmp     byte [POINTER_FLAG], 0
        je      .done
        mov     byte [POINTER_FLAG], 0
        push    word 0
        pop     ds
        les     di, [0x1e * 4]
.done:  pop     ds
        iret

; --- enter a kernel: INT 19h returns here, interrupts off ---------------------------------------------------------------
        fill_to KERNEL
enter:
        mov     ax, EBDA
        mov     ds, ax
        o32 lgdt [TABLE]
        mov     eax, 0x11       ; protected mode, and the bit that is always set; everything else off
        mov     cr0, eax
        jmp     dword 0x08:0xf0000 + .flat

        bits 32
.flat:  mov     ax, 0x18
        mov     ds, ax
        mov     es, ax
        mov     fs, ax
        mov     gs, ax
        mov     ss, ax
        cmp     byte [AREA + WIDE], 0
        jne     .long
        mov     ax, 0x20
        ltr     ax
        xor     eax, eax
        lldt    ax
        mov     cr4, eax
        push    dword 2         ; on the ROM's stack: only the bit that is always set
        popf
        mov     esp, AREA + REGISTERS
        popa
        mov     esp, [AREA + STACK]
        jmp     far [AREA + TARGET]

.long:  mov     eax, 0x20       ; physical address extension
        mov     cr4, eax
        mov     eax, [AREA + PAGES]
        mov     cr3, eax
        mov     ecx, 0xc0000080 ; EFER: long mode
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, 0x80000011
        mov     cr0, eax
        jmp     0x10:0xf0000 + .wide

        bits 64
.wide:  mov     esp, [abs AREA + STACK]
        push    qword 2
        popf
        mov     edi, [abs AREA + REGISTERS]
        mov     esi, [abs AREA + REGISTERS + 4]
        mov     ebp, [abs AREA + REGISTERS + 8]
        mov     ebx, [abs AREA + REGISTERS + 16]
        mov     edx, [abs AREA + REGISTERS + 20]
        mov     ecx, [abs AREA + REGISTERS + 24]
        mov     eax, [abs AREA + REGISTERS + 28]
%assign number 8
%rep 8
        mov     r %+ number %+ d, 0
  %assign number number + 1
%endrep
        jmp     qword [abs AREA + TARGET]
        bits 16

; --- one stub a vector ------------------------------------------------------------------------------------------------
        fill_to STUBS
%assign vector 0
%rep 256
        fill_to STUBS + vector * STUB_SIZE
  %if vector = 0x08
        out     TRAP, al        ; the host counts the tick
        int     0x1c
        push    ax
        mov     al, 0x20
        out     0x20, al
        pop     ax
        iret
  %elif vector >= 0x09 && vector <= 0x0f
        push    ax
        mov     al, 0x20        ; end of interrupt, first chip
        out     0x20, al
        pop     ax
        iret
  %elif vector >= 0x70 && vector <= 0x77
        push    ax
        mov     al, 0x20        ; end of interrupt, both chips
        out     0xa0, al
        out     0x20, al
        pop     ax
        iret
  %elif vector = 0x1c
        iret
  %elif vector = 0x13
        out     TRAP, al
        jmp     disk_13
  %elif vector = 0x15
        out     TRAP, al
        jmp     wait_15
  %elif vector = 0x16
        out     TRAP, al
        jmp     wait_16
  %else
        out     TRAP, al
        iret
  %endif
  %assign vector vector + 1
%endrep

; --- tables at their traditional addresses ----------------------------------------------------------------------------
        fill_to 0xe6f5          ; system configuration table, INT 15h AH=C0h
        dw      8
        db      0xfc, 0x00, 0x00
        db      0x60            ; second 8259A, real-time clock
        times 4 db 0

        fill_to 0xefc7          ; diskette parameter table, vector 1Eh
        db      0xaf, 0x02, 0x25, 0x02, 0x12, 0x1b, 0xff, 0x6c, 0xf6, 0x0f, 0x08

        fill_to 0xfff0
        jmp     0xf000:reset
        db      '11/22/26'      ; release date, at FFF5h
        fill_to 0xfffe
        db      0xfc, 0x00      ; model byte: AT
