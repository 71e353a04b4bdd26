//! The way into traps under Xen PV: the trap table and the event callback.
//!
//! Xen makes an upcall on the kernel's stack with events masked, and an ordinary `iretq` cannot unmask
//! them: that is a byte in memory, which this CPU's `PerCpu` names. So the way out clears the byte, looks once
//! more for what came while it was set, takes the registers back and returns; an event in between simply
//! interrupts these last instructions of the way out. Such an inner handler leaves by `HYPERVISOR_iret`, which unmasks and returns in one step, so the
//! nesting is at most two deep and no event is lost (`pv.s`).
//!
//! Xen gives the stack of the interrupted kernel code to exceptions too: a stack overflow cannot be
//! reported under PV; Xen ends the domain as crashed.
// UNSAFETY: entry points in assembly, installed by hypercalls.
#![expect(unsafe_code, reason = "entry points in assembly, installed by hypercalls")]

use core::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::trap::{FLAT_RING3_CS64, TrapInfo};

use super::TrapFrame;
use crate::hypercall::cpu;
use crate::irq::evtchn;
use crate::percpu;

#[cfg(target_os = "none")]
core::arch::global_asm!(
    include_str!("registers.s"),
    include_str!("pv.s"),
    include_str!("forget.s"),
    options(raw)
);

/// Marks an event upcall in [`TrapFrame::vector`]; not a vector of the CPU.
const EVENT: u64 = 0x100;
/// Exceptions with an entry.
const VECTORS: usize = 32;
/// Bytes between the stubs.
const STUB_SIZE: u64 = 16;
/// `TrapInfo::flags`: any code may raise it by an instruction.
const ANY_PRIVILEGE: u8 = 3;
/// `TrapInfo::flags`: mask events on entry.
const MASK_EVENTS: u8 = 4;
const DEBUG: u8 = 1;
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;

/// Entry points, as addresses.
#[derive(Clone, Copy, Debug)]
struct Entries {
    stubs: u64,
    event: u64,
    failsafe: u64,
}

#[cfg(target_os = "none")]
fn entries() -> Entries {
    unsafe extern "C" {
        static pv_trap_stubs: u8;
        static pv_event_callback: u8;
        static pv_failsafe_callback: u8;
    }
    Entries {
        stubs: (&raw const pv_trap_stubs).addr() as u64,
        event: (&raw const pv_event_callback).addr() as u64,
        failsafe: (&raw const pv_failsafe_callback).addr() as u64,
    }
}

#[cfg(not(target_os = "none"))]
fn entries() -> Entries {
    Entries { stubs: 0, event: 0, failsafe: 0 }
}

/// Where a CPU enters the kernel by itself: for the boot CPU by hypercalls, for others in their first state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Callbacks {
    /// The trap table; the last entry is zero.
    pub(crate) table: [TrapInfo; VECTORS + 1],
    /// Events.
    pub(crate) event: u64,
    /// Returns that Xen could not make.
    pub(crate) failsafe: u64,
}

/// Installs the trap table and the callbacks of the boot CPU.
///
/// # Errors
/// Xen refused.
pub(crate) fn init() -> Result<(), Errno> {
    let Callbacks { table, event, failsafe } = callbacks();
    // SAFETY: the stubs of `pv.s`, which take Xen's frames; the last entry is zero.
    unsafe { cpu::set_trap_table(&table) }?;
    // SAFETY: as above; there is no user mode, so nothing makes system calls.
    unsafe { cpu::set_callbacks(event, failsafe, 0) }
}

/// The ways in.
pub(crate) fn callbacks() -> Callbacks {
    let entries = entries();
    let mut table =
        [TrapInfo { vector: 0, flags: 0, cs: 0, pad0: [0; 4], address: 0 }; VECTORS + 1];
    for (vector, info) in (0_u8..).zip(table.iter_mut().take(VECTORS)) {
        info.vector = vector;
        info.cs = FLAT_RING3_CS64;
        info.address = entries.stubs + u64::from(vector) * STUB_SIZE;
        info.flags = match vector {
            DEBUG | BREAKPOINT | OVERFLOW => ANY_PRIVILEGE | MASK_EVENTS,
            _ => MASK_EVENTS,
        };
    }
    Callbacks { table, event: entries.event, failsafe: entries.failsafe }
}

/// What the assembly calls, with events masked.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
extern "C" fn pv_trap_entry(frame: &mut TrapFrame) {
    if frame.vector == EVENT {
        return evtchn::upcall();
    }
    // Xen keeps the interrupted event mask beside the selector.
    frame.cs &= 0xffff;
    super::exception(frame)
}

/// The address of the last page fault.
pub(super) fn fault_address() -> u64 {
    percpu::vcpu().cr2.load(Ordering::Relaxed)
}
