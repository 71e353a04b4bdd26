# Entry stubs of all 256 vectors, 16 bytes apart, and the common path that builds a `TrapFrame`.

# Vectors for which the CPU pushes an error code: 8, 10-14, 17, 21, 29, 30.
.set TRAP_HAS_ERROR_CODE, 0x60227d00

.section .text.trap, "ax", @progbits
.code64
.balign 16
.globl trap_stubs
trap_stubs:
.set trap_vector, 0
.rept 256
    .balign 16
    .if trap_vector >= 32
    push 0
    .elseif ((TRAP_HAS_ERROR_CODE >> trap_vector) & 1) == 0
    push 0
    .endif
    push trap_vector
    jmp trap_common
    .set trap_vector, trap_vector + 1
.endr

# On entry: the CPU's frame, an error code and the vector; rsp is a multiple of 16 (the CPU aligned
# it before its frame of 48 bytes, and 8 + 15 * 8 follow).
.balign 16
.globl trap_common
.type trap_common, @function
trap_common:
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    call trap_entry
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    add rsp, 16                             # vector and error code
    iretq
.size trap_common, . - trap_common
