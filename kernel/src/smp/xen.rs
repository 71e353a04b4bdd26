//! Starting and stopping CPUs under Xen (`xen/include/public/vcpu.h`, `hvm/hvm_vcpu.h`).
// UNSAFETY: says where a CPU begins.
#![expect(unsafe_code, reason = "the first state of a CPU is made of addresses")]

use alloc::boxed::Box;

use janus_proto::abi::xen::trap::{
    ContextFlags, FLAT_RING3_CS64, FLAT_RING3_SS64, VcpuGuestContext,
};
use janus_proto::abi::xen::vcpu::RegisterVcpuInfo;
use janus_proto::addr::{Gpa, PAGE_SIZE, Pfn};
use zerocopy::FromZeros as _;

use super::CpuError;
use crate::hypercall;
use crate::irq::evtchn::{self, Own};
use crate::mm::paging::pv;
use crate::percpu::{CpuId, PerCpu};
use crate::platform::{self, Platform, xen_clock};
use crate::trap;

/// Gives the first CPU what it needs once it is not alone: a way for others to wake it.
///
/// # Errors
/// No event channel.
pub(super) fn prepare_first(cpu: &PerCpu) -> Result<(), CpuError> {
    if platform::current().is_xen() {
        evtchn::open_own(cpu, Own::Wake)?;
    }
    Ok(())
}

/// Moves a CPU's `vcpu_info` into its own data, and opens its event channels.
fn prepare(cpu: &'static PerCpu) -> Result<(), CpuError> {
    let address = core::ptr::from_ref(cpu.own_vcpu()).expose_provenance() as u64;
    let page = Pfn::containing(Gpa(address));
    let frame = match platform::current() {
        Platform::XenPv => pv::mfn(page).ok_or(CpuError::NoSuchCpu)?.0,
        _ => page.0,
    };
    let offset = u32::try_from(address % PAGE_SIZE as u64).unwrap_or(0);
    let info = RegisterVcpuInfo { mfn: frame, offset, rsvd: 0 };
    // SAFETY: a static that is only ever seen as atomics, aligned so that it lies in one page.
    unsafe { hypercall::cpu::register_vcpu_info(cpu.id().0, &info) }?;
    evtchn::open_own(cpu, Own::Wake)?;
    xen_clock::init_timer(cpu)?;
    Ok(())
}

/// Starts a CPU of a PV guest on the stack that ends at `stack`.
///
/// # Errors
/// Xen refused.
pub(super) fn start_pv(cpu: &'static PerCpu, stack: usize) -> Result<(), CpuError> {
    prepare(cpu)?;
    let callbacks = trap::pv::callbacks();
    let mut context = Box::<VcpuGuestContext>::new(VcpuGuestContext::new_zeroed());
    context.flags = ContextFlags::IN_KERNEL.bits();
    for (to, from) in context.trap_ctxt.iter_mut().zip(callbacks.table) {
        *to = from;
    }
    context.event_callback_eip = callbacks.event;
    context.failsafe_callback_eip = callbacks.failsafe;
    let [_, _, _, root, ..] = &mut context.ctrlreg;
    *root = pv::root().ok_or(CpuError::NoSuchCpu)?.0 << 12;
    context.kernel_ss = u64::from(FLAT_RING3_SS64);
    context.kernel_sp = stack as u64;
    context.gs_base_kernel = core::ptr::from_ref(cpu).expose_provenance() as u64;
    let registers = &mut context.user_regs;
    registers.rip = entry();
    registers.cs = FLAT_RING3_CS64;
    registers.ss = u64::from(FLAT_RING3_SS64);
    // As after a call.
    registers.rsp = (stack - size_of::<usize>()) as u64;
    registers.rdi = core::ptr::from_ref(cpu).expose_provenance() as u64;
    let CpuId(id) = cpu.id();
    // SAFETY: an entry point, a stack of its own, and the page tables that all CPUs share.
    unsafe { hypercall::cpu::initialise(id, &*context) }?;
    // SAFETY: as above.
    Ok(unsafe { hypercall::cpu::up(id) }?)
}

/// Starts a CPU of a PVH guest, as [`start_pv`].
///
/// # Errors
/// Xen refused.
#[cfg(target_os = "none")]
pub(super) fn start_pvh(cpu: &'static PerCpu, stack: usize) -> Result<(), CpuError> {
    use janus_proto::abi::xen::hvm::{VCPU_HVM_MODE_64B, VcpuHvmContext};
    use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer};

    prepare(cpu)?;
    let mut context = VcpuHvmContext::new_zeroed();
    context.mode = VCPU_HVM_MODE_64B;
    context.rip = entry();
    context.rflags = 2;
    context.rsp = (stack - size_of::<usize>()) as u64;
    context.rdi = core::ptr::from_ref(cpu).expose_provenance() as u64;
    context.cr0 = Cr0::read_raw();
    context.cr3 = Cr3::read().0.start_address().as_u64();
    context.cr4 = Cr4::read_raw();
    context.efer = Efer::read_raw();
    let CpuId(id) = cpu.id();
    // SAFETY: as in `start_pv`.
    unsafe { hypercall::cpu::initialise(id, &context) }?;
    // SAFETY: as above.
    Ok(unsafe { hypercall::cpu::up(id) }?)
}

/// Has a CPU go on that has gone down by [`go_down`].
///
/// # Errors
/// Xen refused, or this is no Xen.
pub(super) fn restart(cpu: &PerCpu) -> Result<(), CpuError> {
    if !platform::current().is_xen() {
        return Err(CpuError::NotHere);
    }
    let CpuId(id) = cpu.id();
    // SAFETY: it goes on where it stopped.
    Ok(unsafe { hypercall::cpu::up(id) }?)
}

/// Stops the calling CPU until somebody starts it again.
pub(super) fn go_down(cpu: &PerCpu) {
    let CpuId(id) = cpu.id();
    if hypercall::cpu::down(id).is_err() {
        hypercall::yield_cpu();
    }
}

#[cfg(target_os = "none")]
fn entry() -> u64 {
    smp_secondary_start as extern "C" fn(&'static PerCpu) -> ! as usize as u64
}

#[cfg(not(target_os = "none"))]
fn entry() -> u64 {
    0
}

/// Where a CPU under Xen begins, with events masked.
#[cfg(target_os = "none")]
extern "C" fn smp_secondary_start(cpu: &'static PerCpu) -> ! {
    if platform::current() == Platform::XenPvh {
        super::startup::set_up(cpu);
    }
    super::run(cpu)
}
