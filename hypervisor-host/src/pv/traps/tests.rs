//! The frames that exceptions and events put on a guest's stack.

use super::*;
use crate::pv::fake::{cpu, put};

fn frame(cpu: &Cpu, count: usize) -> Vec<u64> {
    let rsp = cpu.state.registers.rsp;
    (0..count as u64).map(|index| cpu.read(rsp + index * 8).unwrap()).collect()
}

fn ready() -> Cpu {
    let (mut cpu, _) = cpu();
    let r = &mut cpu.state.registers;
    (r.rip, r.rsp, r.rcx, r.r11) = (0x1111, 0x8008, 0xcc, 0x11);
    r.rflags = 0x202 | RFLAGS_TF | RFLAGS_AC;
    cpu
}

fn handler(vector: u8, flags: u8) -> TrapInfo {
    TrapInfo { vector, flags, cs: FLAT_RING3_CS64, pad0: [0; 4], address: 0x7000 }
}

fn value(answer: &Answer) -> i64 {
    let Answer::Value(value) = answer else { panic!("{answer:?}") };
    *value
}

#[test]
fn an_exception_of_the_kernel_is_framed_as_xen_frames_it() {
    let mut cpu = ready();
    cpu.vectors.set_trap(handler(13, 0));
    inject(&mut cpu, Fault { vector: 13, error: 0x18, address: 0 }).unwrap();
    let want = [0xcc, 0x11, 0x18, 0x1111, 0xe030, 0x202 | RFLAGS_TF | RFLAGS_AC, 0x8008, 0xe02b];
    assert_eq!(frame(&cpu, 8), want);
    let r = &cpu.state.registers;
    assert_eq!((r.rip, r.rsp, r.rflags), (0x7000, 0x8000 - 64, 0x202));
    assert!(!cpu.shared().is_masked());
}

#[test]
fn an_interrupt_gate_masks_events_and_saves_the_mask() {
    let mut cpu = ready();
    cpu.vectors.set_trap(handler(3, TI_IF));
    inject(&mut cpu, Fault { vector: 3, error: 0, address: 0 }).unwrap();
    assert!(cpu.shared().is_masked());
    assert_eq!(frame(&cpu, 4)[2..], [0x1111, 0xe030]);
    inject(&mut cpu, Fault { vector: 3, error: 0, address: 0 }).unwrap();
    // Bits 32 to 39 say that they were masked, and IF is clear.
    let second = frame(&cpu, 5);
    assert_eq!((second[3], second[4] & RFLAGS_IF), (1 << 32 | 0xe030, 0));
}

#[test]
fn user_mode_enters_on_the_kernels_stack_and_a_page_fault_says_so() {
    let mut cpu = ready();
    cpu.vectors.set_trap(handler(14, 0));
    cpu.state.kernel_mode = false;
    cpu.state.kernel_stack = 0x9000;
    (cpu.state.registers.gs_base, cpu.state.other_gs_base) = (1, 2);
    inject(&mut cpu, Fault { vector: 14, error: 2, address: 0xdead }).unwrap();
    assert_eq!(frame(&cpu, 5)[2..], [6, 0x1111, 0xe033]);
    assert_eq!(cpu.state.registers.rsp, 0x9000 - 64);
    assert_eq!((cpu.state.registers.gs_base, cpu.state.kernel_mode), (2, true));
    assert_eq!(cpu.shared().info().unwrap()[2].load(std::sync::atomic::Ordering::SeqCst), 0xdead);
}

#[test]
fn a_frame_that_cannot_be_written_or_has_nowhere_to_go_is_a_crash() {
    for stack in [0, 8, 0x20, u64::MAX, 0xffff_8000_0000_1000, 1 << 47, 0x00ff_0000_0000_0000] {
        let mut cpu = ready();
        cpu.vectors.set_trap(handler(13, 0));
        cpu.state.registers.rsp = stack;
        let result = inject(&mut cpu, Fault { vector: 13, error: 0, address: 0 });
        assert!(matches!(result, Err(Cause::BadStack(_))), "{stack:#x} {result:?}");
    }
    let mut cpu = ready();
    assert_eq!(upcall(&mut cpu), Err(Cause::NoEventCallback));
    let fault = Fault { vector: 0, error: 0, address: 0 };
    assert_eq!(inject(&mut cpu, fault), Err(Cause::NoHandler(fault)));
}

#[test]
fn a_return_restores_what_the_frame_says_and_the_mask() {
    let mut cpu = ready();
    let words: [u64; 9] = [1, 2, 3, 0, 0x2222, 0xe030, 0x3202, 0x6000, 0xe02b];
    put(&cpu, 0x8008, &words.map(u64::to_le_bytes).concat());
    cpu.shared().set_masked(true);
    assert!(matches!(iret(&mut cpu, [0; 6]), Answer::Done));
    let r = cpu.state.registers;
    assert_eq!((r.rax, r.r11, r.rcx, r.rip, r.rsp), (1, 2, 3, 0x2222, 0x6000));
    assert_eq!((r.rflags, cpu.state.cs, cpu.state.ss), (0x202, 0xe033, 0xe02b));
    assert!(!cpu.shared().is_masked() && cpu.state.kernel_mode);
    // As sysret does: the two registers hold address and flags.
    let words: [u64; 9] = [1, 2, 3, VGCF_IN_SYSCALL, 0x3333, 0xe033, 0, 0x6000, 0xe02b];
    put(&cpu, 0x6000, &words.map(u64::to_le_bytes).concat());
    assert!(matches!(iret(&mut cpu, [0; 6]), Answer::Done));
    let r = cpu.state.registers;
    assert_eq!((r.rcx, r.r11, cpu.state.kernel_mode), (0x3333, 0x202, false));
    assert!(cpu.shared().is_masked());
    cpu.state.registers.rsp = u64::MAX - 8;
    assert!(matches!(iret(&mut cpu, [0; 6]), Answer::Crash(Cause::BadIret(_))));
}

#[test]
fn a_trap_table_is_read_to_its_end_and_checked() {
    let mut cpu = ready();
    let end = TrapInfo { address: 0, ..handler(0, 0) };
    let bad = TrapInfo { address: 1 << 50, ..handler(9, 0) };
    use zerocopy::IntoBytes as _;
    put(&cpu, 0x5000, [handler(1, 0), handler(255, 7), end, bad].as_bytes());
    assert_eq!(value(&set_trap_table(&mut cpu, [0x5000, 0, 0, 0, 0, 0])), 0);
    assert_eq!((cpu.vectors.trap(255).flags, cpu.vectors.trap(9).address), (7, 0));
    put(&cpu, 0x5020, bad.as_bytes());
    assert_eq!(value(&set_trap_table(&mut cpu, [0x5000, 0, 0, 0, 0, 0])), -22);
    for address in [8, 0x3fff8, u64::MAX] {
        assert_eq!(value(&set_trap_table(&mut cpu, [address, 0, 0, 0, 0, 0])), -14);
    }
    assert_eq!(value(&set_trap_table(&mut cpu, [0; 6])), 0);
    assert_eq!(cpu.vectors.trap(1).address, 0);
}

#[test]
fn software_interrupts_need_a_gate_that_lets_them() {
    let mut cpu = ready();
    assert_eq!(software_interrupt(&mut cpu, 0x80, 2), Ok(false));
    cpu.vectors.set_trap(handler(0x80, 1));
    assert_eq!(software_interrupt(&mut cpu, 0x80, 2), Ok(true));
    assert_eq!(frame(&cpu, 3)[2], 0x1113);
    let mut cpu = ready();
    cpu.vectors.set_trap(handler(0x80, 1));
    cpu.state.kernel_mode = false;
    assert_eq!(software_interrupt(&mut cpu, 0x80, 2), Ok(false));
}

#[test]
fn a_system_call_without_an_entry_is_an_invalid_opcode() {
    let mut cpu = ready();
    cpu.vectors.set_trap(handler(6, 0));
    (cpu.state.kernel_mode, cpu.state.kernel_stack) = (false, 0x9000);
    user_syscall(&mut cpu).unwrap();
    assert_eq!(frame(&cpu, 3)[2], 0x110f);
    let mut cpu = ready();
    (cpu.state.kernel_mode, cpu.state.kernel_stack) = (false, 0x9000);
    cpu.vectors.syscall = Entry { address: 0x7700, mask: true };
    user_syscall(&mut cpu).unwrap();
    let flags = 0x202 | RFLAGS_TF | RFLAGS_AC;
    assert_eq!(frame(&cpu, 5), [0x1111, flags, 0x1111, 0xe033, flags]);
    assert!(cpu.shared().is_masked());
}
