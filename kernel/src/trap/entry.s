# Entry stubs of all 256 vectors, 16 bytes apart, and the common path that builds a `TrapFrame`.

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
    .elseif ((HAS_ERROR_CODE >> trap_vector) & 1) == 0
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
    SAVE_REGISTERS
    cld
    mov rdi, rsp
    call trap_entry
    RESTORE_REGISTERS
    iretq
.size trap_common, . - trap_common
