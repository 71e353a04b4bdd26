# Early exception stubs: native and PV forms meet in one frame (`exception::Frame`).

# Vectors for which the CPU pushes an error code: 8, 10-14, 17, 21, 29, 30.
.set HAS_ERROR_CODE, 0x60227d00

.macro EARLY_STUB vector:req, pv:req
    .balign 16
    .if \pv
    pop rcx                                 # Xen PV pushes these two on top of the CPU's frame
    pop r11
    .endif
    .if ((HAS_ERROR_CODE >> \vector) & 1) == 0
    push 0
    .endif
    push \vector
    jmp early_exception_common
.endm

.section .text.early_exceptions, "ax", @progbits
.code64
.balign 16
.globl early_stubs_native
early_stubs_native:
    .set vector, 0
    .rept 32
    EARLY_STUB vector, 0
    .set vector, vector + 1
    .endr
.balign 16
.globl early_stubs_pv
early_stubs_pv:
    .set vector, 0
    .rept 32
    EARLY_STUB vector, 1
    .set vector, vector + 1
    .endr

.type early_exception_common, @function
early_exception_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    and rsp, -16
    call early_exception
    ud2
.size early_exception_common, . - early_exception_common
