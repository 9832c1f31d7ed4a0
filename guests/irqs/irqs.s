; Interrupts, exceptions and the LAPIC's timer, each checked; one line at the end, or a FAIL line a check.
;
;   parameter 0: rounds
;
;   [6100] checks made  [6108] checks failed
;   last exception: [6020] vector [6028] error code [6030] CR2 [6038] RIP [6040] RSP [6050] CS; it resumes at [6048]
;   [6060] vectors taken, eight bytes, the latest lowest   [6068] timer interrupts   [6070] spurious   [6078] software

include lib/boot.s
org 0x8f00
.quad 1

RESUME = 0x48
TAKEN = 0x60
TIMERS = 0x68
SPURIOUS = 0x70
SOFTWARE = 0x78
CHECKS = 0x100
FAILED = 0x108
IST_STACK = 0x70000
SELF = 0x40000              ; ICR: fixed, to self
UD_STACK_TOP = 0x70000

bits 64
org 0x9000
jmp start
include lib/runtime.s

check:                      ; RAX must be RBX
inc qword ptr [r14 + CHECKS]
cmp rax, rbx
jne check_failed
ret
check_failed:
inc qword ptr [r14 + FAILED]
push rsi
push rax
lea rsi, [rip + text_fail]
call puts
mov rax, qword ptr [r14 + CHECKS]
call put_dec
lea rsi, [rip + text_got]
call puts
pop rax
call put_hex
lea rsi, [rip + text_wanted]
call puts
mov rax, rbx
call put_hex
call newline
pop rsi
ret

; -- handlers

on_de:
push 0
push 0
jmp trap
on_db:
push 0
push 1
jmp trap
on_bp:
push 0
push 3
jmp trap
on_ud:
push 0
push 6
jmp trap
on_np:
push 11
jmp trap
on_gp:
push 13
jmp trap
on_pf:
push 14
trap:                       ; [rsp] vector, error code, RIP, CS, RFLAGS, RSP, SS
push rax
mov rax, qword ptr [rsp + 8]
mov qword ptr [r14 + 0x20], rax
mov rax, qword ptr [rsp + 16]
mov qword ptr [r14 + 0x28], rax
mov rax, cr2
mov qword ptr [r14 + 0x30], rax
mov rax, qword ptr [rsp + 24]
mov qword ptr [r14 + 0x38], rax
mov qword ptr [r14 + 0x40], rsp
mov rax, qword ptr [rsp + 32]
mov qword ptr [r14 + 0x50], rax
mov rax, qword ptr [r14 + RESUME]
mov qword ptr [rsp + 24], rax
and qword ptr [rsp + 40], -257      ; TF off
pop rax
add rsp, 16
iretq

on_timer:
inc qword ptr [r14 + TIMERS]
mov dword ptr [r15 + LAPIC_EOI], 0
iretq
on_spurious:
inc qword ptr [r14 + SPURIOUS]
iretq
on_software:
inc qword ptr [r14 + SOFTWARE]
iretq
on_31:
push rax
mov al, 0x31
jmp took
on_55:
push rax
mov al, 0x55
jmp took
on_61:
push rax
mov al, 0x61
jmp took
on_65:
push rax
mov al, 0x65
jmp took
on_71:
push rax
mov al, 0x71
took:                       ; note the vector, EOI
shl qword ptr [r14 + TAKEN], 8
mov byte ptr [r14 + TAKEN], al
mov dword ptr [r15 + LAPIC_EOI], 0
pop rax
iretq
on_62:                      ; interrupted by 71 but not by 55, which waits for EOI
push rax
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x55
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x71
mov eax, dword ptr [r15 + LAPIC_ISR + 0x30]
mov dword ptr [r14 + 0x80], eax     ; 62 is in service
mov eax, dword ptr [r15 + 0xa0]
mov dword ptr [r14 + 0x84], eax     ; PPR
sti
nop
nop
cli
mov al, 0x62
jmp took
on_user:                    ; INT 51 from ring 3: go back to the kernel's code
mov rax, qword ptr [rsp + 8]
mov qword ptr [r14 + 0x50], rax
mov qword ptr [r14 + 0x40], rsp
mov rsp, qword ptr [r14 + 0x88]
mov eax, DATA_SEL
mov ss, ax
jmp user_done
on_syscall:
mov qword ptr [r14 + 0x90], rcx
mov qword ptr [r14 + 0x98], r11
.byte 0x48, 0x0f, 0x07      ; sysretq

; -- the checks

start:
call set_up
mov edi, 0
lea rax, [rip + on_de]
xor esi, esi
call set_gate
mov edi, 1
lea rax, [rip + on_db]
call set_gate
mov edi, 3
lea rax, [rip + on_bp]
call set_gate
mov edi, 6
lea rax, [rip + on_ud]
mov esi, 1                  ; on IST1
call set_gate
xor esi, esi
mov edi, 11
lea rax, [rip + on_np]
call set_gate
mov edi, 13
lea rax, [rip + on_gp]
call set_gate
mov edi, 14
lea rax, [rip + on_pf]
call set_gate
mov edi, 0xff
lea rax, [rip + on_spurious]
call set_gate
mov edi, 0x40
lea rax, [rip + on_timer]
call set_gate
mov edi, 0x50
lea rax, [rip + on_software]
call set_gate
mov edi, 0x51
lea rax, [rip + on_user]
call set_gate
mov byte ptr [r14 - 0xaeb], 0xee    ; gate 51 (at 5510, type at 5515): DPL 3
mov edi, 0x31
lea rax, [rip + on_31]
call set_gate
mov edi, 0x55
lea rax, [rip + on_55]
call set_gate
mov edi, 0x61
lea rax, [rip + on_61]
call set_gate
mov edi, 0x62
lea rax, [rip + on_62]
call set_gate
mov edi, 0x65
lea rax, [rip + on_65]
call set_gate
mov edi, 0x71
lea rax, [rip + on_71]
call set_gate
mov rdi, r14                ; the TSS at 8e80: RSP0 at +4, IST1 at +24h
mov qword ptr [rdi + 0x2e84], 0x60000
mov qword ptr [rdi + 0x2ea4], IST_STACK
mov eax, 0x30
ltr ax
mov ecx, 0xc0000081         ; STAR: SYSCALL to 18, SYSRET to 1b
xor eax, eax
mov edx, 0x1b0018
wrmsr
mov ecx, 0xc0000082         ; LSTAR
lea rax, [rip + on_syscall]
xor edx, edx
wrmsr
mov ecx, 0xc0000084         ; FMASK: IF TF DF
mov eax, 0x700
xor edx, edx
wrmsr

round:
call exceptions
call paging
call user_mode
call priorities
call shadow
call timers
mov rax, qword ptr [r14 + SPURIOUS]
xor ebx, ebx
call check
dec qword ptr [r14 + PARAMS]
jnz round
cmp qword ptr [r14 + FAILED], 0
jne exit_fail
lea rsi, [rip + text_ok]
call puts
mov rax, qword ptr [r14 + CHECKS]
call put_dec
lea rsi, [rip + text_checks]
call puts
jmp exit_ok

last_trap:                  ; the last exception was vector EDX with error code ECX
mov rax, qword ptr [r14 + 0x20]
mov ebx, edx
call check
mov rax, qword ptr [r14 + 0x28]
mov ebx, ecx
call check
mov qword ptr [r14 + 0x20], -1
ret

exceptions:
lea rax, [rip + after_de]
mov qword ptr [r14 + RESUME], rax
xor ecx, ecx
at_de:
div ecx
after_de:
xor edx, edx
xor ecx, ecx
call last_trap
mov rax, qword ptr [r14 + 0x38]
lea rbx, [rip + at_de]
call check
lea rax, [rip + after_bp]
mov qword ptr [r14 + RESUME], rax
int3
after_bp:
mov edx, 3
xor ecx, ecx
call last_trap
mov rax, qword ptr [r14 + 0x38]     ; a trap: the next instruction
lea rbx, [rip + after_bp]
call check
lea rax, [rip + after_ud]
mov qword ptr [r14 + RESUME], rax
mov r13, rsp
ud2
after_ud:
mov edx, 6
xor ecx, ecx
call last_trap
mov rax, rsp                ; IST1 was used, and is left again
mov rbx, r13
call check
mov rax, qword ptr [r14 + 0x40]
mov ebx, UD_STACK_TOP
sub rbx, 64                 ; five words of the frame, error code, vector, RAX
call check
lea rax, [rip + after_gp]
mov qword ptr [r14 + RESUME], rax
mov rdi, 0x8000000000000000
mov rax, qword ptr [rdi]
after_gp:
mov edx, 13
xor ecx, ecx
call last_trap
lea rax, [rip + after_selector]
mov qword ptr [r14 + RESUME], rax
mov eax, 0x58
mov ds, ax
after_selector:
mov edx, 13
mov ecx, 0x58
call last_trap
lea rax, [rip + after_gate]
mov qword ptr [r14 + RESUME], rax
int 0x99
after_gate:                 ; an empty gate: not even a type (QEMU 7.2 scales the error code by 16, so it is not compared)
mov rax, qword ptr [r14 + 0x20]
mov ebx, 13
call check
mov rax, qword ptr [r14 + SOFTWARE]
mov r13, rax
int 0x50
mov rax, qword ptr [r14 + SOFTWARE]
mov rbx, r13
inc rbx
call check
lea rax, [rip + after_step]
mov qword ptr [r14 + RESUME], rax
pushfq
or qword ptr [rsp], 0x100
popfq                       ; TF: a trap after the next instruction
nop
after_step:
mov edx, 1
xor ecx, ecx
call last_trap
mov rax, qword ptr [r14 + 0x38]
lea rbx, [rip + after_step]
call check
ret

paging:
lea rax, [rip + after_read]
mov qword ptr [r14 + RESUME], rax
mov edi, 0x40000123
mov al, byte ptr [rdi]
after_read:
mov edx, 14
xor ecx, ecx
call last_trap
mov rax, qword ptr [r14 + 0x30]
mov ebx, 0x40000123
call check
lea rax, [rip + after_write]
mov qword ptr [r14 + RESUME], rax
mov qword ptr [rdi + 0x1000], rax
after_write:
mov edx, 14
mov ecx, 2
call last_trap
mov rax, qword ptr [r14 + 0x30]
mov ebx, 0x40001123
call check
mov rdi, r14
sub rdi, 0x3000             ; 3000: the PD
mov dword ptr [rdi + 0x18], 0x600081 ; 600000 read-only
mov rax, cr3
mov cr3, rax
lea rax, [rip + after_protected]
mov qword ptr [r14 + RESUME], rax
mov esi, 0x600ff8
mov rax, qword ptr [rsi]
mov qword ptr [rsi], rax
after_protected:
mov edx, 14
mov ecx, 3
call last_trap
mov eax, dword ptr [rdi + 0x18]     ; accessed, not dirty
and eax, 0x60
mov ebx, 0x20
call check
mov dword ptr [rdi + 0x18], 0x600083
mov rax, cr3
mov cr3, rax
mov qword ptr [rsi], rsi
mov eax, dword ptr [rdi + 0x18]
and eax, 0x60
mov ebx, 0x60
call check
mov dword ptr [rdi + 0x24], 0x80000000 ; 800000 not executable
mov rax, cr3
mov cr3, rax
lea rax, [rip + after_nx]
mov qword ptr [r14 + RESUME], rax
mov esi, 0x800000
jmp rsi
after_nx:
mov edx, 14
mov ecx, 0x11
call last_trap
mov rax, qword ptr [r14 + 0x38]
mov ebx, 0x800000
call check
mov dword ptr [rdi + 0x24], 0
mov dword ptr [rdi + 0x20], 0x802083 ; a reserved bit of a 2 MiB entry
mov rax, cr3
mov cr3, rax
lea rax, [rip + after_reserved]
mov qword ptr [r14 + RESUME], rax
mov al, byte ptr [rsi]
after_reserved:             ; QEMU 7.2 leaves out P, which the manual has set with RSVD
mov rax, qword ptr [r14 + 0x20]
mov ebx, 14
call check
mov rax, qword ptr [r14 + 0x28]
and eax, 8
mov ebx, 8
call check
mov dword ptr [rdi + 0x20], 0x800083
mov rax, cr3
mov cr3, rax
ret

user_mode:
mov rdi, r14
or dword ptr [rdi - 0x5000], 4      ; user may go through PML4, PDPT, PD entry 0
or dword ptr [rdi - 0x4000], 4
or dword ptr [rdi - 0x3000], 4
mov rax, cr3
mov cr3, rax
mov qword ptr [r14 + 0x88], rsp
push 0x23
push 0x50000
push 2
push 0x2b
lea rax, [rip + in_user]
push rax
iretq
in_user:
lea rax, [rip + after_cli]
mov qword ptr [r14 + RESUME], rax
cli
after_cli:
mov rax, qword ptr [r14 + 0x20]     ; no call of last_trap: checks print by IN and OUT, which ring 3 may not
mov qword ptr [r14 + 0xa0], rax
mov rax, qword ptr [r14 + 0x50]
mov qword ptr [r14 + 0xa8], rax
lea rax, [rip + after_kernel]
mov qword ptr [r14 + RESUME], rax
mov eax, LAPIC
mov eax, dword ptr [rax + 0x20]     ; a supervisor page
after_kernel:
mov rax, qword ptr [r14 + 0x28]
mov qword ptr [r14 + 0xb0], rax
syscall
after_syscall:
mov ax, cs
mov word ptr [r14 + 0xb8], ax
int 0x51
user_done:
mov rax, qword ptr [r14 + 0x50]     ; came from ring 3
mov ebx, 0x2b
call check
mov rax, qword ptr [r14 + 0x40]     ; on RSP0, five words pushed
mov ebx, 0x60000
sub rbx, 40
call check
mov rax, qword ptr [r14 + 0xa0]
mov ebx, 13
call check
mov rax, qword ptr [r14 + 0xa8]
mov ebx, 0x2b
call check
mov rax, qword ptr [r14 + 0xb0]     ; present, read, user
mov ebx, 5
call check
mov rax, qword ptr [r14 + 0x90]
lea rbx, [rip + after_syscall]
call check
movzx eax, word ptr [r14 + 0xb8]
mov ebx, 0x2b
call check
ret

priorities:
mov qword ptr [r14 + TAKEN], 0
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x61
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x31
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x71
mov eax, dword ptr [r15 + LAPIC_IRR + 0x30]
mov ebx, 0x20002
call check
sti
nop
nop
nop
cli
mov rax, qword ptr [r14 + TAKEN]
mov ebx, 0x716131
call check
mov qword ptr [r14 + TAKEN], 0
mov dword ptr [r15 + LAPIC_TPR], 0x60
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x65
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x71
sti
nop
nop
cli
mov rax, qword ptr [r14 + TAKEN]    ; 65 is of class 6: masked
mov ebx, 0x71
call check
mov rax, cr8
mov ebx, 6
call check
xor eax, eax
mov cr8, rax
sti
nop
nop
cli
mov rax, qword ptr [r14 + TAKEN]
mov ebx, 0x7165
call check
mov eax, dword ptr [r15 + LAPIC_TPR]
xor ebx, ebx
call check
mov qword ptr [r14 + TAKEN], 0
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x62
sti
nop
nop
nop
cli
mov rax, qword ptr [r14 + TAKEN]    ; 71 inside 62, 55 after it
mov ebx, 0x716255
call check
mov eax, dword ptr [r14 + 0x80]
mov ebx, 4
call check
mov eax, dword ptr [r14 + 0x84]
mov ebx, 0x60
call check
mov eax, dword ptr [r15 + LAPIC_ISR + 0x30]
xor ebx, ebx
call check
mov eax, dword ptr [r15 + 0x30]
and eax, 0xff
mov ebx, 0x14
call check
mov eax, dword ptr [r15 + 0x3f0]    ; no such register
mov dword ptr [r15 + LAPIC_ESR], 0
mov eax, dword ptr [r15 + LAPIC_ESR]
mov ebx, 0x80
call check
ret

shadow:                     ; STI takes effect after the instruction that follows it
mov qword ptr [r14 + TAKEN], 0
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x61
sti
cli
mov rax, qword ptr [r14 + TAKEN]
xor ebx, ebx
call check
sti
nop
cli
mov rax, qword ptr [r14 + TAKEN]
mov ebx, 0x61
call check
mov qword ptr [r14 + TAKEN], 0
mov dword ptr [r15 + LAPIC_ICR], SELF + 0x71
sti
hlt                         ; taken after HLT, which it ends at once
cli
mov rax, qword ptr [r14 + TAKEN]
mov ebx, 0x71
call check
ret

timers:
mov dword ptr [r15 + LAPIC_LVT_TIMER], 0x40
xor r12d, r12d              ; every divider: 2 4 8 16 32 64 128 1
one_shot:
mov eax, r12d
and eax, 3
mov ecx, r12d
and ecx, 4
shl ecx, 1
or eax, ecx
mov dword ptr [r15 + LAPIC_DIVIDE], eax
mov r13, qword ptr [r14 + TIMERS]
mov eax, r12d
inc eax
and eax, 7
mov ecx, eax
mov eax, 200000
shr eax, cl
cli
mov dword ptr [r15 + LAPIC_INITIAL], eax
one_shot_wait:
sti
hlt
cli
cmp qword ptr [r14 + TIMERS], r13
je one_shot_wait
mov rax, qword ptr [r14 + TIMERS]
lea rbx, [r13 + 1]
call check
mov eax, dword ptr [r15 + LAPIC_CURRENT]
xor ebx, ebx
call check
inc r12d
cmp r12d, 8
jne one_shot
mov dword ptr [r15 + LAPIC_LVT_TIMER], 0x10040  ; masked: counts, and does not fire
mov dword ptr [r15 + LAPIC_DIVIDE], 0xb
mov dword ptr [r15 + LAPIC_INITIAL], 3000
masked_wait:
cmp dword ptr [r15 + LAPIC_CURRENT], 0
jne masked_wait
mov r13, qword ptr [r14 + TIMERS]
sti
nop
nop
cli
mov rax, qword ptr [r14 + TIMERS]
mov rbx, r13
call check
mov dword ptr [r15 + LAPIC_LVT_TIMER], 0x20040  ; periodic: five times, then off
mov dword ptr [r15 + LAPIC_INITIAL], 100000
periodic_wait:
sti
hlt
cli
mov rax, qword ptr [r14 + TIMERS]
sub rax, r13
cmp rax, 5
jb periodic_wait
mov dword ptr [r15 + LAPIC_INITIAL], 0
mov dword ptr [r15 + LAPIC_LVT_TIMER], 0x10040
sti
nop
nop
cli
mov eax, dword ptr [r15 + LAPIC_ISR + 0x20]
xor ebx, ebx
call check
ret
text_fail:
string "irqs: FAIL check "
text_got:
string " got "
text_wanted:
string " wanted "
text_ok:
string "irqs: OK "
text_checks:
string " checks\n"
