; Counts in a register and in memory, and says so now and then.
;
;   parameter 0: stop at this count (0: never)     parameter 1: report when count & parameter is 0
;   [6000] the count in memory      [6008] a checksum over all counts

include lib/boot.s
org 0x8f00
.quad 0
.quad 0xfffff

bits 64
org 0x9000
jmp start
include lib/runtime.s

start:
call set_up
mov r12, qword ptr [r14 + PARAMS]
mov r13, qword ptr [r14 + PARAMS + 8]
mov rdi, r14
xor ebx, ebx                ; the count
xor ebp, ebp                ; the checksum
count:
inc rbx
add qword ptr [rdi], 1
rol rbp, 5
xor rbp, rbx
mov qword ptr [rdi + 8], rbp
test rbx, r13
jz report
cmp rbx, r12
jne count
finish:
lea rsi, [rip + text_ok]
call puts
mov rax, rbx
call put_dec
lea rsi, [rip + text_sum]
call puts
mov rax, rbp
call put_hex
call newline
jmp exit_ok
report:
cmp qword ptr [rdi], rbx
jne damaged
lea rsi, [rip + text_count]
call puts
mov rax, rbx
call put_dec
lea rsi, [rip + text_sum]
call puts
mov rax, rbp
call put_hex
call newline
cmp rbx, r12
jne count
jmp finish
damaged:
lea rsi, [rip + text_fail]
call puts
mov rax, qword ptr [rdi]
call put_dec
call newline
jmp exit_fail
text_count:
string "counter: "
text_ok:
string "counter: OK "
text_fail:
string "counter: FAIL memory says "
text_sum:
string " sum "
