//! Xen's hypercall interface (`xen/include/public/`), one module for each of its headers.
//!
//! Structures that a hypercall reads or writes are plain `repr(C)` values; guest handles are `u64` addresses.
//! Their sizes, offsets and constants are compared with the C headers by `tests/abi-check`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub mod callback;
pub mod cpuid;
pub mod elfnote;
pub mod errno;
pub mod event_channel;
pub mod grant_table;
pub mod hvm;
pub mod memory;
pub mod mmu;
pub mod physdev;
pub mod sched;
pub mod shared_info;
pub mod start_info;
pub mod trap;
pub mod vcpu;
pub mod version;

pub use errno::Errno;

open_enum! {
    /// Hypercall numbers (`xen.h`, `__HYPERVISOR_*`): the value of `rax`.
    pub enum Hypercall: u64 {
        /// Sets the virtual IDT (`trap::TrapInfo` array, ended by address 0). PV only.
        SET_TRAP_TABLE = 0,
        /// Checked page-table writes (`mmu::MmuUpdate` array). PV only.
        MMU_UPDATE = 1,
        /// Sets the GDT from a list of machine frames. PV only.
        SET_GDT = 2,
        /// Sets the kernel stack for traps from user mode. PV only.
        STACK_SWITCH = 3,
        /// Sets event, failsafe and syscall entry points. PV only; see `CALLBACK_OP`.
        SET_CALLBACKS = 4,
        /// Sets or clears CR0.TS. PV only.
        FPU_TASKSWITCH = 5,
        /// Writes a debug register. PV only.
        SET_DEBUGREG = 8,
        /// Reads a debug register. PV only.
        GET_DEBUGREG = 9,
        /// Writes one GDT or LDT entry. PV only.
        UPDATE_DESCRIPTOR = 10,
        /// See [`memory::MemoryOp`].
        MEMORY_OP = 12,
        /// Runs an array of [`MulticallEntry`].
        MULTICALL = 13,
        /// Writes the PTE that maps a virtual address. PV only.
        UPDATE_VA_MAPPING = 14,
        /// Arms the one-shot timer at an absolute system time; see also `vcpu::VcpuOp`.
        SET_TIMER_OP = 15,
        /// See [`version::XenVersionOp`].
        XEN_VERSION = 17,
        /// The hypervisor's own (emergency) console; see [`ConsoleIo`].
        CONSOLE_IO = 18,
        /// See [`grant_table::GrantTableOp`].
        GRANT_TABLE_OP = 20,
        /// See [`VmAssist`].
        VM_ASSIST = 21,
        /// As `UPDATE_VA_MAPPING`, for another domain's frame.
        UPDATE_VA_MAPPING_OTHERDOMAIN = 22,
        /// Returns from a trap through [`trap::IretContext`] on the stack. PV only; not a normal call.
        IRET = 23,
        /// See [`vcpu::VcpuOp`].
        VCPU_OP = 24,
        /// Sets FS or GS base; see [`trap::SegmentBase`]. PV only.
        SET_SEGMENT_BASE = 25,
        /// See [`mmu::MmuextCmd`]. PV only.
        MMUEXT_OP = 26,
        /// Registers an NMI callback.
        NMI_OP = 28,
        /// See [`sched::SchedOp`].
        SCHED_OP = 29,
        /// See [`callback::CallbackOp`]. PV only.
        CALLBACK_OP = 30,
        /// See [`event_channel::EventChannelOp`].
        EVENT_CHANNEL_OP = 32,
        /// See [`physdev::PhysdevOp`].
        PHYSDEV_OP = 33,
        /// See [`hvm::HvmOp`].
        HVM_OP = 34,
        /// Performance counters.
        XENPMU_OP = 40,
    }
}

open_enum! {
    /// Operations of [`Hypercall::CONSOLE_IO`] (`xen.h`, `CONSOLEIO_*`): command, length, buffer.
    pub enum ConsoleIo: u32 {
        /// Writes bytes.
        WRITE = 0,
        /// Reads bytes; answers how many.
        READ = 1,
    }
}

open_enum! {
    /// Virtual interrupts (`xen.h`, `VIRQ_*`).
    pub enum Virq: u32 {
        /// The timer of a vCPU fired.
        TIMER = 0,
        /// A request to dump debug information.
        DEBUG = 1,
        /// Bytes arrived on the hypervisor console (privileged domains).
        CONSOLE = 2,
        /// A performance counter overflowed.
        XENPMU = 13,
    }
}

impl crate::addr::DomId {
    /// Memory-mapped I/O pages as an owner (`xen.h`, `DOMID_IO`).
    pub const IO: Self = Self(0x7ff1);
    /// Xen itself as an owner (`xen.h`, `DOMID_XEN`).
    pub const XEN: Self = Self(0x7ff2);
    /// The owner is unknown (`xen.h`, `DOMID_INVALID`).
    pub const INVALID: Self = Self(0x7ff4);
}

open_enum! {
    /// First argument of [`Hypercall::VM_ASSIST`] (`xen.h`, `VMASST_CMD_*`).
    pub enum VmAssistCmd: u32 {
        /// Turns an assist on.
        ENABLE = 0,
        /// Turns it off.
        DISABLE = 1,
    }
}

open_enum! {
    /// Second argument of [`Hypercall::VM_ASSIST`] (`xen.h`, `VMASST_TYPE_*`).
    pub enum VmAssist: u32 {
        /// Trap and emulate direct writes to page tables.
        WRITABLE_PAGETABLES = 2,
        /// The IOPL in `rflags` is the virtual one.
        ARCHITECTURAL_IOPL = 4,
        /// Mark runstate areas while they are being updated.
        RUNSTATE_UPDATE_FLAG = 5,
        /// Hide the machine-to-physical table from user mode.
        M2P_STRICT = 32,
    }
}

/// One call of [`Hypercall::MULTICALL`] (`xen.h`, `struct multicall_entry`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MulticallEntry {
    /// Hypercall number.
    pub op: u64,
    /// OUT: what the call answered, as a signed number.
    pub result: u64,
    /// Arguments.
    pub args: [u64; 6],
}
assert_layout!(MulticallEntry, size = 64, op = 0, result = 8, args = 16);
