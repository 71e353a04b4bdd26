//! Small state of a CPU that a process can only keep: segment bases, debug registers, CR0.TS, and the assists.

use janus_proto::abi::xen::trap::SegmentBase;
use janus_proto::abi::xen::{Errno, VmAssist, VmAssistCmd};

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};
use super::traps::{is_canonical, is_guests};

/// Assists a 64-bit guest may have: the first three mean something to 32-bit guests only.
const ASSISTS: [VmAssist; 7] = [
    VmAssist(0), // 4gb_segments
    VmAssist(1), // 4gb_segments_notify
    VmAssist(3), // pae_extended_cr3
    VmAssist::WRITABLE_PAGETABLES,
    VmAssist::ARCHITECTURAL_IOPL,
    VmAssist::RUNSTATE_UPDATE_FLAG,
    VmAssist::M2P_STRICT,
];

pub(crate) fn set_segment_base(cpu: &mut Cpu, [which, base, ..]: [u64; 6]) -> Answer {
    let which = SegmentBase(low32(which));
    let needs_address =
        matches!(which, SegmentBase::FS | SegmentBase::GS_USER | SegmentBase::GS_KERNEL);
    if needs_address && !is_canonical(base) {
        return Answer::err(Errno::EINVAL);
    }
    let state = &mut cpu.state;
    match which {
        SegmentBase::FS => state.registers.fs_base = base,
        // Only a kernel makes hypercalls: its own base is the active one.
        SegmentBase::GS_KERNEL => state.registers.gs_base = base,
        SegmentBase::GS_USER => state.other_gs_base = base,
        SegmentBase::GS_USER_SEL => {
            let selector = u16::try_from(base & 0xffff).unwrap_or(0);
            // A null selector has base 0; the flat ones too.
            state.other_gs_base = 0;
            state.data[3] = selector;
        }
        _ => return Answer::err(Errno::EINVAL),
    }
    Answer::ok(0)
}

pub(crate) fn fpu_taskswitch(cpu: &mut Cpu, [set, ..]: [u64; 6]) -> Answer {
    cpu.task_switched = set != 0;
    Answer::ok(0)
}

/// Debugging extensions: breakpoints of I/O, and no other names for DR6 and DR7.
const CR4_DE: u64 = 1 << 3;
/// Bits of DR7 that are always clear, and those that are always set.
const DR7_ZERO: u64 = 0xd800;
const DR7_ONE: u64 = 0x400;
/// Of DR7: a guest may not watch the registers themselves.
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// Of DR7: the local and global switches of the four breakpoints.
const DR7_ACTIVE: u64 = 0xff;

/// Keeps a debug register (`set_debugreg` of `xen/arch/x86/pv/misc-hypercalls.c`).
///
/// # Errors
/// `ENODEV`: no such register; `EINVAL`: reserved bits; `EPERM`: not for a guest.
pub(crate) fn write_debug(cpu: &mut Cpu, index: usize, value: u64) -> Result<(), Errno> {
    let extensions = cpu.cr4 & CR4_DE != 0;
    let (index, value) = match (index, value) {
        (0..=3, value) if is_guests(value) => (index, value),
        (0..=3, _) => return Err(Errno::EPERM),
        (4 | 5, _) if extensions => return Err(Errno::ENODEV),
        (4..=7, 0x1_0000_0000..) => return Err(Errno::EINVAL),
        // Without CR4.DE 4 and 5 are other names of 6 and 7.
        (4 | 6, value) => (6, (value & 0xffff_efff) | 0xffff_0ff0),
        (5 | 7, value) => {
            if value & DR7_GENERAL_DETECT != 0 {
                return Err(Errno::EPERM);
            }
            // A breakpoint of I/O (type 2) means nothing without CR4.DE.
            let io = (0..4).any(|slot| value >> (16 + slot * 4) & 3 == 2);
            if value & DR7_ACTIVE != 0 && io && !extensions {
                return Err(Errno::EPERM);
            }
            (7, (value & !DR7_ZERO) | DR7_ONE)
        }
        _ => return Err(Errno::ENODEV),
    };
    let place = cpu.state.debug.get_mut(index).ok_or(Errno::ENODEV)?;
    *place = value;
    Ok(())
}

/// A #DB that no breakpoint raised: the trap flag did, and DR6 says so (`BS`).
pub(crate) fn note_single_step(cpu: &mut Cpu) {
    const SINGLE_STEP: u64 = 1 << 14;
    if let Some(status) = cpu.state.debug.get_mut(6) {
        *status |= SINGLE_STEP;
    }
}

/// Reads one; `None`: no such register.
pub(crate) fn read_debug(cpu: &Cpu, index: usize) -> Option<u64> {
    let index = match index {
        4 | 5 if cpu.cr4 & CR4_DE != 0 => return None,
        4 => 6,
        5 => 7,
        other => other,
    };
    cpu.state.debug.get(index).copied()
}

pub(crate) fn set_debugreg(cpu: &mut Cpu, [index, value, ..]: [u64; 6]) -> Answer {
    let index = low32(index) as usize;
    Answer::from(write_debug(cpu, index, value).map(|()| 0))
}

pub(crate) fn get_debugreg(cpu: &mut Cpu, [index, ..]: [u64; 6]) -> Answer {
    let index = low32(index) as usize;
    Answer::from(read_debug(cpu, index).ok_or(Errno::ENODEV))
}

pub(crate) fn vm_assist(cpu: &mut Cpu, [command, kind, ..]: [u64; 6]) -> Answer {
    let (command, kind) = (low32(command), VmAssist(low32(kind)));
    if !ASSISTS.contains(&kind) {
        return Answer::err(Errno::EINVAL);
    }
    let on = match VmAssistCmd(command) {
        VmAssistCmd::ENABLE => true,
        VmAssistCmd::DISABLE => false,
        _ => return Answer::err(Errno::ENOSYS),
    };
    cpu.domain.set_assist(kind, on);
    Answer::ok(0)
}
