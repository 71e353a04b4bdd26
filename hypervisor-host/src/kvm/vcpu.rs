//! The thread of a virtual CPU: from exit to exit.
// UNSAFETY: a signal handler asks KVM to leave the guest.
#![expect(unsafe_code, reason = "a signal handler writes a flag in memory shared with KVM")]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::machine::{End, Machine};
use super::ports::Wish;
use super::stats::Kind;
use super::xen::{self, XenVcpu};

thread_local! {
    /// What KVM shares with this thread, while it runs a virtual CPU.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that ends a run of the guest.
pub(crate) fn signal() -> libc::c_int {
    SIGRTMIN()
}

/// A signal alone does not end a run that has not begun yet; the flag does.
extern "C" fn leave(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: `run` is the mapping of this thread's own virtual CPU, which is unmapped only after `RUN` is
        // cleared; the byte is only ever read by the kernel, and written by this thread.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) };
        flag.store(1, Ordering::Relaxed);
    }
}

/// Prepares this process for [`serve`].
pub(crate) fn install() -> io::Result<()> {
    register_signal_handler(signal(), leave).map_err(io::Error::from)
}

/// Makes [`RUN`] point nowhere at the end, however that comes.
struct Registered;

impl Drop for Registered {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

/// Runs a virtual CPU until its machine ends.
pub(crate) fn serve(machine: &Arc<Machine>, index: usize, mut vcpu: VcpuFd) {
    RUN.set(vcpu.get_kvm_run());
    // Dropped before `vcpu`, which is a parameter.
    let registered = Registered;
    let mut xen = machine.xen.as_ref().map(|xen| XenVcpu::new(xen, index));
    while !machine.is_over() {
        if let Some(end) = once(machine, &mut vcpu, xen.as_mut()) {
            machine.end(end, Some(index));
        }
    }
    drop(registered);
}

/// One stay in the guest, and what came of it.
fn once(machine: &Machine, vcpu: &mut VcpuFd, xen: Option<&mut XenVcpu>) -> Option<End> {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            machine.stats.count(Kind::Kick);
            vcpu.set_kvm_immediate_exit(0);
            return None;
        }
        Err(error) => return Some(End::Lost(format!("KVM_RUN: {error}"))),
    };
    let (kind, wish) = match exit {
        VcpuExit::IoOut(xen::PORT, _) if let Some(xen) = xen => {
            machine.stats.count(Kind::Hypercall);
            return xen.hypercall(vcpu);
        }
        VcpuExit::X86Wrmsr(write) => {
            let known = xen.is_some_and(|xen| xen.write_msr(write.index, write.data));
            *write.error = u8::from(!known);
            (Kind::Other, None)
        }
        VcpuExit::X86Rdmsr(read) => {
            *read.error = 1;
            (Kind::Other, None)
        }
        VcpuExit::IoOut(port, data) => (Kind::PortOut, machine.ports.write(port, data)),
        VcpuExit::IoIn(port, data) => {
            machine.ports.read(port, data);
            (Kind::PortIn, None)
        }
        VcpuExit::MmioRead(address, data) => {
            machine.read_mmio(address, data);
            (Kind::MmioRead, None)
        }
        VcpuExit::MmioWrite(address, data) => {
            machine.write_mmio(address, data);
            (Kind::MmioWrite, None)
        }
        VcpuExit::Shutdown => return Some(End::TripleFault(place(vcpu))),
        VcpuExit::SystemEvent(kind, _) => return Some(End::Lost(format!("system event {kind}"))),
        // With the interrupt controllers in the kernel this is a CPU that waits there.
        VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr => (Kind::Other, None),
        VcpuExit::FailEntry(reason, _) => {
            return Some(End::Lost(format!("the CPU refuses to enter the guest ({reason:#x})")));
        }
        VcpuExit::InternalError => {
            let rip = place(vcpu);
            let what =
                format!("KVM cannot go on at {rip:#x} (an instruction that it cannot emulate)");
            return Some(End::Lost(what));
        }
        other => {
            return Some(End::Lost(format!("an exit of KVM that nobody asked for: {other:?}")));
        }
    };
    machine.stats.count(kind);
    wish.map(|wish| match wish {
        Wish::PowerOff => End::PowerOff,
        Wish::Reset => End::Reset,
        Wish::Exit(value) => End::Exit(value),
        Wish::Panicked => End::Panicked,
    })
}

/// Where it is, for a message.
fn place(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |registers| registers.rip)
}
