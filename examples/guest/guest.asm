; A guest that tells what it finds. One 512-byte boot sector; runs as an MBR and as an El Torito
; no-emulation image, both loaded at 0x7C00. Speaks on COM1 and on the screen (INT 10h).
;
;     vmgraft guest
;     extensions: 2                  or: extensions: none
;     clock: 0x00000000003d0900 ok   or: clock: absent, or the value and "bad"
;     entropy: 0x1b2c3d4e            or: entropy: absent
;     done
;
; Build: nasm -f bin -o guest.bin guest.asm
; SPDX-License-Identifier: Apache-2.0

        bits 16
        cpu 386
        org 0x7C00

COM1            equ 0x3F8
DOORBELL        equ 0x564       ; hypercall: OUT 32 bits; number EAX, result EDX:EAX
DISCOVERY       equ 0           ; hypercall 0: magic in EAX, number of extensions in EDX
MAGIC           equ 0x56474654
CLOCK_PORT      equ 0x510       ; examples/clock: low half, latches; high half at +4
CLOCK_CALL      equ 16          ; examples/clock: nanoseconds since boot
ENTROPY_SEG     equ 0xD000      ; examples/entropy: 0x00 ID, 0x10 DATA
ENTROPY_ID      equ 0x4E454756
POWER_PORT      equ 0x604
POWER_OFF       equ 0x2000

start:  jmp 0:main              ; some BIOSes enter at 07C0:0000
main:   cli
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7C00
        cld
        sti

        mov si, hello
        call print

; --- which extensions are there? ---
        mov si, extensions
        call print
        xor eax, eax            ; DISCOVERY; without a doorbell EAX stays 0
        xor edx, edx
        call hypercall
        cmp eax, MAGIC
        jne .none
        mov eax, edx
        call decimal
        jmp .clock
.none:  mov si, none
        call print

; --- clock: two port reads, then the hypercall, which may not be earlier ---
.clock: mov si, clock
        call print
        mov dx, CLOCK_PORT
        in eax, dx
        mov ebp, eax            ; low half
        mov dx, CLOCK_PORT + 4
        in eax, dx
        mov edi, eax            ; high half
        and eax, ebp
        inc eax                 ; all ones on both: nobody answers
        jz .noclock
        mov si, prefix
        call print
        mov eax, edi
        call hex32
        mov eax, ebp
        call hex32
        push edi
        push ebp
        mov eax, CLOCK_CALL
        call hypercall
        pop ebp
        pop edi
        mov ecx, eax
        and ecx, edx
        inc ecx
        jz .bad                 ; all ones: no such hypercall
        sub eax, ebp
        sbb edx, edi
        jc .bad                 ; time went backwards
        mov si, ok
        jmp .said
.bad:   mov si, bad
        jmp .said
.noclock:
        mov si, absent
.said:  call print

; --- entropy: one 32-bit word by MMIO ---
        mov si, entropy
        call print
        mov ax, ENTROPY_SEG
        mov es, ax
        cmp dword [es:0x00], ENTROPY_ID
        mov si, absent
        jne .last
        mov si, prefix
        call print
        mov eax, [es:0x10]
        call hex32
        mov si, newline
.last:  call print

        mov si, done
        call print
        mov dx, POWER_PORT
        mov ax, POWER_OFF
        out dx, ax
.halt:  cli
        hlt
        jmp .halt

; EAX: number -> EDX:EAX. A machine without the doorbell leaves EAX and EDX as they are, but for DX.
hypercall:
        xor ebx, ebx
        xor ecx, ecx
        xor esi, esi
        xor edi, edi
        mov dx, DOORBELL
        out dx, eax
        ret

; EAX as 8 hexadecimal digits
hex32:  mov cx, 8
.next:  rol eax, 4
        push eax
        and al, 0x0F
        cmp al, 10
        sbb al, 0x69
        das
        or al, 0x20             ; a-f in lower case; digits already have the bit
        call putc
        pop eax
        loop .next
        ret

; EAX as a decimal number and a line end
decimal:
        mov ebx, 10
        xor cx, cx
.split: xor edx, edx
        div ebx
        push dx
        inc cx
        test eax, eax
        jnz .split
.out:   pop ax
        add al, '0'
        call putc
        loop .out
        mov si, newline
        ; falls through

; zero-terminated text at DS:SI
print:  lodsb
        test al, al
        jz .end
        call putc
        jmp print
.end:   ret

; AL to COM1 and to the screen
putc:   pushad
        mov bl, al
        mov dx, COM1
        out dx, al
        mov al, bl
        mov ah, 0x0E
        mov bx, 7
        int 0x10
        popad
        ret

hello:      db "vmgraft guest", 13, 10, 0
extensions: db "extensions: ", 0
none:       db "none", 13, 10, 0
clock:      db "clock: ", 0
entropy:    db "entropy: ", 0
prefix:     db "0x", 0
ok:         db " ok", 13, 10, 0
bad:        db " bad", 13, 10, 0
absent:     db "absent"
newline:    db 13, 10, 0
done:       db "done", 13, 10, 0

        times 440 - ($ - $$) db 0   ; leaves disk signature and partition table free
        times 510 - ($ - $$) db 0
        dw 0xAA55
