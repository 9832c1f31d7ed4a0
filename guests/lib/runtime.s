; What the guests share in 64-bit mode. R15 holds the LAPIC's address throughout, R14 that of the data (6000):
; keystone makes an absolute [address] RIP-relative, silently, so everything has a base register.

LAPIC = 0xfee00000
LAPIC_EOI = 0xb0
LAPIC_TPR = 0x80
LAPIC_SVR = 0xf0
LAPIC_ISR = 0x100
LAPIC_IRR = 0x200
LAPIC_ESR = 0x280
LAPIC_ICR = 0x300
LAPIC_LVT_TIMER = 0x320
LAPIC_LVT_ERROR = 0x370
LAPIC_INITIAL = 0x380
LAPIC_CURRENT = 0x390
LAPIC_DIVIDE = 0x3e0

putc:                       ; AL to the serial port; an absent port reads FF and takes everything
push rcx
push rdx
mov cl, al
mov edx, 0x3fd
putc_wait:
in al, dx
test al, 0x20
jz putc_wait
mov edx, 0x3f8
mov al, cl
out dx, al
pop rdx
pop rcx
ret

puts:                       ; the zero-terminated text at RSI
push rax
puts_next:
mov al, byte ptr [rsi]
inc rsi
test al, al
jz puts_done
call putc
jmp puts_next
puts_done:
pop rax
ret

put_dec:                    ; RAX in decimal
push rax
push rcx
push rdx
push rbx
mov ebx, 10
xor ecx, ecx
put_dec_digit:
xor edx, edx
div rbx
push rdx
inc ecx
test rax, rax
jnz put_dec_digit
put_dec_print:
pop rax
add al, 0x30
call putc
dec ecx
jnz put_dec_print
pop rbx
pop rdx
pop rcx
pop rax
ret

put_hex:                    ; RAX as 16 hexadecimal digits
push rax
push rcx
push rdx
mov rdx, rax
mov ecx, 16
put_hex_digit:
rol rdx, 4
mov eax, edx
and eax, 15
cmp al, 10
jb put_hex_print
add al, 0x27
put_hex_print:
add al, 0x30
call putc
dec ecx
jnz put_hex_digit
pop rdx
pop rcx
pop rax
ret

newline:
push rax
mov al, 10
call putc
pop rax
ret

exit_ok:
xor eax, eax
jmp exit
exit_fail:
mov eax, 1
exit:                       ; isa-debug-exit gives (EAX << 1) | 1; where it is absent, halt for good
mov edx, 0xf4
out dx, al
exit_halt:
cli
hlt
jmp exit_halt

set_gate:                   ; vector EDI -> handler RAX, IST index ESI; an interrupt gate, DPL 0
push rdi
push rdx
shl edi, 4
add edi, IDT
mov word ptr [rdi], ax
mov word ptr [rdi + 2], CODE64
mov byte ptr [rdi + 4], sil
mov byte ptr [rdi + 5], 0x8e
mov rdx, rax
shr rdx, 16
mov word ptr [rdi + 6], dx
shr rdx, 16
mov dword ptr [rdi + 8], edx
mov dword ptr [rdi + 12], 0
pop rdx
pop rdi
ret

set_up:                     ; IDT with every exception unexpected, PIC masked, LAPIC on
mov r15d, LAPIC
mov r14d, DATA
xor edi, edi
lea rax, [rip + unexpected]
xor esi, esi
set_up_gate:
call set_gate
inc edi
cmp edi, 32
jne set_up_gate
mov edi, 0xff
lea rax, [rip + spurious]
call set_gate
mov edi, 0x6fe0
mov word ptr [rdi], 0xfff
mov qword ptr [rdi + 2], IDT
lidt [rdi]
mov al, 0xff
out 0x21, al
out 0xa1, al
mov dword ptr [r15 + LAPIC_SVR], 0x1ff
mov dword ptr [r15 + LAPIC_TPR], 0
ret

spurious:
iretq

unexpected:                 ; an exception that nobody asked for
mov rbp, rsp
lea rsi, [rip + unexpected_text]
call puts
mov rax, qword ptr [rbp]
call put_hex
mov al, 0x20
call putc
mov rax, qword ptr [rbp + 8]
call put_hex
call newline
jmp exit_fail
unexpected_text:
string "FAIL unexpected exception, stack "
