# What both ways into traps share: the registers of a `TrapFrame` (trap/mod.rs), and which vectors bring an error
# code. Included before each of them, and forgotten behind it (forget.s): the blocks may end up in one unit.

# Vectors for which the CPU, and Xen in its place, pushes an error code: 8, 10-14, 17, 21, 29, 30.
.set HAS_ERROR_CODE, 0x60227d00

# Below an error code and a vector; the last one pushed is the first field.
.macro SAVE_REGISTERS
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
.endm

# With the vector and the error code.
.macro RESTORE_REGISTERS
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
    add rsp, 16
.endm
