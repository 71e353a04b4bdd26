//! What a domain was doing when it ended: the data of a crash report, for whoever prints or writes it.

use std::fmt;

use janus_proto::abi::xen::Hypercall;
use janus_proto::addr::{Mfn, Port};

use super::events::PortStatus;
use crate::engine::{Fault, Registers};

/// Why a domain was crashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An exception, and the guest has no handler for it.
    NoHandler(Fault),
    /// An event is due, and the guest has no entry point for it.
    NoEventCallback,
    /// An exception or event cannot be delivered: this stack cannot be written.
    BadStack(u64),
    /// The frame of the iret hypercall cannot be read from this stack.
    BadIret(u64),
    /// A return to user mode, and there is no user page table.
    NoUserTable,
    /// The guest's own watchdog has expired.
    Watchdog,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHandler(fault) => {
                write!(f, "exception {} (error code {:#x}", fault.vector, fault.error)?;
                if fault.vector == 14 {
                    write!(f, ", address {:#x}", fault.address)?;
                }
                f.write_str(") and the guest has no handler for it")
            }
            Self::NoEventCallback => f.write_str("an event is due and the guest has no callback"),
            Self::BadStack(stack) => {
                write!(f, "nothing can be delivered on the guest's stack at {stack:#x}")
            }
            Self::BadIret(stack) => write!(f, "no frame to return from at {stack:#x}"),
            Self::NoUserTable => f.write_str("return to user mode without user page tables"),
            Self::Watchdog => f.write_str("the guest's watchdog expired"),
        }
    }
}

/// A virtual CPU's registers, those of its mode included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// General registers.
    pub registers: Registers,
    /// Whether it runs the guest's kernel.
    pub kernel_mode: bool,
    /// Code selector, as the guest believes it.
    pub cs: u16,
    /// Stack selector.
    pub ss: u16,
    /// Data selectors: ds, es, fs, gs.
    pub data: [u16; 4],
    /// The address of the last page fault it was told of.
    pub cr2: u64,
    /// The kernel's top page table.
    pub root: Option<Mfn>,
    /// The user mode's.
    pub user_root: Option<Mfn>,
    /// The stack for traps from user mode.
    pub kernel_stack: u64,
    /// GS base of the mode it is not in.
    pub other_gs_base: u64,
    /// Debug registers.
    pub debug: [u64; 8],
}

/// One step of a walk through page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// 4 for the top table.
    pub level: u8,
    /// The table's frame.
    pub table: Mfn,
    /// The index in it.
    pub index: u16,
    /// The entry there.
    pub entry: u64,
}

/// Something a virtual CPU did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// A hypercall: number, first two arguments, and its answer.
    Hypercall(Hypercall, [u64; 2], i64),
    /// An exception, at this instruction.
    Fault(Fault, u64),
    /// An upcall was delivered.
    Upcall,
    /// It waited for events.
    Blocked,
}

/// What one virtual CPU was doing.
#[derive(Clone, Debug, Default)]
pub struct CpuReport {
    /// Which.
    pub vcpu: usize,
    /// Its registers.
    pub state: CpuState,
    /// The exception that ended the domain, if one did.
    pub fault: Option<Fault>,
    /// How the faulting address (of a page fault), else the instruction pointer, is mapped.
    pub walk: Vec<WalkStep>,
    /// The last things it did, oldest first.
    pub deeds: Vec<Deed>,
    /// The bytes at its instruction pointer, as far as they can be read.
    pub code: Vec<u8>,
    /// Words from its stack pointer upwards, as far as they can be read.
    pub stack: Vec<u64>,
}

/// What a domain was doing when it ended.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Its CPUs, those that were ever up.
    pub cpus: Vec<CpuReport>,
    /// Its event channels.
    pub ports: Vec<(Port, PortStatus)>,
}
