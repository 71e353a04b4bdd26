# The way back from an exception that was provoked: everything about it is written down, and the code that provoked it
# goes on behind itself. See probe.rs.

.section .text.conformance_traps, "ax", @progbits
.code64
.balign 16
.globl conformance_stubs
conformance_stubs:
    .set conformance_vector, 0
    .rept 256
    .balign 32
    mov qword ptr [conformance_record], conformance_vector
    jmp conformance_common
    .set conformance_vector, conformance_vector + 1
    .endr

# A system call of the user mode's.
.balign 16
.globl conformance_syscall
conformance_syscall:
    mov qword ptr [conformance_record], 0x100
    jmp conformance_common

conformance_common:
    mov rsi, rsp
    lea rdi, [conformance_record + 8]
    mov ecx, 8
    cld
    rep movsq
    mov rsp, [conformance_stack]
    jmp qword ptr [conformance_resume]

.section .bss.conformance, "aw", @nobits
.balign 16
# vector, then what Xen pushed: rcx, r11, error code if there is one, rip, cs and mask, flags, rsp, ss
.globl conformance_record
conformance_record:
    .skip 9 * 8
.globl conformance_stack
conformance_stack:
    .skip 8
.globl conformance_resume
conformance_resume:
    .skip 8
.globl conformance_start
conformance_start:
    .skip 8
