//! Xen PVH: native CPU state, Xen's clock, timer, events, console and way to end.
// UNSAFETY: has Xen put its pages under frames of ours, and deliver events through a vector.
#![expect(unsafe_code, reason = "frames exchanged and interrupts requested by hypercall")]

use core::time::Duration;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::hvm::HvmParam;
use janus_proto::abi::xen::memory::MapSpace;
use janus_proto::addr::{Gpa, PAGE_SHIFT, PAGE_SIZE, Pfn};

use super::{xen_clock, xen_pv};
use crate::hypercall::{self, Method};
use crate::irq::{self, evtchn};
use crate::mm::paging::{self, Flags};
use crate::power::ExitStatus;
use crate::xen::shared_info::SHARED_INFO;

/// Makes hypercalls work, by the instruction of this CPU's maker. The first act under PVH.
pub(crate) fn init_hypercalls() {
    let amd = raw_cpuid::CpuId::new()
        .get_vendor_info()
        .is_some_and(|vendor| matches!(vendor.as_str(), "AuthenticAMD" | "HygonGenuine"));
    hypercall::init(if amd { Method::Vmmcall } else { Method::Vmcall });
}

/// Has Xen put the shared page under the page of the image kept for it, and maps the pages of the
/// toolstack's rings, which lie outside the memory map. Paging is set up.
///
/// # Errors
/// Xen refused.
pub(crate) fn init() -> Result<(), Errno> {
    let va = core::ptr::from_ref(&SHARED_INFO).expose_provenance();
    let frame = Pfn((va >> PAGE_SHIFT) as u64);
    // SAFETY: the page is only seen as atomics; it is kept for this.
    unsafe { hypercall::memory::add_to_physmap(MapSpace::SHARED_INFO, 0, frame) }?;
    evtchn::init();
    xen_clock::init();
    for param in [HvmParam::CONSOLE_PFN, HvmParam::STORE_PFN] {
        if let Ok(frame) = hypercall::hvm::param(param)
            && frame != 0
        {
            map_ring(Pfn(frame));
        }
    }
    Ok(())
}

/// Maps a ring page at its own address, as ordinary memory.
fn map_ring(frame: Pfn) {
    let Gpa(address) = frame.start();
    let Ok(va) = usize::try_from(address) else { return };
    if crate::mm::frames::is_ram(frame, 1) {
        return;
    }
    // SAFETY: outside RAM no Rust object lives; Xen says that this page is the ring.
    if let Err(error) = unsafe { paging::map(va, frame, 1, Flags::WRITE) } {
        log::error!("the ring page at {:#x}+{PAGE_SIZE:#x} cannot be mapped: {error}", address);
    }
}

/// Lets events in through [`irq::XEN_UPCALL_VECTOR`], and starts the timer. Traps and heap are there.
///
/// # Errors
/// Xen refused.
pub(crate) fn init_events() -> Result<(), evtchn::EventError> {
    // SAFETY: the interrupt table leads every vector to `irq::interrupt`, which knows this one.
    unsafe { hypercall::hvm::set_callback_vector(irq::XEN_UPCALL_VECTOR) }?;
    xen_clock::init_timer(crate::percpu::current())
}

pub(super) fn now_ns() -> u64 {
    xen_clock::now_ns()
}

pub(super) fn wall_clock() -> Option<Duration> {
    xen_clock::wall_clock()
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    xen_clock::set_timer(deadline_ns);
}

pub(super) fn end(status: ExitStatus) -> ! {
    xen_pv::end_domain(status)
}
