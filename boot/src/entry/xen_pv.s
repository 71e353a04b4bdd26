# The Xen PV door: 64-bit, ring 3, paging on, rsi = start_info, and a stack that Xen chose.
.section .head.text, "ax", @progbits
.code64
.balign 16
.globl xen_pv_entry
.type xen_pv_entry, @function
xen_pv_entry:
    cld
    mov rdi, rsi
    mov esp, offset boot_stack_top
    xor ebp, ebp
    call xen_pv_start
    ud2
.size xen_pv_entry, . - xen_pv_entry
