//! Exceptions of the kernel: what its handlers find on the stack.
// UNSAFETY: provokes exceptions.
#![cfg_attr(target_os = "none", expect(unsafe_code, reason = "provokes exceptions"))]

use alloc::format;
use alloc::string::ToString as _;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{NOT_CANONICAL, Page, READ_ONLY, UNMAPPED, XENS, call, tell};
use crate::probe::{self, Trapped, probe};

guest_test! {
    /// Each exception that an instruction can raise, with events masked on entry and not.
    fn exceptions_of_the_kernel(test) {
        let Some(page) = Page::new(test) else { return };
        for mask in [true, false] {
            let how = if mask { "masking" } else { "plain" };
            tell(format!("exception.{how}.set_trap_table"), probe::install(page, mask));
            let told = |key: &str, (trapped, _): (Trapped, [u64; 3])| tell(format!("exception.{how}.{key}"), trapped);
            told("ud2", probe!([0, 0, 0], "ud2"));
            told("divide", probe!([1, 0, 0], "div ecx"));
            told("int3", probe!([0, 0, 0], "int3"));
            told("int-0x80", probe!([0, 0, 0], "int 0x80"));
            told("nothing", probe!([0, 0, 0], "nop"));
        }
        probe::install(page, true);
        let told = |key: &str, (trapped, _): (Trapped, [u64; 3])| {
            let at = Trapped::address();
            let address = if trapped.vector == Some(14) && at >> 12 == page.pfn() {
                " address of the page".to_string()
            } else if trapped.vector == Some(14) && at >> 40 == 0xff_ff80 {
                " address of its entry".to_string()
            } else if trapped.vector == Some(14) {
                format!(" address {at:#x}")
            } else { alloc::string::String::new() };
            tell(format!("exception.{key}"), format!("{trapped}{address}"));
        };
        told("read-null", probe!([8, 0, 0], "mov rcx, [rax]"));
        told("write-null", probe!([8, 0, 0], "mov [rax], rcx"));
        told("execute-null", probe!([0, 0, 0], "jmp rax"));
        told("read-unmapped", probe!([UNMAPPED, 0, 0], "mov rcx, [rax]"));
        told("write-unmapped", probe!([UNMAPPED, 0, 0], "mov [rax], rcx"));
        told("execute-unmapped", probe!([UNMAPPED, 0, 0], "jmp rax"));
        told("read-xens", probe!([XENS, 0, 0], "mov rcx, [rax]"));
        told("write-xens", probe!([XENS, 0, 0], "mov [rax], rcx"));
        told("execute-xens", probe!([XENS, 0, 0], "jmp rax"));
        told("read-high", probe!([0xffff_c000_0000_0000, 0, 0], "mov rcx, [rax]"));
        told("read-not-canonical", probe!([NOT_CANONICAL, 0, 0], "mov rcx, [rax]"));
        told("execute-not-canonical", probe!([NOT_CANONICAL, 0, 0], "jmp rax"));
        told("stack-not-canonical", probe!([NOT_CANONICAL, 0, 0], "mov rbp, rax", "mov rcx, [rbp]"));
        // Where the entry is differs.
        let (trapped, _) = probe!([0xffff_8000_0000_0000 + page.mfn() * 8, 0, 0], "mov [rax], rcx");
        tell("exception.write-m2p", trapped);
        let (trapped, [_, value, _]) = probe!([0xffff_8000_0000_0000 + page.mfn() * 8, 0, 0], "mov rcx, [rax]");
        tell("exception.read-m2p", format!("{trapped}, right {}", value == page.pfn()));
        page.remap(READ_ONLY);
        told("write-read-only", probe!([page.address(), 0, 0], "mov [rax], rcx"));
        page.remap(1 << 63 | 0x67);
        told("execute-no-execute", probe!([page.address(), 0, 0], "jmp rax"));
        page.remap(0x67);
        // Aligned addresses are wanted when AC is set: PV kernels run in ring 3, where it counts.
        told("not-aligned", probe!([page.address() + 1, 0, 0],
            "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov rcx, [rax]", "pushfq", "and dword ptr [rsp], ~0x40000", "popfq"));
        told("single-step", probe!([0, 0, 0], "pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "nop"));
        tell("exception.single-step.dr6", format!("{:#x}", call(Hypercall::GET_DEBUGREG, &[6])));
        told("bound-like-overflow-of-fpu", probe!([0, 0, 0], "fninit", "fld1", "fldz", "fdivp", "fninit"));
        // TS makes the FPU trap, once.
        call(Hypercall::FPU_TASKSWITCH, &[1]);
        told("fpu-with-ts", probe!([0, 0, 0], "fninit"));
        told("fpu-after", probe!([0, 0, 0], "fninit"));
        call(Hypercall::FPU_TASKSWITCH, &[0]);
    }

    /// Flags in the frame: IOPL as the assists have it.
    fn exceptions_with_iopl(test) {
        let Some(page) = Page::new(test) else { return };
        probe::install(page, true);
        for assist in [0, 1] {
            // `VMASST_TYPE_architectural_iopl`: command 0 enables, 1 disables
            call(Hypercall::VM_ASSIST, &[1 - assist, 4]);
            for iopl in 0..4 {
                page.put_halves(&[iopl]);
                call(Hypercall::PHYSDEV_OP, &[6, page.address()]);
                tell(format!("iopl.assist-{assist}.{iopl}.ud2"), probe!([0, 0, 0], "ud2").0);
                tell(format!("iopl.assist-{assist}.{iopl}.cli"), probe!([0, 0, 0], "cli").0);
                tell(format!("iopl.assist-{assist}.{iopl}.sti"), probe!([0, 0, 0], "sti").0);
                let (trapped, [value, ..]) = probe!([0, 0, 0x3f8], "in al, dx");
                tell(format!("iopl.assist-{assist}.{iopl}.in"), format!("{trapped}, {value:#x}"));
                tell(format!("iopl.assist-{assist}.{iopl}.out"), probe!([0, 0, 0x80], "out dx, al").0);
            }
        }
    }
}
