; A periodic LAPIC timer; at every tick some pages are verified and written, every so often a heartbeat.
;
;   parameter 0: timer period in ns       1: pages a tick      2: pages in all
;   3: ticks a heartbeat                  4: heartbeats until the end (0: never)
;   5: 1 to hold every tick against the TSC, which must go at 1 GHz
;
;   [6000] ticks taken by the handler   [6008] ticks served   [6010] pages written   [6018] sum of stamps
;   [6020] heartbeats   [6028] TSC at the start of the timer
;   stamps of the pages from 100000 on, 8 bytes each; the pages from 200000 on
;
; A page is filled with its stamp; before it is written again every word of it is compared with
; the stamp in the table. What is lost, doubled or torn shows as FAIL. With parameter 5 so does a tick that is
; lost or doubled: tick n must come in the n-th period after the start.

include lib/boot.s
org 0x8f00
.quad 1000000
.quad 4
.quad 256
.quad 100
.quad 0
.quad 0

STAMPS = 0x100000
PAGES = 0x200000
VECTOR = 0x40

bits 64
org 0x9000
jmp start
include lib/runtime.s

start:
call set_up
mov edi, VECTOR
lea rax, [rip + tick]
xor esi, esi
call set_gate
mov dword ptr [r15 + LAPIC_DIVIDE], 0xb     ; by 1
mov dword ptr [r15 + LAPIC_LVT_TIMER], 0x20040
mov eax, dword ptr [r14 + PARAMS]
dec eax
mov dword ptr [r15 + LAPIC_INITIAL], eax
rdtsc
shl rdx, 32
or rax, rdx
mov qword ptr [r14 + 0x28], rax
lea rsi, [rip + text_start]
call puts
wait_tick:
cli
mov rax, qword ptr [r14 + 8]
cmp rax, qword ptr [r14]
jne serve
sti
hlt
jmp wait_tick
serve:
sti
inc qword ptr [r14 + 8]
mov r12, qword ptr [r14 + PARAMS + 8]
next_page:
test r12, r12
jz pages_done
call write_page
dec r12
jmp next_page
pages_done:
mov rax, qword ptr [r14 + 8]
xor edx, edx
div qword ptr [r14 + PARAMS + 24]
test rdx, rdx
jnz wait_tick
call heartbeat
mov rax, qword ptr [r14 + 0x20]
cmp rax, qword ptr [r14 + PARAMS + 32]
jne wait_tick

finish:                     ; every page once more
cli
xor ebx, ebx
finish_page:
call verify_page
inc rbx
cmp rbx, qword ptr [r14 + PARAMS + 16]
jne finish_page
lea rsi, [rip + text_ok]
call puts
call numbers
jmp exit_ok

tick:                       ; the interrupt handler
inc qword ptr [r14]
cmp qword ptr [r14 + PARAMS + 40], 0
je tick_taken
push rax
push rdx
rdtsc
shl rdx, 32
or rax, rdx
sub rax, qword ptr [r14 + 0x28]
xor edx, edx
div qword ptr [r14 + PARAMS]
cmp rax, qword ptr [r14]
jne out_of_sequence
pop rdx
pop rax
tick_taken:
mov dword ptr [r15 + LAPIC_EOI], 0
iretq

write_page:                 ; verify and refill the next page in turn
mov rax, qword ptr [r14 + 0x10]
xor edx, edx
div qword ptr [r14 + PARAMS + 16]
mov rbx, rdx
call verify_page
mov rax, qword ptr [r14 + 0x10]
inc rax
mov qword ptr [r14 + 0x10], rax
mov rcx, 0x9e3779b97f4a7c15
imul rax, rcx
xor rax, rbx
mov qword ptr [STAMPS + rbx * 8], rax
add qword ptr [r14 + 0x18], rax
mov rdi, rbx
shl rdi, 12
add rdi, PAGES
mov ecx, 512
rep stosq
ret

verify_page:                ; all words of page RBX are its stamp
mov rax, qword ptr [STAMPS + rbx * 8]
mov rdi, rbx
shl rdi, 12
add rdi, PAGES
mov ecx, 512
verify_word:
cmp qword ptr [rdi], rax
jne damaged
add rdi, 8
dec ecx
jnz verify_word
ret

damaged:
cli
lea rsi, [rip + text_fail]
call puts
mov rax, rdi
call put_hex
call newline
jmp exit_fail

out_of_sequence:            ; tick [6000] came in period RAX
mov rbx, rax
lea rsi, [rip + text_tick]
call puts
mov rax, qword ptr [r14]
call put_dec
lea rsi, [rip + text_period]
call puts
mov rax, rbx
call put_dec
call newline
jmp exit_fail

heartbeat:
inc qword ptr [r14 + 0x20]
lea rsi, [rip + text_beat]
call puts
numbers:
mov rax, qword ptr [r14 + 0x20]
call put_dec
lea rsi, [rip + text_ticks]
call puts
mov rax, qword ptr [r14 + 8]
call put_dec
lea rsi, [rip + text_pages]
call puts
mov rax, qword ptr [r14 + 0x10]
call put_dec
lea rsi, [rip + text_sum]
call puts
mov rax, qword ptr [r14 + 0x18]
call put_hex
call newline
ret
text_start:
string "ticker: started\n"
text_beat:
string "ticker: beat "
text_ok:
string "ticker: OK beats "
text_fail:
string "ticker: FAIL word at "
text_tick:
string "ticker: FAIL tick "
text_period:
string " came in period "
text_ticks:
string " ticks "
text_pages:
string " pages "
text_sum:
string " sum "
