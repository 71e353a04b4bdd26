//! Calls that set up a CPU under PV, and those for other CPUs.
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::Hypercall;
use janus_proto::abi::xen::trap::{SegmentBase, TrapInfo};
use janus_proto::abi::xen::vcpu::{RegisterVcpuInfo, VcpuOp};

use super::{Result, address, call, vcpu_op};

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

/// Whether CPU `vcpu` is up.
///
/// # Errors
/// The domain has no such CPU.
pub fn is_up(vcpu: u32) -> Result<bool> {
    // SAFETY: no structure.
    let answer =
        unsafe { call(Hypercall::VCPU_OP, [VcpuOp::IS_UP.0.into(), vcpu.into(), 0, 0, 0]) }?;
    Ok(answer != 0)
}

/// Gives a CPU that has not run yet its first state: `VcpuGuestContext` under PV, `VcpuHvmContext` under PVH.
///
/// # Errors
/// Not such a CPU, or not such a state.
///
/// # Safety
/// The state is one for kernel code, with page tables and a stack that nobody else uses.
pub unsafe fn initialise<T>(vcpu: u32, context: &T) -> Result<()> {
    // SAFETY: Xen reads the structure; the caller answers for it.
    unsafe { vcpu_op(VcpuOp::INITIALISE, vcpu, address(context)) }
}

/// Starts a CPU, or has it go on.
///
/// # Errors
/// Not a CPU that was initialised.
///
/// # Safety
/// It has a state to go on from.
pub unsafe fn up(vcpu: u32) -> Result<()> {
    // SAFETY: no structure; the caller answers for what the CPU does.
    unsafe { vcpu_op(VcpuOp::UP, vcpu, 0) }
}

/// Stops a CPU where it is; of the calling one it returns when the CPU is up again.
///
/// # Errors
/// No such CPU.
pub fn down(vcpu: u32) -> Result<()> {
    // SAFETY: no structure; a CPU may take any time between two instructions.
    unsafe { vcpu_op(VcpuOp::DOWN, vcpu, 0) }
}

/// Moves the `vcpu_info` of a CPU that is down.
///
/// # Errors
/// Not our memory, or it was moved before.
///
/// # Safety
/// The place is 64 bytes for Xen to write, for good.
pub unsafe fn register_vcpu_info(vcpu: u32, info: &RegisterVcpuInfo) -> Result<()> {
    // SAFETY: Xen reads the structure; the caller answers for the place it names.
    unsafe { vcpu_op(VcpuOp::REGISTER_VCPU_INFO, vcpu, address(info)) }
}
