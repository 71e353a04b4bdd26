# The native doors: PVH, multiboot 1 and 2 (32-bit, paging off) and Linux (64-bit).
# Each says where it was entered before anything can go wrong, loads the boot page tables (4 GiB,
# identity, 2 MiB pages) and calls `native_start(door, argument, magic)` on the boot stack.

.set COM1, 0x3f8
.set DEBUGCON, 0xe9

# esi = zero-terminated text, to the debug console and COM1. Assembles for both modes; takes no
# stack. Clobbers eax, ecx, edx, esi. COM1 is skipped where nothing answers (LSR all ones).
.macro EARLY_PRINT
1:  mov cl, byte ptr [esi]
    test cl, cl
    jz 4f
    mov al, cl
    out DEBUGCON, al
    mov edx, COM1 + 5
    in al, dx
    cmp al, 0xff
    je 3f
    mov ah, 0xff                            # bounded wait for an empty transmitter
2:  test al, 0x20
    jnz 2f
    in al, dx
    dec ah
    jnz 2b
2:  mov al, cl
    mov edx, COM1
    out dx, al
3:  inc esi
    jmp 1b
4:
.endm

# Is there memory up to the image's end, and is the image still in it? What is not there reads as
# something else than what was written; and firmware that has little memory (SeaBIOS keeps its own
# code at memory's end) runs over what a loader put there before it. Goes on, with the last word zero
# as bss must be, or to `to`. Clobbers eax.
.macro NEED_MEMORY to:req
    mov eax, 0x6a616e75
    cmp dword ptr [load_mark], eax
    jne \to
    cmp dword ptr [boot_pd + 8], 0x2000e3   # the image's own 2 MiB
    jne \to
    cmp dword ptr [image_end - 4], 0
    jne \to
    mov dword ptr [image_end - 4], eax
    cmp dword ptr [image_end - 4], eax
    jne \to
    mov dword ptr [image_end - 4], 0
.endm

# The machine ends as crashed: isa-debug-exit with code 6, then the keyboard controller's reset.
.macro GIVE_UP
    mov al, 0x16
    out 0xf4, al
    mov al, 0xfe
    out 0x64, al
5:  hlt
    jmp 5b
.endm

.section .head.text, "ax", @progbits

.code32
# PVH (xen/include/public/arch-x86/hvm/start_info.h): ebx = hvm_start_info.
.balign 16
.globl pvh_entry
.type pvh_entry, @function
pvh_entry:
    cli
    cld
    mov ebp, 1
    xor edi, edi
    mov esi, offset text_pvh
    jmp protected_mode
.size pvh_entry, . - pvh_entry

# Multiboot: eax = loader's magic, ebx = information structure.
.balign 16
.globl multiboot_entry
.type multiboot_entry, @function
multiboot_entry:
    cli
    cld
    mov edi, eax
    mov ebp, 2
    mov esi, offset text_multiboot1
    cmp eax, 0x36d76289
    jne protected_mode
    mov ebp, 3
    mov esi, offset text_multiboot2
.size multiboot_entry, . - multiboot_entry

# In: esi = text, ebp = door, ebx = argument, edi = magic; all but esi are kept.
.type protected_mode, @function
protected_mode:
    EARLY_PRINT
    NEED_MEMORY too_little_memory
    mov esp, offset boot_stack_top
    # Is there a 64-bit mode at all? cpuid clobbers ebx: park it.
    mov esi, ebx
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000001
    jb no_long_mode
    mov eax, 0x80000001
    cpuid
    bt edx, 29
    jnc no_long_mode
    mov ebx, esi
    xor esi, esi
    bt edx, 20                              # NX
    rcl esi, 1
    shl esi, 11                             # EFER.NXE
    or esi, 0x100                           # EFER.LME

    mov eax, 0x20                           # CR4.PAE, all else off
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, esi
    xor edx, edx
    wrmsr
    mov eax, 0x80010033                     # PG, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    push 0x08
    mov eax, offset long_mode
    push eax
    retf
.size protected_mode, . - protected_mode

no_long_mode:
    mov esi, offset text_no_long_mode
    EARLY_PRINT
    GIVE_UP

too_little_memory:
    mov esi, offset text_too_little_memory
    EARLY_PRINT
    GIVE_UP

.code64
# Linux (Documentation/arch/x86/boot.rst, 64-bit boot protocol): rsi = boot_params, identity-mapped
# by tables that are the loader's.
.balign 16
.globl linux64_entry
.type linux64_entry, @function
linux64_entry:
    cli
    cld
    mov rbx, rsi
    mov ebp, 4
    xor edi, edi
    mov esi, offset text_linux64
    EARLY_PRINT
    NEED_MEMORY too_little_memory_64
    mov eax, 0x80000001
    mov r8, rbx                             # cpuid clobbers ebx
    cpuid
    mov rbx, r8
    xor esi, esi
    bt edx, 20                              # NX
    rcl esi, 1
    shl esi, 11
    mov ecx, 0xc0000080
    rdmsr
    or eax, esi
    wrmsr
    mov eax, 0x20
    mov cr4, rax
    mov eax, offset boot_pml4
    mov cr3, rax
    mov eax, 0x80010033
    mov cr0, rax
    mov esp, offset boot_stack_top
    lgdt [boot_gdt_pointer]
    push 0x08
    mov eax, offset long_mode
    push rax
    retfq
too_little_memory_64:
    mov esi, offset text_too_little_memory
    EARLY_PRINT
    GIVE_UP
.size linux64_entry, . - linux64_entry

# ebp = door, rbx = argument, edi = magic.
.type long_mode, @function
long_mode:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset boot_stack_top
    mov edx, edi
    mov edi, ebp
    mov rsi, rbx
    xor ebp, ebp                            # ends the chain of frames
    call native_start
    ud2
.size long_mode, . - long_mode

# In the first page: these must be there even when memory ends inside the image.
.section .head.text, "ax", @progbits
text_pvh:           .asciz "janus: entered by PVH\n"
text_multiboot1:    .asciz "janus: entered by multiboot 1\n"
text_multiboot2:    .asciz "janus: entered by multiboot 2\n"
text_linux64:       .asciz "janus: entered by Linux 64-bit\n"
text_too_little_memory: .asciz "janus: cannot start: too little memory for the kernel's image (it ends in it, or the firmware overwrote it)\n"
text_no_long_mode:  .asciz "janus: this CPU has no 64-bit mode\n"

.section .data.boot, "aw", @progbits
.balign 4096
.globl boot_pml4
boot_pml4:
    .quad boot_pdpt + 0x63                  # present, writable, accessed, dirty
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x0063
    .quad boot_pd + 0x1063
    .quad boot_pd + 0x2063
    .quad boot_pd + 0x3063
    .fill 508, 8, 0
.globl boot_pd
boot_pd:
    .set frame, 0
    .rept 2048
    .quad (frame << 21) + 0xe3              # and 2 MiB
    .set frame, frame + 1
    .endr

.balign 16
.globl boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff                # 0x08: 64-bit code
    .quad 0x00cf93000000ffff                # 0x10: data
    .quad 0, 0                              # 0x18: TSS of the early exception stack
boot_gdt_end:
.balign 8
    .short 0, 0, 0
boot_gdt_pointer:                           # a 32-bit lgdt reads the first 6 bytes only
    .short boot_gdt_end - boot_gdt - 1
    .quad boot_gdt
