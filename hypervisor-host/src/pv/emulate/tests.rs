//! Instructions given as bytes, and what they do to registers and memory.

use super::*;
use crate::pv::cpu::Cpu;
use crate::pv::fake::{cpu, put};

const CODE_AT: u64 = 0x2000;
const GP: Fault = Fault { vector: GENERAL_PROTECTION, error: 0, address: 0 };

/// Runs one instruction that raised #GP; `false`: the guest got it.
fn run(cpu: &mut Cpu, code: &[u8]) -> bool {
    put(cpu, CODE_AT, code);
    cpu.state.registers.rip = CODE_AT;
    match general_protection(cpu, GP) {
        Ok(()) => true,
        Err(Cause::NoHandler(GP)) => false,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn control_and_debug_registers_are_shadows() {
    let (mut cpu, _) = cpu();
    // mov %cr0, %rax
    assert!(run(&mut cpu, &[0x0f, 0x20, 0xc0]));
    assert_eq!((cpu.state.registers.rax, cpu.state.registers.rip), (CR0, CODE_AT + 3));
    // The same with TS: mov %rax, %cr0 ; then clts.
    cpu.state.registers.rax = CR0 | CR0_TS;
    assert!(run(&mut cpu, &[0x0f, 0x22, 0xc0]) && cpu.task_switched);
    assert!(run(&mut cpu, &[0x0f, 0x06]) && !cpu.task_switched);
    // Another flag may not change.
    cpu.state.registers.rax = CR0 & !(1 << 16);
    assert!(!run(&mut cpu, &[0x0f, 0x22, 0xc0]));
    // mov %rbx, %dr0; mov %dr0, %rcx; an address of Xen's is refused.
    cpu.state.registers.rbx = 0x1234;
    assert!(run(&mut cpu, &[0x0f, 0x23, 0xc3]) && run(&mut cpu, &[0x0f, 0x21, 0xc1]));
    assert_eq!(cpu.state.registers.rcx, 0x1234);
    cpu.state.registers.rbx = 0xffff_8000_0000_0000;
    assert!(!run(&mut cpu, &[0x0f, 0x23, 0xc3]));
    // mov %cr3, %rdx
    assert!(run(&mut cpu, &[0x0f, 0x20, 0xda]));
    assert_eq!(cpu.state.registers.rdx, crate::pv::fake::frame(1).0 << 12);
}

#[test]
fn user_mode_may_do_nothing_of_it() {
    let (mut cpu, _) = cpu();
    cpu.state.kernel_mode = false;
    cpu.state.kernel_stack = 0x9000;
    for code in [&[0x0f, 0x20, 0xc0][..], &[0xf4], &[0xfa], &[0x0f, 0x32], &[0x0f, 0x06]] {
        cpu.state.kernel_mode = false;
        assert!(!run(&mut cpu, code), "{code:x?}");
    }
}

#[test]
fn bases_are_read_and_written_by_msr_and_others_are_not() {
    let (mut cpu, _) = cpu();
    let r = &mut cpu.state.registers;
    (r.rcx, r.rax, r.rdx) = (0xc000_0101, 0x5678_9abc, 0x1234);
    assert!(run(&mut cpu, &[0x0f, 0x30]));
    assert_eq!(cpu.state.registers.gs_base, 0x1234_5678_9abc);
    cpu.state.registers.rax = 0;
    assert!(run(&mut cpu, &[0x0f, 0x32]));
    assert_eq!(cpu.state.registers.rax, 0x5678_9abc);
    // Not canonical; no such register.
    cpu.state.registers.rdx = 0x8000_0000;
    assert!(!run(&mut cpu, &[0x0f, 0x30]));
    cpu.state.registers.rcx = 0x1234;
    assert!(!run(&mut cpu, &[0x0f, 0x32]) && !run(&mut cpu, &[0x0f, 0x30]));
}

#[test]
fn the_interrupt_flag_and_ports_need_the_privilege() {
    let (mut cpu, _) = cpu();
    for code in [&[0xfa][..], &[0xfb], &[0xec], &[0xee]] {
        cpu.iopl = 0;
        assert!(!run(&mut cpu, code));
        cpu.iopl = 1;
        assert!(run(&mut cpu, code));
    }
    assert_eq!(cpu.state.registers.rax & 0xff, 0xff);
    // User mode is ring 3, whatever the assist makes of the kernel.
    cpu.state.kernel_stack = 0x9000;
    for (iopl, assist, kernel, allowed) in [
        (1, false, false, false),
        (3, false, false, true),
        (3, true, false, true),
        (2, true, false, false),
        (0, true, true, true),
    ] {
        cpu.domain.set_assist(VmAssist::ARCHITECTURAL_IOPL, assist);
        (cpu.iopl, cpu.state.kernel_mode) = (iopl, kernel);
        assert_eq!(run(&mut cpu, &[0xee]), allowed, "{iopl} {assist} {kernel}");
    }
}

#[test]
fn ports_in_the_guests_bitmap_are_for_its_user_mode() {
    let (mut cpu, _) = cpu();
    cpu.state.kernel_stack = 0x9000;
    // Ports 0x10 and 0x11.
    put(&cpu, 0x6000, &[0xff, 0xff, 0xfc, 0xff]);
    cpu.io_bitmap = (0x6000, 0x18);
    // in %dx, %al and %ax and %eax
    for (code, port, allowed) in [
        (&[0xec][..], 0x10, true),
        (&[0xec], 0x12, false),
        (&[0x66, 0xed], 0x10, true),
        (&[0x66, 0xed], 0x11, false),
        (&[0xed], 0x10, false),
        (&[0xec], 0x17, false),
        (&[0xec], 0xffff, false),
    ] {
        cpu.state.kernel_mode = false;
        cpu.state.registers.rdx = port;
        assert_eq!(run(&mut cpu, code), allowed, "{port:#x}");
    }
    // Of a bitmap that is not there nothing is allowed.
    cpu.io_bitmap = (0, 0x18);
    cpu.state.kernel_mode = false;
    cpu.state.registers.rdx = 0x10;
    assert!(!run(&mut cpu, &[0xec]));
}

#[test]
fn sysenter_goes_to_its_entry_and_forgets_where_it_was() {
    let (mut cpu, _) = cpu();
    let fault = Fault { error: INT_80, ..GP };
    for (entry, frame) in [(0x7000, 0), (0, 8)] {
        cpu.vectors.set_trap(janus_proto::abi::xen::trap::TrapInfo {
            vector: 13,
            flags: 0,
            cs: 0,
            pad0: [0; 4],
            address: 0x7100,
        });
        cpu.vectors.set_sysenter(entry);
        cpu.state.kernel_mode = false;
        cpu.state.kernel_stack = 0x9000;
        // Where the host's kernel leaves a process, which is nowhere of the guest's.
        cpu.state.registers.rip = 0x7f00_0000_0000;
        general_protection(&mut cpu, fault).unwrap();
        assert_eq!(cpu.state.registers.rip, if entry == 0 { 0x7100 } else { entry });
        let pushed: [u64; 5] = cpu.read(cpu.state.registers.rsp + 16 + frame).unwrap();
        assert_eq!((pushed[0], pushed[1] & 0xffff, pushed[3], pushed[4]), (0, 3, 0, 0xe02b));
    }
}

#[test]
fn xens_selectors_are_flat() {
    let (mut cpu, _) = cpu();
    cpu.state.registers.rax = 0xe02b;
    // mov %eax, %ds; mov %eax, %ss
    assert!(run(&mut cpu, &[0x8e, 0xd8]) && run(&mut cpu, &[0x8e, 0xd0]));
    assert_eq!((cpu.state.data[0], cpu.state.ss), (0xe02b, 0xe02b));
    cpu.state.registers.rax = 0x1234;
    assert!(!run(&mut cpu, &[0x8e, 0xd8]));
    // iretq to Xen's code selector.
    cpu.state.registers.rsp = 0x8000;
    let words: [u64; 5] = [0x3000, 0xe033, 0, 0x7000, 0xe02b];
    put(&cpu, 0x8000, &words.map(u64::to_le_bytes).concat());
    assert!(run(&mut cpu, &[0x48, 0xcf]));
    let r = cpu.state.registers;
    assert_eq!((r.rip, r.rsp, r.rflags), (0x3000, 0x7000, 0x202));
    // lretq
    cpu.state.registers.rsp = 0x8000;
    assert!(run(&mut cpu, &[0x48, 0xcb]));
    assert_eq!((cpu.state.registers.rip, cpu.state.registers.rsp), (0x3000, 0x8010));
    cpu.state.registers.rsp = u64::MAX - 3;
    cpu.vectors.clear_traps();
    assert!(!run(&mut cpu, &[0x48, 0xcf]));
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no CPUID")]
fn cpuid_is_asked_for_with_xens_prefix() {
    let (mut cpu, _) = cpu();
    put(&cpu, CODE_AT, &FORCED_CPUID);
    let r = &mut cpu.state.registers;
    (r.rip, r.rax) = (CODE_AT, 0x4000_0000);
    assert!(forced(&mut cpu));
    let r = cpu.state.registers;
    assert_eq!((r.rip, r.rax, r.rbx), (CODE_AT + 7, 0x4000_0005, 0x566e_6558));
    put(&cpu, CODE_AT, &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0x32]);
    cpu.state.registers.rip = CODE_AT;
    assert!(!forced(&mut cpu));
}

#[test]
fn an_int_instruction_goes_to_its_gate() {
    use janus_proto::abi::xen::trap::TrapInfo;
    let (mut cpu, _) = cpu();
    cpu.state.registers.rsp = 0x8000;
    put(&cpu, CODE_AT, &[0xcd, 0x21]);
    cpu.state.registers.rip = CODE_AT;
    let entry = TrapInfo { vector: 0x21, flags: 3, cs: 0, pad0: [0; 4], address: 0x7000 };
    cpu.vectors.set_trap(entry);
    let fault = Fault { error: 0x21 << 3 | 2, ..GP };
    general_protection(&mut cpu, fault).unwrap();
    let pushed: u64 = cpu.read(cpu.state.registers.rsp + 16).unwrap();
    assert_eq!((cpu.state.registers.rip, pushed), (0x7000, CODE_AT + 2));
}

#[test]
fn ordinary_instructions_are_executed_where_a_page_cannot_be() {
    let (mut cpu, _) = cpu();
    cpu.state.registers.rip = CODE_AT;
    // rep stosb, 3 bytes of 0x41 at 0x6000.
    put(&cpu, CODE_AT, &[0xf3, 0xaa, 0x48, 0x83, 0xe8, 0x42, 0x74, 0x10]);
    let r = &mut cpu.state.registers;
    (r.rcx, r.rdi, r.rax) = (3, 0x6000, 0x41);
    let fault = Fault { vector: PAGE_FAULT, error: 6, address: 0x6000 };
    access(&mut cpu, fault).unwrap();
    assert_eq!(cpu.read::<u32>(0x6000).unwrap(), 0x0041_4141);
    assert_eq!((cpu.state.registers.rcx, cpu.state.registers.rdi), (0, 0x6003));
    // sub $0x42, %rax; then je, not taken.
    access(&mut cpu, fault).unwrap();
    assert_eq!(cpu.state.registers.rax, u64::MAX);
    assert_eq!(cpu.state.registers.rflags & 0x8c5, 0x85);
    access(&mut cpu, fault).unwrap();
    assert_eq!(cpu.state.registers.rip, CODE_AT + 8);
}
