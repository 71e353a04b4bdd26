# A loader of Linux's 64-bit boot protocol, as small as it can be: what Firecracker does without
# PVH. A multiboot 1 program that QEMU starts with -kernel; its first module is the ELF64 under test, its
# second one becomes the ramdisk. It loads the ELF's segments at their addresses, makes up a
# boot_params from the multiboot information, and enters e_entry in 64-bit mode with page tables
# of its own. Built by `as --32` and `ld -m elf_i386 -Ttext 0x1000000` (high: QEMU puts modules right
# behind it, and the image goes to 2 MiB).
.intel_syntax noprefix
.set BOOT_PARAMS, 0x90000
.set TABLES, 0x80000                        # PML4, PDPT, four page directories: 24 KiB

.section .text
.balign 4
    .long 0x1badb002, 0x00000003, -(0x1badb002 + 0x00000003)

.globl _start
_start:
    cli
    cld
    mov esp, offset stack_top
    mov ebp, ebx                            # multiboot information
    # boot_params, zeroed.
    mov edi, BOOT_PARAMS
    xor eax, eax
    mov ecx, 1024
    rep stosd
    mov word ptr [BOOT_PARAMS + 0x1fe], 0xaa55
    mov dword ptr [BOOT_PARAMS + 0x202], 0x53726448     # "HdrS"
    mov word ptr [BOOT_PARAMS + 0x206], 0x020c
    mov byte ptr [BOOT_PARAMS + 0x210], 0xff            # type_of_loader
    # The command line, without the file name that QEMU puts first.
    mov esi, [ebp + 16]
1:  mov al, [esi]
    test al, al
    jz 2f
    inc esi
    cmp al, ' '
    jne 1b
2:  mov [BOOT_PARAMS + 0x228], esi
    # The second module is the ramdisk.
    mov esi, [ebp + 24]
    cmp dword ptr [ebp + 20], 2
    jb 3f
    mov eax, [esi + 16]
    mov [BOOT_PARAMS + 0x218], eax
    mov ecx, [esi + 20]
    sub ecx, eax
    mov [BOOT_PARAMS + 0x21c], ecx
3:  # The memory map, which has the same entries behind a size field.
    mov esi, [ebp + 48]
    mov edx, [ebp + 44]
    add edx, esi
    mov edi, BOOT_PARAMS + 0x2d0
4:  cmp esi, edx
    jae 5f
    lodsd
    mov ecx, 5
    rep movsd
    inc byte ptr [BOOT_PARAMS + 0x1e8]
    jmp 4b
5:  # The ELF's PT_LOAD segments.
    mov ebx, [ebp + 24]
    mov ebx, [ebx]
    movzx edx, word ptr [ebx + 56]          # e_phnum
    mov ebp, [ebx + 32]
    add ebp, ebx                            # e_phoff
6:  cmp dword ptr [ebp], 1
    jne 7f
    mov esi, [ebp + 8]
    add esi, ebx
    mov edi, [ebp + 24]                     # p_paddr
    mov ecx, [ebp + 32]                     # p_filesz
    rep movsb
    mov ecx, [ebp + 40]                     # p_memsz
    sub ecx, [ebp + 32]
    xor eax, eax
    rep stosb
7:  add ebp, 56
    dec edx
    jnz 6b
    mov eax, [ebx + 24]                     # e_entry
    mov [entry], eax
    # Identity map of 4 GiB.
    mov edi, TABLES
    xor eax, eax
    mov ecx, 2048
    rep stosd
    mov dword ptr [TABLES], TABLES + 0x1003
    mov edi, TABLES + 0x1000
    mov eax, TABLES + 0x2003
8:  mov [edi], eax
    add edi, 8
    add eax, 0x1000
    cmp eax, TABLES + 0x6003
    jb 8b
    mov edi, TABLES + 0x2000
    mov eax, 0x83
    mov ecx, 2048
9:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add edi, 8
    add eax, 0x200000
    loop 9b
    mov eax, 0x20
    mov cr4, eax
    mov eax, TABLES
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    lgdt [gdt_pointer]
    mov esi, BOOT_PARAMS
    mov eax, [entry]
    push 0x10                               # __BOOT_CS
    push eax
    retf

.section .data
entry:  .long 0
.balign 8
gdt:    .quad 0, 0
        .quad 0x00af9b000000ffff            # 0x10: 64-bit code
        .quad 0x00cf93000000ffff            # 0x18: data
gdt_pointer:
        .short gdt_pointer - gdt - 1
        .long gdt

.section .bss
        .skip 4096
stack_top:
