# From a start-up interrupt to 64-bit mode. Copied to a page below 1 MiB: everything it names is by absolute address in
# the image, or by its place in the page.

.set EFER, 0xc0000080
.set EFER_LME_NXE, 0x900
.set CR4_PAE, 0x20
# As the boot doors: PG, WP, NE, ET, MP, PE.
.set CR0_LONG, 0x80010033

.section .rodata.smp, "a", @progbits
.code16
.balign 16
.globl smp_trampoline
smp_trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    mov eax, CR4_PAE
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, EFER
    mov eax, EFER_LME_NXE
    xor edx, edx
    wrmsr
    .byte 0x66, 0x0f, 0x01, 0x16            # lgdt with a 32-bit base
    .short smp_trampoline_gdt - smp_trampoline
    mov eax, CR0_LONG                       # protection and paging in one step: 64-bit mode from the next jump on
    mov cr0, eax
    .byte 0x66, 0xea                        # jmp far, 32-bit offset
    .long smp_secondary_entry
    .short 0x08
.balign 4
smp_trampoline_gdt:
    .short 3 * 8 - 1
    .long boot_gdt
.globl smp_trampoline_end
smp_trampoline_end:

.section .text.smp, "ax", @progbits
.code64
.balign 16
.type smp_secondary_entry, @function
smp_secondary_entry:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rax, [SMP_START]
    mov cr3, rax
    mov rax, [SMP_START + 8]
    mov cr4, rax
    mov rax, [SMP_START + 16]
    mov cr0, rax
    mov rsp, [SMP_START + 24]
    mov rdi, [SMP_START + 32]
    xor ebp, ebp                            # ends the chain of frames
    call smp_secondary_start_native
    ud2
.size smp_secondary_entry, . - smp_secondary_entry
