//! Instructions that a PV kernel may not execute, and that Xen does for it, or does not.
// UNSAFETY: executes privileged instructions.
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "executes privileged instructions, all of which trap")
)]

use alloc::format;

use janus_kernel::guest_test;

use crate::ask::{NOT_CANONICAL, Page, tell};
use crate::probe::{self, Trapped, probe};

fn told(key: &str, (trapped, [rax, ..]): (Trapped, [u64; 3])) {
    match trapped.vector {
        Some(_) => tell(format!("instruction.{key}"), trapped),
        None => tell(format!("instruction.{key}"), format!("{rax:#x}")),
    }
}

/// Of an instruction whose value says something of the CPU: only whether it traps.
fn traps(key: &str, (trapped, _): (Trapped, [u64; 3])) {
    tell(format!("instruction.{key}"), trapped);
}

/// Registers of the CPU's model whose value is the same everywhere.
const KNOWN: [u32; 9] =
    [0x8b, 0x1d9, 0x277, 0xc000_0080, 0xc000_0100, 0xc000_0102, 0x1b, 0x17, 0x4000_0000];
/// Those of which only is asked whether they are there.
const OTHERS: [u32; 36] = [
    0x10,
    0x3a,
    0x48,
    0x49,
    0xc1,
    0xce,
    0xcd,
    0xfe,
    0x10a,
    0x122,
    0x140,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x186,
    0x1a0,
    0x1a2,
    0x1b0,
    0x200,
    0x250,
    0x2ff,
    0x345,
    0x400,
    0x480,
    0x6e0,
    0x802,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0103,
    0xc001_0015,
    0xc001_001f,
    0xc001_0114,
    0x4000_0001,
];

guest_test! {
    /// Control and debug registers, and what is about descriptors and caches.
    fn instructions_of_a_kernel(test) {
        let Some(page) = Page::new(test) else { return };
        probe::install(page, true);
        told("read-cr0", probe!([0, 0, 0], "mov rax, cr0"));
        traps("read-cr2", probe!([0, 0, 0], "mov rax, cr2"));
        traps("read-cr3", probe!([0, 0, 0], "mov rax, cr3"));
        // PAE, MCE?, PGE, and those that a guest can change.
        let (trapped, [cr4, ..]) = probe!([0, 0, 0], "mov rax, cr4");
        tell("instruction.read-cr4", format!("{trapped} {:#x}", cr4 & 0x2c));
        told("read-cr8", probe!([0, 0, 0], "mov rax, cr8"));
        let (_, [cr0, ..]) = probe!([0, 0, 0], "mov rax, cr0");
        traps("write-cr0-same", probe!([cr0, 0, 0], "mov cr0, rax"));
        traps("write-cr0-ts", probe!([cr0 | 8, 0, 0], "mov cr0, rax"));
        told("read-cr0-with-ts", probe!([0, 0, 0], "mov rax, cr0"));
        traps("clts", probe!([0, 0, 0], "clts"));
        told("read-cr0-after-clts", probe!([0, 0, 0], "mov rax, cr0"));
        traps("write-cr0-without-paging", probe!([cr0 & !(1 << 31), 0, 0], "mov cr0, rax"));
        traps("write-cr0-without-wp", probe!([cr0 & !(1 << 16), 0, 0], "mov cr0, rax"));
        traps("write-cr2", probe!([0x1234, 0, 0], "mov cr2, rax"));
        told("read-cr2-written", probe!([0, 0, 0], "mov rax, cr2"));
        traps("write-cr3-0", probe!([0, 0, 0], "mov cr3, rax"));
        traps("write-cr4-same", probe!([cr4, 0, 0], "mov cr4, rax"));
        traps("write-cr4-de", probe!([cr4 | 8, 0, 0], "mov cr4, rax"));
        traps("write-cr4-without-pae", probe!([cr4 & !0x20, 0, 0], "mov cr4, rax"));
        traps("write-cr4-vmx", probe!([cr4 | 1 << 13, 0, 0], "mov cr4, rax"));
        traps("write-cr4-same-again", probe!([cr4, 0, 0], "mov cr4, rax"));
        traps("write-cr8", probe!([0, 0, 0], "mov cr8, rax"));
        told("read-dr0", probe!([0, 0, 0], "mov rax, dr0"));
        told("read-dr6", probe!([0, 0, 0], "mov rax, dr6"));
        told("read-dr7", probe!([0, 0, 0], "mov rax, dr7"));
        traps("write-dr0", probe!([0x1000, 0, 0], "mov dr0, rax"));
        told("read-dr0-written", probe!([0, 0, 0], "mov rax, dr0"));
        traps("write-dr0-xens", probe!([crate::ask::XENS, 0, 0], "mov dr0, rax"));
        traps("write-dr7-33-bits", probe!([1 << 32, 0, 0], "mov dr7, rax"));
        traps("write-dr7-detect", probe!([0x2000, 0, 0], "mov dr7, rax"));
        traps("write-dr6-0", probe!([0, 0, 0], "mov dr6, rax"));
        told("read-dr6-written", probe!([0, 0, 0], "mov rax, dr6"));
        told("smsw-reads", probe!([0, 0, 0], "xor eax, eax", "clts"));
        traps("invlpg", probe!([page.address(), 0, 0], "invlpg [rax]"));
        traps("invd", probe!([0, 0, 0], "invd"));
        traps("wbinvd", probe!([0, 0, 0], "wbinvd"));
        traps("lgdt", probe!([page.address(), 0, 0], "lgdt [rax]"));
        traps("lidt", probe!([page.address(), 0, 0], "lidt [rax]"));
        traps("lldt", probe!([0, 0, 0], "lldt ax"));
        traps("ltr", probe!([0, 0, 0], "ltr ax"));
        traps("lmsw", probe!([cr0, 0, 0], "lmsw ax"));
        traps("sysret", probe!([0, 0, 0], "sysretq"));
        traps("sysexit", probe!([0, 0, 0], "sysexitq"));
        traps("monitor", probe!([page.address(), 0, 0], "monitor"));
        traps("mwait", probe!([0, 0, 0], "mwait"));
        traps("xsetbv-0", probe!([0, 0, 0], "xsetbv"));
        traps("rdpmc", probe!([0, 0, 0], "rdpmc"));
        traps("vmcall", probe!([0, 0, 0], "vmcall"));
        traps("vmmcall", probe!([0, 0, 0], "vmmcall"));
        traps("swapgs-twice", probe!([0, 0, 0], "swapgs", "swapgs"));
        traps("iretq-garbage", probe!([0, 0, 0], "push 0x1234", "push rsp", "push 2", "push 0x1234", "push rax", "iretq"));
        for (name, selector) in [("0", 0), ("3", 3), ("0x1234", 0x1234), ("0xe02b", 0xe02b), ("0xe008", 0xe008), ("0xe038", 0xe038)] {
            told(&format!("load-ds.{name}"), probe!([selector, 0, 0], "mov ds, eax", "mov eax, ds"));
            told(&format!("load-es.{name}"), probe!([selector, 0, 0], "mov es, eax", "mov eax, es"));
            told(&format!("load-fs.{name}"), probe!([selector, 0, 0], "mov fs, eax", "mov eax, fs"));
            traps(&format!("load-ss.{name}"), probe!([selector, 0, 0], "mov ss, eax", "mov eax, 0xe02b", "mov ss, eax"));
        }
        let _ = probe!([0, 0, 0], "mov ds, eax", "mov es, eax", "mov fs, eax");
        told("read-cs", probe!([0, 0, 0], "mov eax, cs"));
        told("read-ss", probe!([0, 0, 0], "mov eax, ss"));
        told("lar-0xe033", probe!([0xe033, 0, 0], "lar eax, ax", "and eax, 0xffff00"));
        told("verw-0xe02b", probe!([0xe02b, 0, 0], "verw ax", "setz al", "movzx eax, al"));
    }

    /// Model-specific registers.
    fn instructions_of_registers(test) {
        let Some(page) = Page::new(test) else { return };
        probe::install(page, true);
        for index in KNOWN {
            let (trapped, [low, _, high]) = probe!([0, index.into(), 0], "rdmsr");
            tell(format!("rdmsr.{index:#x}"), format!("{trapped} {:#x}", high << 32 | low));
        }
        for index in OTHERS {
            traps(&format!("rdmsr.{index:#x}"), probe!([0, index.into(), 0], "rdmsr"));
        }
        for index in KNOWN.into_iter().chain(OTHERS) {
            // Nothing that would take.
            traps(&format!("wrmsr.{index:#x}"), probe!([0xffff_ffff, index.into(), 0x7fff_ffff], "wrmsr"));
        }
        for (name, base) in [("low", 0x1000), ("xens", crate::ask::XENS), ("not-canonical", NOT_CANONICAL), ("0", 0)] {
            traps(&format!("wrmsr.fs-base.{name}"), probe!([base & 0xffff_ffff, 0xc000_0100, base >> 32], "wrmsr"));
            traps(&format!("wrmsr.kernel-gs-base.{name}"), probe!([base & 0xffff_ffff, 0xc000_0102, base >> 32], "wrmsr"));
        }
    }

    /// CPUID with Xen's prefix.
    fn instructions_of_cpuid(test) {
        let Some(page) = Page::new(test) else { return };
        probe::install(page, true);
        for leaf in [0x4000_0000_u64, 0x4000_0001, 0x4000_0002, 0x4000_0004, 0x4000_0005, 0x4000_0006, 0x4000_0100] {
            let (trapped, [a, c, d]) = probe!([leaf, 0, 0], "ud2", ".ascii \"xen\"", "cpuid");
            tell(format!("cpuid.{leaf:#x}"), format!("{trapped} {a:#x} {c:#x} {d:#x}"));
        }
        // Features that say whether there is a hypervisor, and that this is a PV guest: hypervisor, x2APIC; and those
        // that no PV guest has: VME, PSE, PGE, MTRR, SEP.
        let (trapped, [_, c, d]) = probe!([1, 0, 0], "ud2", ".ascii \"xen\"", "cpuid");
        tell("cpuid.1", format!("{trapped} {:#x} {:#x}", c & (1 << 31 | 1 << 5 | 1 << 3), d & (1 << 1 | 1 << 3 | 1 << 13 | 1 << 12 | 1 << 11)));
        let (_, [_, c, d]) = probe!([0x8000_0001, 0, 0], "ud2", ".ascii \"xen\"", "cpuid");
        // SVM, SKINIT; syscall, NX, long mode, RDTSCP, 1 GiB pages.
        tell("cpuid.0x80000001", format!("{:#x} {:#x}", c & (1 << 2 | 1 << 12), d & (1 << 11 | 1 << 20 | 1 << 29 | 1 << 26)));
        traps("forced.rdmsr", probe!([0, 0x1b, 0], "ud2", ".ascii \"xen\"", "rdmsr"));
        traps("forced.nop", probe!([0, 0, 0], "ud2", ".ascii \"xen\"", "nop"));
        traps("prefix.cut", probe!([0, 0, 0], "ud2", ".ascii \"xe\"", "nop"));
    }
}
