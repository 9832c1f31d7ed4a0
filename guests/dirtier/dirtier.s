; Dirties pages in a pattern, and checks each page before it is written.
;
;   parameter 0: pattern, 0 sequential, 1 random, 2 a hot set (7 of 8 writes go to the first eighth)
;   1: pages in all (a power of two)   2: writes between two reports   3: reports until the end (0: never)
;
;   [6000] writes   [6008] reports   counts of the pages from 100000 on, 8 bytes each; the pages from 200000 on
;
; A page holds the count of its writes in its first word, the count mixed with the page's number in
; word 256, and the complement in its last word.

include lib/boot.s
org 0x8f00
.quad 0
.quad 1024
.quad 65536
.quad 0

COUNTS = 0x100000
PAGES = 0x200000

bits 64
org 0x9000
jmp start
include lib/runtime.s

start:
call set_up
mov r13, 0x2545f4914f6cdd1d ; the random state
mov r12, qword ptr [r14 + PARAMS + 8]
dec r12                     ; mask of page numbers
next_write:
mov rbx, qword ptr [r14]
cmp qword ptr [r14 + PARAMS], 0
je chosen
mov rax, r13                ; xorshift64
shl rax, 13
xor r13, rax
mov rax, r13
shr rax, 7
xor r13, rax
mov rax, r13
shl rax, 17
xor r13, rax
mov rbx, r13
cmp qword ptr [r14 + PARAMS], 1
je chosen
mov rax, rbx                ; hot: seven times out of eight only an eighth of the pages
shr rax, 60
and eax, 7
jz chosen
mov rax, r12
shr rax, 3
and rbx, rax
chosen:
and rbx, r12
mov rdi, rbx
shl rdi, 12
add rdi, PAGES
mov rax, qword ptr [COUNTS + rbx * 8]
test rax, rax
jz fresh
cmp qword ptr [rdi], rax
jne damaged
mov rdx, rax
mov rcx, 0x9e3779b97f4a7c15
imul rdx, rcx
xor rdx, rbx
cmp qword ptr [rdi + 0x800], rdx
jne damaged
not rax
cmp qword ptr [rdi + 0xff8], rax
jne damaged
not rax
fresh:
inc rax
mov qword ptr [COUNTS + rbx * 8], rax
mov qword ptr [rdi], rax
mov rcx, 0x9e3779b97f4a7c15
mov rdx, rax
imul rdx, rcx
xor rdx, rbx
mov qword ptr [rdi + 0x800], rdx
not rax
mov qword ptr [rdi + 0xff8], rax
inc qword ptr [r14]
mov rax, qword ptr [r14]
xor edx, edx
div qword ptr [r14 + PARAMS + 16]
test rdx, rdx
jnz next_write
inc qword ptr [r14 + 8]
lea rsi, [rip + text_report]
call puts
call numbers
mov rax, qword ptr [r14 + 8]
cmp rax, qword ptr [r14 + PARAMS + 24]
jne next_write
lea rsi, [rip + text_ok]
call puts
call numbers
jmp exit_ok

numbers:
mov rax, qword ptr [r14]
call put_dec
lea rsi, [rip + text_state]
call puts
mov rax, r13
call put_hex
call newline
ret

damaged:
lea rsi, [rip + text_fail]
call puts
mov rax, rbx
call put_dec
call newline
jmp exit_fail
text_report:
string "dirtier: writes "
text_ok:
string "dirtier: OK writes "
text_state:
string " state "
text_fail:
string "dirtier: FAIL page "
