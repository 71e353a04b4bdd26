# The way in and out under Xen PV. See trap/pv.rs for the rules.

.set PV_EVENT, 0x100
.set PV_IF, 0x200
.set HYPERVISOR_IRET, 23
# Where `PerCpu` has the address of this CPU's struct vcpu_info, and what is where in that.
.set PERCPU_VCPU, 8
.set UPCALL_PENDING, 0
.set UPCALL_MASK, 1
# Of a `TrapFrame`: vector, rip, cs, rflags and ss.
.set FRAME_VECTOR, 15 * 8
.set FRAME_RIP, 17 * 8
.set FRAME_CS, 18 * 8
.set FRAME_RFLAGS, 19 * 8
.set FRAME_SS, 21 * 8

.section .text.pv_traps, "ax", @progbits
.code64

# One stub a vector, 16 bytes each.
.balign 16
.globl pv_trap_stubs
pv_trap_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    pop rcx                         # Xen pushes these two on top of the CPU's frame
    pop r11
    .if ((HAS_ERROR_CODE >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp pv_trap_common
    .set vector, vector + 1
    .endr

# Events. Xen has masked them.
.balign 16
.globl pv_event_callback
.type pv_event_callback, @function
pv_event_callback:
    pop rcx
    pop r11
    push 0
    push PV_EVENT

pv_trap_common:
    SAVE_REGISTERS
    cld
pv_trap_again:
    mov rdi, rsp
    mov rbx, rsp                    # callee-saved
    and rsp, -16
    call pv_trap_entry
    mov rsp, rbx
    # Interrupted between unmasking and iretq below? Then leave by Xen, which unmasks and returns in
    # one step: however many events come, that code is never interrupted two deep.
    mov rax, [rsp + FRAME_RIP]
    cmp rax, offset pv_exit_unmasked
    jb 1f
    cmp rax, offset pv_exit_end
    jb pv_exit_by_xen
    # Xen's frames name selectors of ring 0, which iretq cannot load: the kernel goes back to those that it has now.
    # (Under Xen they are the frame's with ring 3; in a process they are the host's, and iretq need not be emulated.)
1:  mov eax, cs
    mov [rsp + FRAME_CS], rax
    mov eax, ss
    mov [rsp + FRAME_SS], rax
    test dword ptr [rsp + FRAME_RFLAGS], PV_IF
    jz 1f                           # events were masked, and stay so
    mov rax, gs:[PERCPU_VCPU]
    mov byte ptr [rax + UPCALL_MASK], 0
pv_exit_unmasked:
    # An event that came while they were masked made no upcall: look. One that comes from here on
    # interrupts this code.
    test byte ptr [rax + UPCALL_PENDING], 0xff
    jnz 2f
1:  RESTORE_REGISTERS
    iretq
2:  mov byte ptr [rax + UPCALL_MASK], 1
pv_exit_end:
    # The frame is still there, and was an event's or becomes one: handle what has come.
    mov qword ptr [rsp + FRAME_VECTOR], PV_EVENT
    jmp pv_trap_again

# struct iret_context on the stack: rax, r11, rcx, flags, then the frame as Xen made it. The hypercall
# page's entry for iret pushes the registers itself, and is jumped to.
pv_exit_by_xen:
    RESTORE_REGISTERS
    push 0
    jmp hypercall_page + 32 * HYPERVISOR_IRET
.size pv_event_callback, . - pv_event_callback

# Xen could not return to the kernel: a segment or address in the frame was bad. Frame: rcx, r11, ds,
# es, fs, gs, then rip ...
.balign 16
.globl pv_failsafe_callback
.type pv_failsafe_callback, @function
pv_failsafe_callback:
    pop rcx
    pop r11
    add rsp, 32
    push 0
    push 13                         # what the CPU would have raised
    jmp pv_trap_common
.size pv_failsafe_callback, . - pv_failsafe_callback
