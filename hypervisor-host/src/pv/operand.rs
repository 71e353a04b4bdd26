//! Registers and operands of an instruction that is emulated, and the few ordinary instructions that are.
//!
//! The ordinary ones are those that kernels use on a page that a process cannot have, address 0: plain moves, string
//! stores and moves, calls and jumps, simple arithmetic.

use std::sync::Arc;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use janus_proto::addr::PAGE_SIZE;

use super::cpu::Cpu;
use super::io::Registers;
use super::space::TableWrite;

/// Repetitions of a string instruction done at once; the rest when it faults again.
const MOST_REPEATS: u64 = 4096;

/// The place of a general register.
fn place(cpu: &mut Cpu, register: Register) -> Option<&mut u64> {
    let r = &mut cpu.state.registers;
    Some(match register.full_register() {
        Register::RAX => &mut r.rax,
        Register::RCX => &mut r.rcx,
        Register::RDX => &mut r.rdx,
        Register::RBX => &mut r.rbx,
        Register::RSP => &mut r.rsp,
        Register::RBP => &mut r.rbp,
        Register::RSI => &mut r.rsi,
        Register::RDI => &mut r.rdi,
        Register::R8 => &mut r.r8,
        Register::R9 => &mut r.r9,
        Register::R10 => &mut r.r10,
        Register::R11 => &mut r.r11,
        Register::R12 => &mut r.r12,
        Register::R13 => &mut r.r13,
        Register::R14 => &mut r.r14,
        Register::R15 => &mut r.r15,
        _ => return None,
    })
}

/// `AH` and its kind: bits 8 to 15.
fn is_high(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

/// The value of a general register, of its size.
pub(super) fn register(cpu: &mut Cpu, register: Register) -> Option<u64> {
    let whole = *place(cpu, register)?;
    let shift = if is_high(register) { 8 } else { 0 };
    Some(whole >> shift & mask(register.size()))
}

/// Sets one: 32 bits clear the upper half, fewer leave the rest.
pub(super) fn set_register(cpu: &mut Cpu, register: Register, value: u64) -> Option<()> {
    let shift = if is_high(register) { 8 } else { 0 };
    let size = register.size();
    let whole = place(cpu, register)?;
    *whole = match size {
        8 => value,
        4 => value & mask(4),
        size => (*whole & !(mask(size) << shift)) | (value & mask(size)) << shift,
    };
    Some(())
}

/// The linear address of a memory operand.
fn address(cpu: &Cpu, instruction: &Instruction, operand: u32) -> Option<u64> {
    let r = &cpu.state.registers;
    instruction.virtual_address(operand, 0, |register, _, _| {
        Some(match register {
            Register::FS => r.fs_base,
            Register::GS => r.gs_base,
            Register::CS | Register::DS | Register::ES | Register::SS => 0,
            Register::RAX => r.rax,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RBX => r.rbx,
            Register::RSP => r.rsp,
            Register::RBP => r.rbp,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::R8 => r.r8,
            Register::R9 => r.r9,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::R12 => r.r12,
            Register::R13 => r.r13,
            Register::R14 => r.r14,
            Register::R15 => r.r15,
            _ => return None,
        })
    })
}

/// The device whose registers are mapped at an address, for a whole access.
fn device(cpu: &Cpu, address: u64, size: usize, write: bool) -> Option<Arc<dyn Registers>> {
    let inside = address % PAGE_SIZE as u64 + size as u64 <= PAGE_SIZE as u64;
    let frame = cpu.domain.space.device_frame(cpu.index, address, write).filter(|_| inside)?;
    Some(cpu.domain.devices.at(frame).unwrap_or_else(|| Arc::new(Nothing)))
}

/// A device that was taken away: reads as ones.
#[derive(Debug)]
struct Nothing;

impl Registers for Nothing {
    fn read(&self, _offset: u64, buf: &mut [u8]) {
        buf.fill(0xff);
    }
    fn write(&self, _offset: u64, _bytes: &[u8]) {}
}

fn load(cpu: &Cpu, address: u64, size: usize) -> Option<u64> {
    let mut bytes = [0; 8];
    let buf = bytes.get_mut(..size)?;
    if cpu.read_bytes(address, buf).is_err() {
        device(cpu, address, size, false)?.read(address % PAGE_SIZE as u64, buf);
    }
    Some(u64::from_le_bytes(bytes))
}

fn store(cpu: &mut Cpu, address: u64, value: u64, size: usize) -> Option<()> {
    if cpu.write(address, value.to_le_bytes().get(..size)?).is_ok() {
        return Some(());
    }
    if let Some(device) = device(cpu, address, size, true) {
        device.write(address % PAGE_SIZE as u64, value.to_le_bytes().get(..size)?);
        return Some(());
    }
    // Read-only: a page table perhaps, which Xen writes for the guest.
    let domain = Arc::clone(&cpu.domain);
    domain.space.write_table(cpu.index, &mut *cpu.engine, address, None, value, size).map(drop)
}

/// `xchg` and `cmpxchg` on an entry of a page table: the write is made only if the entry is still what was read.
fn exchange(cpu: &mut Cpu, instruction: &Instruction) -> Option<()> {
    let size = size_of_operand(instruction, 0)?;
    let compares = instruction.mnemonic() == Mnemonic::Cmpxchg;
    let (memory, other) = match (instruction.op_kind(0), instruction.op_kind(1)) {
        (OpKind::Memory, OpKind::Register) => (0, 1),
        (OpKind::Register, OpKind::Memory) => (1, 0),
        _ => return None,
    };
    let place = address(cpu, instruction, memory)?;
    let new = value(cpu, instruction, other, size)?;
    let accumulator = cpu.state.registers.rax & mask(size);
    let domain = Arc::clone(&cpu.domain);
    let mut old = if compares { accumulator } else { load(cpu, place, size)? };
    loop {
        match domain.space.write_table(cpu.index, &mut *cpu.engine, place, Some(old), new, size)? {
            TableWrite::Done => break,
            TableWrite::Differs(there) => old = there,
        }
        if compares {
            break;
        }
    }
    if !compares {
        return set_register(cpu, instruction.op_register(other), old);
    }
    let difference = accumulator.wrapping_sub(old) & mask(size);
    let sign = 1 << (size * 8 - 1);
    let overflow = (accumulator ^ old) & (accumulator ^ difference) & sign != 0;
    let adjust = (accumulator ^ old ^ difference) & 0x10 != 0;
    let others = when(accumulator < old, CARRY) | when(overflow, OVERFLOW) | when(adjust, ADJUST);
    set_flags(cpu, difference, sign, others);
    if difference != 0 {
        let accumulator = match size {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        set_register(cpu, accumulator, old)?;
    }
    Some(())
}

/// The value of an operand of `size` bytes.
pub(super) fn value(
    cpu: &mut Cpu,
    instruction: &Instruction,
    operand: u32,
    size: usize,
) -> Option<u64> {
    match instruction.op_kind(operand) {
        OpKind::Register => Some(register(cpu, instruction.op_register(operand))? & mask(size)),
        OpKind::Memory => load(cpu, address(cpu, instruction, operand)?, size),
        OpKind::NearBranch64 => Some(instruction.near_branch64()),
        _ => instruction.try_immediate(operand).ok().map(|value| value & mask(size)),
    }
}

fn set_value(
    cpu: &mut Cpu,
    instruction: &Instruction,
    operand: u32,
    value: u64,
    size: usize,
) -> Option<()> {
    match instruction.op_kind(operand) {
        OpKind::Register => set_register(cpu, instruction.op_register(operand), value),
        OpKind::Memory => store(cpu, address(cpu, instruction, operand)?, value, size),
        _ => None,
    }
}

/// Bytes of an operand.
fn size_of_operand(instruction: &Instruction, operand: u32) -> Option<usize> {
    let size = match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    };
    (1..=8).contains(&size).then_some(size)
}

/// Executes one instruction; `None`: not one of those known here, or its memory is not there.
pub(super) fn step(cpu: &mut Cpu, instruction: &Instruction) -> Option<()> {
    let next = instruction.next_ip();
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => {
            let (to, from) = (size_of_operand(instruction, 0)?, source_size(instruction)?);
            let mut moved = value(cpu, instruction, 1, from)?;
            if matches!(instruction.mnemonic(), Mnemonic::Movsx | Mnemonic::Movsxd) {
                let shift = 64 - u32::try_from(from * 8).ok()?;
                moved = (moved.cast_signed() << shift >> shift).cast_unsigned();
            }
            set_value(cpu, instruction, 0, moved, to)?;
        }
        Mnemonic::Lea => {
            let target = address(cpu, instruction, 1)?;
            set_register(cpu, instruction.op0_register(), target)?;
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            return string(cpu, instruction, false);
        }
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
            return string(cpu, instruction, true);
        }
        Mnemonic::Add
        | Mnemonic::Sub
        | Mnemonic::And
        | Mnemonic::Or
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test => arithmetic(cpu, instruction)?,
        Mnemonic::Xchg | Mnemonic::Cmpxchg => exchange(cpu, instruction)?,
        Mnemonic::Cld => cpu.state.registers.rflags &= !DIRECTION,
        Mnemonic::Nop | Mnemonic::Endbr64 => {}
        Mnemonic::Push => {
            let pushed = value(cpu, instruction, 0, 8)?;
            push(cpu, pushed)?;
        }
        Mnemonic::Pop => {
            let stack = cpu.state.registers.rsp;
            let popped = load(cpu, stack, 8)?;
            set_value(cpu, instruction, 0, popped, 8)?;
            cpu.state.registers.rsp = stack.wrapping_add(8);
        }
        Mnemonic::Call => {
            let target = value(cpu, instruction, 0, 8)?;
            push(cpu, next)?;
            cpu.state.registers.rip = target;
            return Some(());
        }
        Mnemonic::Jmp => {
            cpu.state.registers.rip = value(cpu, instruction, 0, 8)?;
            return Some(());
        }
        Mnemonic::Ret => {
            let stack = cpu.state.registers.rsp;
            cpu.state.registers.rip = load(cpu, stack, 8)?;
            cpu.state.registers.rsp = stack.wrapping_add(8);
            return Some(());
        }
        Mnemonic::Je | Mnemonic::Jne => {
            let zero = cpu.state.registers.rflags & ZERO != 0;
            if zero == (instruction.mnemonic() == Mnemonic::Je) {
                cpu.state.registers.rip = instruction.near_branch64();
                return Some(());
            }
        }
        _ => return None,
    }
    cpu.state.registers.rip = next;
    Some(())
}

/// Bytes of the second operand.
fn source_size(instruction: &Instruction) -> Option<usize> {
    match instruction.op_kind(1) {
        OpKind::Register => Some(instruction.op_register(1).size()),
        OpKind::Memory => Some(instruction.memory_size().size()),
        _ => size_of_operand(instruction, 0),
    }
    .filter(|size| (1..=8).contains(size))
}

fn push(cpu: &mut Cpu, value: u64) -> Option<()> {
    let stack = cpu.state.registers.rsp.wrapping_sub(8);
    store(cpu, stack, value, 8)?;
    cpu.state.registers.rsp = stack;
    Some(())
}

const CARRY: u64 = 1;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const DIRECTION: u64 = 1 << 10;
const OVERFLOW: u64 = 1 << 11;

fn arithmetic(cpu: &mut Cpu, instruction: &Instruction) -> Option<()> {
    let size = size_of_operand(instruction, 0)?;
    let a = value(cpu, instruction, 0, size)?;
    let b = value(cpu, instruction, 1, size)?;
    let (mask, sign) = (mask(size), 1 << (size * 8 - 1));
    let mnemonic = instruction.mnemonic();
    let (result, carry, overflow) = match mnemonic {
        Mnemonic::Add => {
            let sum = a.wrapping_add(b) & mask;
            (sum, sum < a, !(a ^ b) & (a ^ sum) & sign != 0)
        }
        Mnemonic::Sub | Mnemonic::Cmp => {
            let difference = a.wrapping_sub(b) & mask;
            (difference, a < b, (a ^ b) & (a ^ difference) & sign != 0)
        }
        Mnemonic::And | Mnemonic::Test => (a & b, false, false),
        Mnemonic::Or => (a | b, false, false),
        _ => (a ^ b, false, false),
    };
    if !matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test) {
        set_value(cpu, instruction, 0, result, size)?;
    }
    let adjust = matches!(mnemonic, Mnemonic::Add | Mnemonic::Sub | Mnemonic::Cmp)
        && (a ^ b ^ result) & 0x10 != 0;
    let others = when(carry, CARRY) | when(overflow, OVERFLOW) | when(adjust, ADJUST);
    set_flags(cpu, result, sign, others);
    Some(())
}

/// Sets the flags that an arithmetic instruction sets.
fn set_flags(cpu: &mut Cpu, result: u64, sign: u64, others: u64) {
    let even = (result & 0xff).count_ones().is_multiple_of(2);
    let of_result = when(even, PARITY) | when(result == 0, ZERO) | when(result & sign != 0, SIGN);
    let flags = &mut cpu.state.registers.rflags;
    *flags &= !(CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW);
    *flags |= of_result | others;
}

/// A flag, if it is set.
fn when(set: bool, flag: u64) -> u64 {
    if set { flag } else { 0 }
}

/// A string store or move, with or without `rep`.
fn string(cpu: &mut Cpu, instruction: &Instruction, moves: bool) -> Option<()> {
    let size = instruction.memory_size().size();
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let back = cpu.state.registers.rflags & DIRECTION != 0;
    let step = if back { (size as u64).wrapping_neg() } else { size as u64 };
    let count = if repeated { cpu.state.registers.rcx.min(MOST_REPEATS) } else { 1 };
    for _ in 0..count {
        let registers = cpu.state.registers;
        let value =
            if moves { load(cpu, registers.rsi, size)? } else { registers.rax & mask(size) };
        store(cpu, registers.rdi, value, size)?;
        let registers = &mut cpu.state.registers;
        registers.rdi = registers.rdi.wrapping_add(step);
        if moves {
            registers.rsi = registers.rsi.wrapping_add(step);
        }
        if repeated {
            registers.rcx = registers.rcx.wrapping_sub(1);
        }
    }
    if !repeated || cpu.state.registers.rcx == 0 {
        cpu.state.registers.rip = instruction.next_ip();
    }
    Some(())
}
