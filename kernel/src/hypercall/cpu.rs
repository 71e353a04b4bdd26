//! Calls that set up a CPU under PV.
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::Hypercall;
use janus_proto::abi::xen::trap::{SegmentBase, TrapInfo};

use super::{Result, address, call};

/// Sets the virtual interrupt table.
///
/// # Errors
/// A bad address or selector.
///
/// # Safety
/// The addresses are those of entry stubs for Xen's stack frames; the table ends with address 0.
pub unsafe fn set_trap_table(table: &[TrapInfo]) -> Result<()> {
    // SAFETY: Xen reads up to the entry with address 0.
    unsafe { call(Hypercall::SET_TRAP_TABLE, [address(table), 0, 0, 0, 0]) }.map(drop)
}

/// Says where events, failed returns and (user) system calls enter the kernel.
///
/// # Errors
/// A bad address.
///
/// # Safety
/// As for [`set_trap_table`].
pub unsafe fn set_callbacks(event: u64, failsafe: u64, syscall: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { call(Hypercall::SET_CALLBACKS, [event, failsafe, syscall, 0, 0]) }.map(drop)
}

/// Sets the GS base of kernel mode, for the calling CPU.
///
/// # Errors
/// Not an address.
///
/// # Safety
/// What the kernel reads through GS lies there.
pub unsafe fn set_gs_base(base: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { call(Hypercall::SET_SEGMENT_BASE, [SegmentBase::GS_KERNEL.0.into(), base, 0, 0, 0]) }
        .map(drop)
}
