# The stack that every door ends on, with a page below it that the Rust side unmaps.
.section .bss.boot, "aw", @nobits
.balign 4096
.globl boot_stack_guard
boot_stack_guard:
    .skip 4096
.globl boot_stack_bottom
boot_stack_bottom:
    .skip 64 * 1024
.globl boot_stack_top
boot_stack_top:
# The stack of early exceptions: a fault on the boot stack must still be able to report itself.
    .skip 8 * 1024
.globl exception_stack_top
exception_stack_top:
