; From the first instruction in real mode to 64-bit code at 9000. Loaded, and entered, at 8000.
;
;   1000 PML4   2000 PDPT   3000 PD of the first GiB   4000 PD of the fourth (LAPIC)   5000 IDT
;   6000 data   7000 stack (grows down from 8000)   8000 this page: boot, GDT, TSS, parameters   9000 code
;
; The first GiB is mapped one to one with 2 MiB pages, and so is the 2 MiB page of the LAPIC, uncached.

PARAMS = 0x2f00             ; from R14 (6000): 16 parameters at 8f00, u64 each, patched by the loader
DATA = 0x6000
GDT = 0x8e00
TSS = 0x8e80
IDT = 0x5000
CODE64 = 0x18
DATA_SEL = 0x10

bits 16
org 0x8000
.byte 0xea, 0x05, 0x80, 0x00, 0x00      ; jmp 0:8005, whatever CS was
cli
xor ax, ax
mov ds, ax
mov es, ax
mov ss, ax
mov sp, 0x7ff0
.byte 0x66, 0x0f, 0x01, 0x16, 0xf0, 0x8d ; lgdt [8df0]
mov eax, cr0
or al, 1
mov cr0, eax
.byte 0x66, 0xea, 0x40, 0x80, 0x00, 0x00, 0x08, 0x00 ; jmp 08:8040

bits 32
org 0x8040
mov ax, DATA_SEL
mov ds, ax
mov es, ax
mov ss, ax
mov fs, ax
mov gs, ax
mov esp, 0x8000
cld
xor eax, eax
mov edi, 0x1000             ; clear tables, IDT and data
mov ecx, 0x1800
rep stosd
mov dword ptr [0x1000], 0x2003
mov dword ptr [0x2000], 0x3003
mov dword ptr [0x2018], 0x4003
mov edi, 0x3000
mov eax, 0x83
mov ecx, 512
fill_pd:
mov dword ptr [edi], eax
add eax, 0x200000
add edi, 8
dec ecx
jnz fill_pd
mov dword ptr [0x4fb8], 0xfee0009b ; entry 1F7: FEE00000, 2 MiB, PCD PWT
mov eax, cr4
or eax, 0x20                ; PAE
mov cr4, eax
mov eax, 0x1000
mov cr3, eax
mov ecx, 0xc0000080         ; EFER
rdmsr
or eax, 0x901               ; SCE, LME, NXE
wrmsr
mov eax, cr0
or eax, 0x80010000          ; PG, WP
mov cr0, eax
.byte 0xea, 0x00, 0x90, 0x00, 0x00, 0x18, 0x00 ; jmp 18:9000

org 0x8df0
.byte 0x3f, 0x00, 0x00, 0x8e, 0x00, 0x00 ; GDT limit, base
org 0x8e00
.quad 0                                  ; null
.quad 0x00cf9b000000ffff                 ; 08 32-bit code
.quad 0x00cf93000000ffff                 ; 10 data
.quad 0x00af9b000000ffff                 ; 18 64-bit code
.quad 0x00cff3000000ffff                 ; 20 user data
.quad 0x00affb000000ffff                 ; 28 user 64-bit code
.quad 0x000089008e800067                 ; 30 TSS, 16 bytes
.quad 0
