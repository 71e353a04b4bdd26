# The code in a guest's process; see stub.rs. Position independent: it is copied to STUB + CODE.
    .pushsection .rodata.janus_stub, "a", @progbits
    .balign 64
    .globl janus_stub, janus_stub_end, janus_stub_gate_iret, janus_stub_start, janus_stub_system_call
    .hidden janus_stub, janus_stub_end, janus_stub_gate_iret, janus_stub_start, janus_stub_system_call
    .set janus_stub_mailbox, janus_stub + {MAILBOX} - {CODE}

# --- The guest's side of the gate: everything is in registers, and an interrupted instruction can be repeated.
# Called: rax is the number, the return address is on the guest's stack; rcx and r11 are lost, as after `syscall`.
janus_stub:
    lea rcx, [rax - {XEN_VERSION}]          # the guest's flags must stay as they are
    jrcxz 2f
1:  pop rcx
    jmp .Lstub_inside
2:  mov ecx, edi
    jrcxz 3f                                # XENVER_version
    jmp 1b
3:  mov rcx, [rip + janus_stub_mailbox + {INFO}]
    jrcxz 1b
    movzx ecx, byte ptr [rcx]               # evtchn_upcall_pending: a hypercall lets events in
    jrcxz 4f
    jmp 1b
4:  mov eax, {VERSION}
    ret

# Jumped to, with struct iret_context on the stack: rax, r11, rcx, flags, then the frame. Back into the kernel itself, with
# nothing pending, it is the guest's own affair. An event that comes in here interrupts it as any code of the guest's.
janus_stub_gate_iret:
    mov rcx, [rip + janus_stub_mailbox + {INFO}]
    test rcx, rcx
    jz 1f
    cmp word ptr [rsp + 40], {KERNEL_CS}
    jne 1f
    cmp word ptr [rsp + 64], {KERNEL_SS}
    jne 1f
    test dword ptr [rsp + 24], {IN_SYSCALL}
    jnz 1f
    cmp byte ptr [rcx], 0                   # evtchn_upcall_pending
    jne 1f
    mov r11d, 1
    test dword ptr [rsp + 48], 0x200        # IF
    jz 2f
    xor r11d, r11d
2:  xchg [rcx + 1], r11b                    # evtchn_upcall_mask, before the second look
    test dword ptr [rsp + 48], 0x200
    jz 3f
    cmp byte ptr [rcx], 0
    jne 4f
3:  mov qword ptr [rsp + 40], {USER_CS}
    mov qword ptr [rsp + 64], {USER_SS}
    pop rax
    pop r11
    pop rcx
    lea rsp, [rsp + 8]
    iretq
4:  mov byte ptr [rcx + 1], 1
1:  lea rcx, [rip + janus_stub_gate_iret]

# --- Inside: a kick that comes here is written down, and seen before the guest runs again.
.Lstub_inside:
    mov [rip + janus_stub_mailbox + {RSP}], rsp
    mov [rip + janus_stub_mailbox + {RIP}], rcx
    lea rsp, [rip + janus_stub_mailbox + {STACK_END}]
    pushfq
    pop [rip + janus_stub_mailbox + {RFLAGS}]
    push 2                                  # no AC, no DF, no TF
    popfq
    mov [rip + janus_stub_mailbox + {FRAME} + 8*0], r15
    mov [rip + janus_stub_mailbox + {FRAME} + 8*1], r14
    mov [rip + janus_stub_mailbox + {FRAME} + 8*2], r13
    mov [rip + janus_stub_mailbox + {FRAME} + 8*3], r12
    mov [rip + janus_stub_mailbox + {FRAME} + 8*4], rbp
    mov [rip + janus_stub_mailbox + {FRAME} + 8*5], rbx
    mov [rip + janus_stub_mailbox + {FRAME} + 8*6], r11
    mov [rip + janus_stub_mailbox + {FRAME} + 8*7], r10
    mov [rip + janus_stub_mailbox + {FRAME} + 8*8], r9
    mov [rip + janus_stub_mailbox + {FRAME} + 8*9], r8
    mov [rip + janus_stub_mailbox + {FRAME} + 8*10], rax
    mov [rip + janus_stub_mailbox + {FRAME} + 8*11], rcx
    mov [rip + janus_stub_mailbox + {FRAME} + 8*12], rdx
    mov [rip + janus_stub_mailbox + {FRAME} + 8*13], rsi
    mov [rip + janus_stub_mailbox + {FRAME} + 8*14], rdi
    rdfsbase rax
    mov [rip + janus_stub_mailbox + {FS_BASE}], rax
    rdgsbase rax
    mov [rip + janus_stub_mailbox + {GS_BASE}], rax
    mov dword ptr [rip + janus_stub_mailbox + {KIND}], {HYPERCALL}
.Lstub_exit:
    mov qword ptr [rip + janus_stub_mailbox + {FRAME_FPU}], 0
.Lstub_exit_again:
    call .Lstub_hand_over
    jmp .Lstub_tail
.Lstub_was_kicked:
    mov dword ptr [rip + janus_stub_mailbox + {KICKED}], 0
    mov dword ptr [rip + janus_stub_mailbox + {KIND}], {WAS_KICKED}
    lea rsp, [rip + janus_stub_mailbox + {STACK_END}]
    jmp .Lstub_exit_again

# Gives the turn away, and returns when the guest is to run. Uses rax, rcx, rdx, rsi, rdi, r8 to r13.
.Lstub_hand_over:
    mov dword ptr [rip + janus_stub_mailbox + {TURN}], {OURS}
    mov eax, 202                            # futex
    lea rdi, [rip + janus_stub_mailbox + {TURN}]
    mov esi, 1                              # FUTEX_WAKE
    mov edx, 1
    syscall
janus_stub_system_call:
2:  cmp dword ptr [rip + janus_stub_mailbox + {TURN}], {OURS}
    jne 3f
    mov eax, 202
    lea rdi, [rip + janus_stub_mailbox + {TURN}]
    xor esi, esi                            # FUTEX_WAIT
    mov edx, {OURS}
    xor r10d, r10d
    syscall
    jmp 2b
3:  mov r12d, [rip + janus_stub_mailbox + {OPS}]
    test r12d, r12d
    jz 6f
    lea r13, [rip + janus_stub_mailbox + {OP}]
4:  mov rdi, [r13]
    mov rsi, [r13 + 8]
    mov rdx, [r13 + 16]
    mov eax, 11                             # munmap
    test rdx, rdx
    js 5f
    mov eax, 9                              # mmap
    mov r10d, 0x11                          # MAP_SHARED | MAP_FIXED
    mov r8d, 3                              # the guest's memory
    mov r9, [r13 + 24]
5:  syscall
    cmp rax, -4095
    jae 8f
    add r13, {OP_SIZE}
    dec r12d
    jnz 4b
    mov dword ptr [rip + janus_stub_mailbox + {OPS}], 0
6:  mov eax, [rip + janus_stub_mailbox + {COMMAND}]
    test eax, eax
    jnz 7f
    ret
7:  test eax, {SAVE_FPU}
    jz 9f
    mov eax, -1
    mov edx, -1
    xsave64 [rip + janus_stub_mailbox + {FPU}]
9:  mov dword ptr [rip + janus_stub_mailbox + {KIND}], {DONE}
    jmp .Lstub_hand_over
8:  mov [rip + janus_stub_mailbox + {ERROR}], rax
    mov [rip + janus_stub_mailbox + {OPS}], r12d
    mov dword ptr [rip + janus_stub_mailbox + {KIND}], {FAILED}
    jmp .Lstub_hand_over

# --- The tail: it only reads, so that whoever interrupts it finds the guest in the mailbox.
.Lstub_tail:
    cmp dword ptr [rip + janus_stub_mailbox + {KICKED}], 0
    jne .Lstub_was_kicked
    mov rax, [rip + janus_stub_mailbox + {FS_BASE}]
    wrfsbase rax
    mov rax, [rip + janus_stub_mailbox + {GS_BASE}]
    wrgsbase rax
    lea rsp, [rip + janus_stub_mailbox + {FRAME}]
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
    iretq
.Lstub_tail_end:

# --- Signals: edi number, rsi information, rdx context; all of them are blocked in here.
.Lstub_handler:
    pushfq                                  # Linux leaves AC set
    and qword ptr [rsp], -0x40501
    popfq
    mov rbx, rdx
    mov rcx, [rbx + 168]                    # rip
    lea rax, [rip + .Lstub_tail_end]
    cmp rcx, rax
    jae .Lstub_guest
    lea rax, [rip + .Lstub_inside]
    cmp rcx, rax
    jb .Lstub_guest
    lea rax, [rip + .Lstub_tail]
    cmp rcx, rax
    jae .Lstub_in_tail
    cmp edi, 10                             # SIGUSR1
    jne .Lstub_guest
    mov dword ptr [rip + janus_stub_mailbox + {KICKED}], 1
    jmp .Lstub_return
.Lstub_in_tail:
    call .Lstub_cause
    jmp .Lstub_signal_exit
.Lstub_guest:
    call .Lstub_cause
    mov rax, [rbx + 96]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*0], rax
    mov rax, [rbx + 88]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*1], rax
    mov rax, [rbx + 80]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*2], rax
    mov rax, [rbx + 72]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*3], rax
    mov rax, [rbx + 120]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*4], rax
    mov rax, [rbx + 128]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*5], rax
    mov rax, [rbx + 64]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*6], rax
    mov rax, [rbx + 56]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*7], rax
    mov rax, [rbx + 48]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*8], rax
    mov rax, [rbx + 40]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*9], rax
    mov rax, [rbx + 144]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*10], rax
    mov rax, [rbx + 152]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*11], rax
    mov rax, [rbx + 136]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*12], rax
    mov rax, [rbx + 112]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*13], rax
    mov rax, [rbx + 104]
    mov [rip + janus_stub_mailbox + {FRAME} + 8*14], rax
    mov rax, [rbx + 168]
    mov [rip + janus_stub_mailbox + {RIP}], rax
    mov rax, [rbx + 176]
    mov [rip + janus_stub_mailbox + {RFLAGS}], rax
    mov rax, [rbx + 160]
    mov [rip + janus_stub_mailbox + {RSP}], rax
    rdfsbase rax
    mov [rip + janus_stub_mailbox + {FS_BASE}], rax
    rdgsbase rax
    mov [rip + janus_stub_mailbox + {GS_BASE}], rax
.Lstub_signal_exit:
    mov rax, [rbx + 224]
    mov [rip + janus_stub_mailbox + {FRAME_FPU}], rax
    mov dword ptr [rip + janus_stub_mailbox + {KIND}], {BY_SIGNAL}
    call .Lstub_hand_over
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*0]
    mov [rbx + 96], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*1]
    mov [rbx + 88], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*2]
    mov [rbx + 80], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*3]
    mov [rbx + 72], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*4]
    mov [rbx + 120], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*5]
    mov [rbx + 128], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*6]
    mov [rbx + 64], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*7]
    mov [rbx + 56], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*8]
    mov [rbx + 48], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*9]
    mov [rbx + 40], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*10]
    mov [rbx + 144], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*11]
    mov [rbx + 152], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*12]
    mov [rbx + 136], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*13]
    mov [rbx + 112], rax
    mov rax, [rip + janus_stub_mailbox + {FRAME} + 8*14]
    mov [rbx + 104], rax
    mov rax, [rip + janus_stub_mailbox + {RIP}]
    mov [rbx + 168], rax
    mov rax, [rip + janus_stub_mailbox + {RFLAGS}]
    mov [rbx + 176], rax
    mov rax, [rip + janus_stub_mailbox + {RSP}]
    mov [rbx + 160], rax
    movabs rax, 0x002b000000000033          # cs and ss of user mode
    mov [rbx + 184], rax
    mov rax, [rip + janus_stub_mailbox + {FS_BASE}]
    wrfsbase rax
    mov rax, [rip + janus_stub_mailbox + {GS_BASE}]
    wrgsbase rax
.Lstub_return:
    mov rsp, rbx
    mov eax, 15                             # rt_sigreturn
    syscall

# Writes the signal's cause into the mailbox; rsi information, rbx context. Uses rax.
.Lstub_cause:
    mov [rip + janus_stub_mailbox + {SIGNAL}], edi
    mov eax, [rsi + 8]
    mov [rip + janus_stub_mailbox + {SIGNAL_CODE}], eax
    mov eax, [rsi + 28]
    mov [rip + janus_stub_mailbox + {ARCH}], eax
    mov rax, [rbx + 200]
    mov [rip + janus_stub_mailbox + {TRAP}], rax
    mov rax, [rbx + 192]
    mov [rip + janus_stub_mailbox + {TRAP_ERROR}], rax
    mov rax, [rbx + 216]
    mov [rip + janus_stub_mailbox + {ADDRESS}], rax
    ret

# --- The start. No stack, no library: r15 counts the steps, and is the exit status when one fails.
    .macro janus_stub_step number
    mov eax, \number
    inc r15d
    syscall
    cmp rax, -4095
    jae .Lstub_failed
    .endm
    .macro janus_stub_action signal
    mov edi, \signal
    lea rsi, [rip + .Lstub_action]
    xor edx, edx
    mov r10d, 8
    janus_stub_step 13                      # rt_sigaction
    .endm
janus_stub_start:
    xor r15d, r15d
    lea rdi, [rip + janus_stub_mailbox]     # 1: the mailbox
    mov esi, {MAILBOX_SIZE}
    mov edx, 3
    mov r10d, 0x11
    mov r8d, {MAILBOX_FD}
    xor r9d, r9d
    janus_stub_step 9
    xor edi, edi                            # 2: nothing below
    movabs rsi, {STUB}
    janus_stub_step 11
    movabs rdi, {STUB} + 0x1000000          # 3: nothing above
    movabs rsi, 0x7ffffffff000 - {STUB} - 0x1000000
    janus_stub_step 11
    mov edi, {MAILBOX_FD}                   # 4: no file but the memory
    mov esi, -1
    xor edx, edx
    janus_stub_step 436                     # close_range
    mov edi, 1                              # 5: PR_SET_PDEATHSIG
    mov esi, 9
    janus_stub_step 157
    janus_stub_step 110                     # 6: getppid
    cmp eax, [rip + janus_stub_mailbox + {PARENT}]
    jne .Lstub_failed
    lea rdi, [rip + .Lstub_signal_stack]    # 7
    xor esi, esi
    janus_stub_step 131                     # sigaltstack
    janus_stub_action 4                     # 8: SIGILL
    janus_stub_action 5                     # SIGTRAP
    janus_stub_action 7                     # SIGBUS
    janus_stub_action 8                     # SIGFPE
    janus_stub_action 10                    # SIGUSR1
    janus_stub_action 11                    # SIGSEGV
    janus_stub_action 31                    # 14: SIGSYS
    mov edi, 2                              # 15: SIG_SETMASK
    lea rsi, [rip + .Lstub_nothing]
    xor edx, edx
    mov r10d, 8
    janus_stub_step 14                      # rt_sigprocmask
    lea rdi, [rip + .Lstub_robust]          # 16
    mov esi, 24
    janus_stub_step 273                     # set_robust_list
    mov edi, 15                             # 17: PR_SET_NAME
    lea rsi, [rip + .Lstub_name]
    janus_stub_step 157
    mov edi, 1                              # 18: SECCOMP_SET_MODE_FILTER
    xor esi, esi
    lea rdx, [rip + janus_stub + {FILTER} - {CODE}]
    janus_stub_step 317                     # seccomp
    lea rsp, [rip + janus_stub_mailbox + {STACK_END}]
    mov dword ptr [rip + janus_stub_mailbox + {KIND}], {READY}
    jmp .Lstub_exit
.Lstub_failed:
    mov edi, r15d
    mov eax, 231                            # exit_group
    syscall
    ud2

.Lstub_name:
    .asciz "janus-guest"
    .balign 8
.Lstub_nothing:
    .quad 0
.Lstub_action:                              # struct sigaction of the kernel
    .quad {STUB} + {CODE} + (.Lstub_handler - janus_stub)
    .quad 0x0c000004                        # SA_SIGINFO | SA_ONSTACK | SA_RESTORER
    .quad {STUB} + {CODE} + (.Lstub_return - janus_stub)
    .quad -1
.Lstub_signal_stack:                        # stack_t
    .quad {STUB} + {MAILBOX} + {SIGNAL_STACK}
    .quad 0
    .quad {SIGNAL_STACK_SIZE}
.Lstub_robust:                              # struct robust_list_head, and a list of one: the turn
    .quad {STUB} + {CODE} + (.Lstub_robust_turn - janus_stub)
    .quad {MAILBOX} + {TURN} - {CODE} - (.Lstub_robust_turn - janus_stub)
    .quad 0
.Lstub_robust_turn:
    .quad {STUB} + {CODE} + (.Lstub_robust - janus_stub)
janus_stub_end:
    .popsection
