# What loaders look for in the file: multiboot 1 and 2 headers, Xen's ELF notes.

# --- Multiboot 1 -------------------------------------------------------------------------------
# Address form (flags bit 16): QEMU looks for this header before the PVH note, and refuses a plain
# one in an ELF64 ("Cannot load x86-64 image"). The form asks for one contiguous load, so file
# offsets and addresses must run in step over all three segments.
.section .head.multiboot, "a", @progbits
.balign 8
multiboot1_header:
    .long 0x1badb002                        # magic
    .long 0x00010003                        # page-aligned modules, memory map, address fields
    .long -(0x1badb002 + 0x00010003)        # checksum
    .long multiboot1_header                 # header_addr
    .long image_start                       # load_addr
    .long load_end                          # load_end_addr
    .long image_end                         # bss_end_addr
    .long multiboot_entry                   # entry_addr

# --- Multiboot 2 -------------------------------------------------------------------------------
# No EFI entry tag: GRUB leaves the boot services and enters in 32-bit protected mode on both
# firmwares, so that one door serves both.
.balign 8
multiboot2_header:
    .long 0xe85250d6                        # magic
    .long 0                                 # i386, 32-bit protected mode
    .long multiboot2_end - multiboot2_header
    .long -(0xe85250d6 + (multiboot2_end - multiboot2_header))
.balign 8
1:  .short 1, 0                             # information request
    .long 2f - 1b
    .long 1, 3, 6                           # command line, modules, memory map
2:
.balign 8
1:  .short 2, 0                             # address
    .long 2f - 1b
    .long multiboot2_header                 # header_addr
    .long image_start                       # load_addr
    .long load_end                          # load_end_addr
    .long image_end                         # bss_end_addr
2:
.balign 8
1:  .short 3, 0                             # entry address: e_entry is the 64-bit Linux door
    .long 2f - 1b
    .long multiboot_entry
2:
.balign 8
1:  .short 6, 0                             # modules page-aligned
    .long 2f - 1b
2:
.balign 8
    .short 0, 0                             # end
    .long 8
multiboot2_end:

# --- Xen's notes -------------------------------------------------------------------------------
# xen/include/public/elfnote.h
.macro XEN_NOTE type:req, kind:req, value:vararg
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 2f - 1f                           # name size
    .long 4f - 3f                           # descriptor size
    .long \type
1:  .asciz "Xen"
2:  .balign 4
3:  \kind \value
4:  .balign 4
    .popsection
.endm

XEN_NOTE  6, .asciz, "janus"                # GUEST_OS
XEN_NOTE  7, .asciz, "0.1"                  # GUEST_VERSION
XEN_NOTE  5, .asciz, "xen-3.0"              # XEN_VERSION: the one ABI name there is
XEN_NOTE  8, .asciz, "generic"              # LOADER
XEN_NOTE  3, .quad, 0                       # VIRT_BASE: virtual = pseudo-physical
XEN_NOTE  4, .quad, 0                       # PADDR_OFFSET: p_paddr is an address already
XEN_NOTE  1, .quad, xen_pv_entry            # ENTRY
XEN_NOTE  2, .quad, hypercall_page          # HYPERCALL_PAGE: a host may put a faster gate there
XEN_NOTE 18, .quad, pvh_entry               # PHYS32_ENTRY
XEN_NOTE  9, .asciz, "yes"                  # PAE_MODE
XEN_NOTE 14, .long, 1                       # SUSPEND_CANCEL: a cancelled suspend returns 1
# FEATURES, what is asked for: nothing is required.
XEN_NOTE 10, .asciz, "pae_pgdir_above_4gb"
# SUPPORTED_FEATURES, what the kernel can live with (features.h): pae_pgdir_above_4gb (4),
# mmu_pt_update_preserve_ad (5), hvm_callback_vector (8), dom0 (11), linux_rsdp_unrestricted (15).
# Page tables are never written directly under PV, so writable_page_tables (0) is not among them;
# without dom0 Xen refuses the image as its first domain, and with it the smoke test needs no Linux.
XEN_NOTE 17, .long, (1 << 4) | (1 << 5) | (1 << 8) | (1 << 11) | (1 << 15)

# Filled by the hypervisor at load under PV: 128 entries of 32 bytes. Never executed elsewhere.
.section .hypercall_page, "ax", @progbits
.balign 4096
.globl hypercall_page
hypercall_page:
    .fill 4096, 1, 0xcc
