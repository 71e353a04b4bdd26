//! User mode: the ways in, and the ways out.
// UNSAFETY: returns to user mode by a frame of its own.
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "returns to user mode by a frame of its own")
)]

use alloc::format;

use janus_boot::Protocol;
use janus_kernel::test::Test;
use janus_kernel::{boot_info, guest_test};
use janus_proto::abi::xen::Hypercall;

use crate::ask::{NOT_CANONICAL, Page, READ_ONLY, SELF, call, tell};
use crate::probe::{self, Trapped, probe};

/// Gives the CPU a page table for user mode that shows what the kernel's does, and a stack for the kernel.
fn prepare(test: &mut Test, page: Page) -> bool {
    let (Some(root), Some(stack)) = (Page::new(test), Page::new(test)) else { return false };
    let Some(Protocol::XenPv(info)) = boot_info().map(|info| info.protocol) else {
        test.error("not started by the PV door");
        return false;
    };
    root.put(&[crate::operands::read(info.pt_base)]);
    root.remap(READ_ONLY);
    page.put(&[3, root.mfn(), 0, 15, root.mfn(), 0]);
    let tables = call(Hypercall::MMUEXT_OP, &[page.address(), 2, 0, SELF]);
    let switch = call(Hypercall::STACK_SWITCH, &[0xe02b, stack.address() + 4096]);
    if tables != 0 || switch != 0 {
        test.error(format!("user mode cannot be prepared: {tables}, {switch}"));
        return false;
    }
    probe::install(page, true);
    true
}

/// Goes to user mode, executes instructions there, and comes back by whatever they raise, at the latest by `ud2`.
macro_rules! in_user_mode {
    ([$rax:expr, $rflags:expr], $($instruction:literal),+ $(,)?) => {
        probe!([$rax, $rflags, 0],
            "push 0xe02b", "lea rsi, [rsp + 8]", "push rsi", "push rcx", "push 0xe033", "lea rsi, [rip + 4f]", "push rsi",
            "push 0", "push rcx", "push r11", "push rax", "mov eax, 23",
            "lea rsi, [rip + 4f]", "mov [conformance_start], rsi",
            "syscall", "4:", $($instruction,)+ "ud2")
    };
}

guest_test! {
    /// Instructions of user mode, and what the kernel finds.
    fn user_mode_traps(test) {
        let Some(page) = Page::new(test) else { return };
        if !prepare(test, page) {
            return;
        }
        let told = |key: &str, (trapped, _): (Trapped, [u64; 3])| tell(format!("user.{key}"), trapped);
        told("ud2", in_user_mode!([0, 0x202], "nop"));
        told("int3", in_user_mode!([0, 0x202], "int3"));
        told("masked", in_user_mode!([0, 0x002], "nop"));
        told("iopl-flags", in_user_mode!([0, 0x3202], "nop"));
        told("nested-flags", in_user_mode!([0, 0x4202], "nop"));
        told("cli", in_user_mode!([0, 0x202], "cli"));
        told("hlt", in_user_mode!([0, 0x202], "hlt"));
        told("in", in_user_mode!([0, 0x202], "in al, 0x80"));
        told("read-cr0", in_user_mode!([0, 0x202], "mov rax, cr0"));
        told("rdmsr", in_user_mode!([0, 0x202], "rdmsr"));
        told("int-0x80", in_user_mode!([0, 0x202], "int 0x80"));
        told("read-null", in_user_mode!([8, 0x202], "mov rcx, [rax]"));
        told("write-null", in_user_mode!([8, 0x202], "mov [rax], rcx"));
        told("read-xens", in_user_mode!([crate::ask::XENS, 0x202], "mov rcx, [rax]"));
        told("read-not-canonical", in_user_mode!([NOT_CANONICAL, 0x202], "mov rcx, [rax]"));
        told("syscall-without-entry", in_user_mode!([0, 0x202], "syscall"));
        // `CALLBACKTYPE_syscall`; the flags are in the upper half.
        page.put(&[2, probe::syscall_entry()]);
        tell("user.register-syscall", call(Hypercall::CALLBACK_OP, &[0, page.address()]));
        told("syscall", in_user_mode!([0, 0x202], "syscall"));
        page.put(&[2 | 1 << 16, probe::syscall_entry()]);
        tell("user.register-syscall-masking", call(Hypercall::CALLBACK_OP, &[0, page.address()]));
        told("syscall-masking", in_user_mode!([0, 0x202], "syscall"));
        for (iopl, key) in [(1, "iopl-1"), (3, "iopl-3")] {
            page.put_halves(&[iopl]);
            call(Hypercall::PHYSDEV_OP, &[6, page.address()]);
            told(&format!("{key}.cli"), in_user_mode!([0, 0x202], "cli"));
            told(&format!("{key}.in"), in_user_mode!([0, 0x202], "in al, 0x80"));
            told(&format!("{key}.kernel-cli"), probe!([0, 0, 0], "cli"));
        }
    }
}
