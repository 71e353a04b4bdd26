//! Instructions that a process may not execute, and a PV guest may: decoded and done as Xen's `emul-priv-op.c` does.
//!
//! Native execution raises #GP at them. Also here: Xen's selectors, which a process does not have, and the
//! forced-emulation prefix `ud2; "xen"` of CPUID.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use janus_proto::abi::xen::VmAssist;
use janus_proto::abi::xen::trap::{FLAT_RING3_CS64, FLAT_RING3_SS64};

use super::cpu::Cpu;
use super::operand;
use super::report::Cause;
use super::traps::{self, GENERAL_PROTECTION, PAGE_FAULT};
use super::{cpuid, msr, sched, segments};
use crate::engine::Fault;

/// The longest instruction.
const LONGEST: usize = 15;
/// `ud2; .ascii "xen"`, then the instruction: only CPUID.
const FORCED_CPUID: [u8; 7] = [0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2];
/// Of an error code: the selector is a vector, in the virtual IDT.
const ERROR_IDT: u32 = 2;
/// The error code of `int 0x80`, by which the engine also tells of a `sysenter`: that leaves nothing of where it was.
const INT_80: u32 = 0x80 << 3 | ERROR_IDT;
/// CR0 as a guest sees it: PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 0x8005_0033;
const CR0_TS: u64 = 1 << 3;
/// The selectors that mean the flat segments: Xen's in ring 0 to 3, and the host's own.
const CODE: [u16; 3] = [FLAT_RING3_CS64, 0xe030, 0x33];
const DATA: [u16; 4] = [FLAT_RING3_SS64, 0xe028, 0x2b, 0];

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Done: go on behind it.
    Next,
    /// Done, `rip` included.
    Jumped,
    /// Not for the guest: it gets its exception.
    Refused,
}

/// The bytes at the instruction pointer, as far as they are there.
fn fetch(cpu: &Cpu, buf: &mut [u8; LONGEST]) -> usize {
    let rip = cpu.state.registers.rip;
    if cpu.read_bytes(rip, buf).is_ok() {
        return LONGEST;
    }
    // Up to the end of its page.
    let left = usize::try_from(4096 - rip % 4096).unwrap_or(0).min(LONGEST);
    match buf.get_mut(..left).map(|part| cpu.read_bytes(rip, part)) {
        Some(Ok(())) => left,
        _ => 0,
    }
}

pub(super) fn decode(cpu: &Cpu) -> Option<Instruction> {
    let mut buf = [0; LONGEST];
    let count = fetch(cpu, &mut buf);
    let code = buf.get(..count)?;
    let mut decoder = Decoder::with_ip(64, code, cpu.state.registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// A #GP: emulates, or delivers it.
pub(crate) fn general_protection(cpu: &mut Cpu, fault: Fault) -> Result<(), Cause> {
    let instruction = decode(cpu);
    if fault.error == INT_80 && instruction.is_none_or(|found| found.mnemonic() != Mnemonic::Int) {
        // Linux takes the stack pointer from rbp, and rbp from that stack (`do_SYSENTER_32`).
        cpu.state.registers.rbp = cpu.state.registers.rsp;
        return traps::sysenter(cpu);
    }
    let outcome = match instruction {
        Some(instruction) if fault.error & 3 == ERROR_IDT => {
            let vector = u8::try_from(fault.error >> 3 & 0xff).unwrap_or(0);
            let length = instruction.len() as u64;
            if traps::software_interrupt(cpu, vector, length)? {
                Outcome::Jumped
            } else {
                Outcome::Refused
            }
        }
        Some(instruction) => emulate(cpu, &instruction),
        None => Outcome::Refused,
    };
    match outcome {
        Outcome::Jumped => Ok(()),
        Outcome::Refused => traps::inject(cpu, fault),
        Outcome::Next => Ok(()),
    }
}

/// A #UD: CPUID behind the prefix that asks for emulation; `false`: something else.
pub(crate) fn forced(cpu: &mut Cpu) -> bool {
    let mut code = [0; FORCED_CPUID.len()];
    let rip = cpu.state.registers.rip;
    if cpu.read_bytes(rip, &mut code).is_err() || code != FORCED_CPUID {
        return false;
    }
    do_cpuid(cpu);
    cpu.state.registers.rip = rip.wrapping_add(code.len() as u64);
    true
}

fn do_cpuid(cpu: &mut Cpu) {
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let registers = &cpu.state.registers;
    let (leaf, subleaf) = (low(registers.rax), low(registers.rcx));
    const OSXSAVE: u64 = 1 << 18;
    let time = cpu.domain.clock.info();
    let answer = cpuid::leaf(leaf, subleaf, &time, cpu.cr4 & OSXSAVE != 0);
    let [eax, ebx, ecx, edx] = answer.map(u64::from);
    let registers = &mut cpu.state.registers;
    (registers.rax, registers.rbx, registers.rcx, registers.rdx) = (eax, ebx, ecx, edx);
}

fn emulate(cpu: &mut Cpu, instruction: &Instruction) -> Outcome {
    let done = match instruction.mnemonic() {
        Mnemonic::Cpuid => {
            do_cpuid(cpu);
            Some(Outcome::Next)
        }
        Mnemonic::Cli | Mnemonic::Sti | Mnemonic::In | Mnemonic::Out => ports(cpu, instruction),
        _ if !cpu.state.kernel_mode => None,
        _ => privileged(cpu, instruction).or_else(|| selectors(cpu, instruction)),
    };
    let outcome = done.unwrap_or(Outcome::Refused);
    if outcome == Outcome::Next {
        cpu.state.registers.rip = instruction.next_ip();
    }
    outcome
}

/// Whether ports and the interrupt flag are this mode's own affair (`iopl_ok`).
fn iopl_allows(cpu: &Cpu) -> bool {
    let ring = match (cpu.state.kernel_mode, cpu.domain.assists(VmAssist::ARCHITECTURAL_IOPL)) {
        (false, _) => 3,
        (true, true) => 0,
        (true, false) => 1,
    };
    ring <= cpu.iopl
}

/// Whether the guest's own bitmap lets this mode use `size` ports from `port` on (`guest_io_okay`).
fn bitmap_allows(cpu: &mut Cpu, port: u16, size: usize) -> bool {
    let (bitmap, ports) = cpu.io_bitmap;
    if usize::from(port) + size > ports as usize {
        return false;
    }
    // The bitmap is in the kernel's address space. What is not there forbids.
    let user = !cpu.state.kernel_mode;
    if user && !cpu.domain.space.switch_mode(cpu.index, &mut *cpu.engine, false) {
        return false;
    }
    let at = bitmap.wrapping_add(u64::from(port >> 3));
    let byte = |at| cpu.read::<u8>(at).unwrap_or(u8::MAX);
    let bits = u16::from_le_bytes([byte(at), byte(at.wrapping_add(1))]);
    let allowed = bits & (((1 << size) - 1) << (port & 7)) == 0;
    let back = !user || cpu.domain.space.switch_mode(cpu.index, &mut *cpu.engine, true);
    back && allowed
}

/// What the I/O privilege level decides about: in either mode.
fn ports(cpu: &mut Cpu, instruction: &Instruction) -> Option<Outcome> {
    let (data, port) = match instruction.mnemonic() {
        // The flag itself does nothing: events are masked in `vcpu_info`.
        Mnemonic::Cli | Mnemonic::Sti => {
            return iopl_allows(cpu).then_some(Outcome::Next);
        }
        Mnemonic::In => (instruction.op0_register(), 1),
        _ => (instruction.op1_register(), 0),
    };
    let port = u16::try_from(operand::value(cpu, instruction, port, 2)?).ok()?;
    if !iopl_allows(cpu) && !bitmap_allows(cpu, port, data.size()) {
        return None;
    }
    if instruction.mnemonic() == Mnemonic::In {
        // Nothing answers.
        let ones = u64::MAX >> (64 - data.size() * 8);
        operand::set_register(cpu, data, ones)?;
    }
    Some(Outcome::Next)
}

fn privileged(cpu: &mut Cpu, instruction: &Instruction) -> Option<Outcome> {
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    match instruction.mnemonic() {
        Mnemonic::Hlt => {
            cpu.state.registers.rip = instruction.next_ip();
            sched::halt(cpu);
            return Some(Outcome::Jumped);
        }
        Mnemonic::Clts => cpu.task_switched = false,
        // Caches are coherent. As in Xen `invd`, `invlpg` and `swapgs` are refused: there are calls for what they do.
        Mnemonic::Wbinvd => {}
        Mnemonic::Rdmsr => {
            let value = msr::read(cpu, low(cpu.state.registers.rcx))?;
            let registers = &mut cpu.state.registers;
            (registers.rax, registers.rdx) = (value & 0xffff_ffff, value >> 32);
        }
        Mnemonic::Wrmsr => {
            let registers = &cpu.state.registers;
            let value = u64::from(low(registers.rax)) | u64::from(low(registers.rdx)) << 32;
            msr::write(cpu, low(registers.rcx), value)?;
        }
        Mnemonic::Xsetbv => {
            let registers = &cpu.state.registers;
            // XCR0 is the host's: at least x87, and nothing else is changed.
            if low(registers.rcx) != 0 || registers.rax & 1 == 0 {
                return None;
            }
        }
        Mnemonic::Mov => return move_special(cpu, instruction),
        Mnemonic::Lmsw => return None,
        _ => return None,
    }
    Some(Outcome::Next)
}

/// `mov` to and from control and debug registers.
fn move_special(cpu: &mut Cpu, instruction: &Instruction) -> Option<Outcome> {
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    if instruction.op0_kind() != OpKind::Register || instruction.op1_kind() != OpKind::Register {
        return None;
    }
    if from.is_cr() {
        let value = match from {
            Register::CR0 => CR0 | if cpu.task_switched { CR0_TS } else { 0 },
            Register::CR2 => cpu.state.cr2,
            Register::CR3 => cpu.domain.space.roots(cpu.index).0?.0 << 12,
            Register::CR4 => cpu.cr4 | CR4_ALWAYS,
            _ => return None,
        };
        operand::set_register(cpu, to, value)?;
    } else if from.is_dr() {
        let value = segments::read_debug(cpu, from.number())?;
        operand::set_register(cpu, to, value)?;
    } else if to.is_cr() {
        let value = operand::register(cpu, from)?;
        match to {
            Register::CR0 if (value ^ CR0) & !CR0_TS == 0 => {
                cpu.task_switched = value & CR0_TS != 0;
            }
            Register::CR2 => {
                cpu.state.cr2 = value;
                cpu.shared().set_cr2(value);
            }
            Register::CR4 => cpu.cr4 = value & CR4_GUEST,
            _ => return None,
        }
    } else if to.is_dr() {
        let value = operand::register(cpu, from)?;
        segments::write_debug(cpu, to.number(), value).ok()?;
    } else {
        return None;
    }
    Some(Outcome::Next)
}

/// What every guest has in CR4: PAE, OSFXSR, OSXMMEXCPT.
const CR4_ALWAYS: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// TSD, DE, FSGSBASE, OSXSAVE: the others a guest may write, and they stay as they are.
const CR4_GUEST: u64 = 1 << 2 | 1 << 3 | 1 << 16 | 1 << 18;

/// Loads of Xen's selectors, which the host's descriptor tables do not have.
fn selectors(cpu: &mut Cpu, instruction: &Instruction) -> Option<Outcome> {
    match instruction.code() {
        Code::Iretq => {
            let stack = cpu.state.registers.rsp;
            let [rip, cs, rflags, rsp, ss]: [u64; 5] = cpu.read(stack).ok()?;
            let (cs, ss) = (selector(cs)?, selector(ss)?);
            if !CODE.contains(&cs) || !DATA.contains(&ss) {
                return None;
            }
            let state = &mut cpu.state;
            (state.registers.rip, state.registers.rsp) = (rip, rsp);
            state.registers.rflags = traps::guest_rflags(rflags);
            (state.cs, state.ss) = (cs | 3, ss | 3);
            Some(Outcome::Jumped)
        }
        Code::Retfq | Code::Retfq_imm16 => {
            let stack = cpu.state.registers.rsp;
            let [rip, cs]: [u64; 2] = cpu.read(stack).ok()?;
            let cs = selector(cs)?;
            if !CODE.contains(&cs) {
                return None;
            }
            let skip = if instruction.op_count() > 0 { instruction.immediate(0) } else { 0 };
            let state = &mut cpu.state;
            state.registers.rip = rip;
            state.registers.rsp = stack.wrapping_add(16).wrapping_add(skip);
            state.cs = cs | 3;
            Some(Outcome::Jumped)
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            let value = operand::value(cpu, instruction, 1, 2)?;
            load_segment(cpu, instruction.op0_register(), selector(value)?)?;
            Some(Outcome::Next)
        }
        Code::Popq_FS | Code::Popq_GS => {
            let stack = cpu.state.registers.rsp;
            let value: u64 = cpu.read(stack).ok()?;
            load_segment(cpu, instruction.op0_register(), selector(value)?)?;
            cpu.state.registers.rsp = stack.wrapping_add(8);
            Some(Outcome::Next)
        }
        _ => None,
    }
}

fn selector(value: u64) -> Option<u16> {
    u16::try_from(value & 0xffff).ok()
}

/// Keeps the selector. A flat segment begins at 0.
fn load_segment(cpu: &mut Cpu, register: Register, selector: u16) -> Option<()> {
    if !DATA.contains(&selector) && !matches!(selector, 0x2a | 0xe02a | 0xe029) {
        return None;
    }
    let state = &mut cpu.state;
    match register {
        // None is no stack in ring 3.
        Register::SS if selector > 3 => state.ss = selector | 3,
        Register::DS => state.data[0] = selector,
        Register::ES => state.data[1] = selector,
        Register::FS => {
            state.data[2] = selector;
            state.registers.fs_base = 0;
        }
        Register::GS => {
            state.data[3] = selector;
            state.registers.gs_base = 0;
        }
        _ => return None,
    }
    Some(())
}

/// An access to a page that a process cannot have (page 0), or an instruction there: executed here.
pub(crate) fn access(cpu: &mut Cpu, fault: Fault) -> Result<(), Cause> {
    let done = decode(cpu).and_then(|instruction| operand::step(cpu, &instruction));
    match done {
        Some(()) => Ok(()),
        None if fault.vector == PAGE_FAULT => traps::inject(cpu, fault),
        None => traps::inject(cpu, Fault { vector: GENERAL_PROTECTION, error: 0, address: 0 }),
    }
}

#[cfg(test)]
mod tests;
