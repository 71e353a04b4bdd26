//! The boot order under Xen, where it differs from that of other machines.
// UNSAFETY: vouches for what the domain builder said.
#![expect(unsafe_code, reason = "first use of memory")]

use janus_boot::{BootInfo, MemoryKind, MemoryRange, Protocol};

use super::{console, grant};
use crate::mm::{frames, paging};
use crate::percpu::{self, CpuId};
use crate::platform::{xen_pv, xen_pvh};
use crate::start::{fail, sections, taken};
use crate::{logger, trap};

/// The boot CPU and memory of a PV guest.
pub(crate) fn start_pv(info: &BootInfo) {
    let Protocol::XenPv(start) = &info.protocol else { fail("Xen PV", "no start_info") };
    let page = janus_boot::image::Image::hypercall_page();
    xen_pv::init(start, page).unwrap_or_else(|error| fail("shared info page", error));
    trap::pv::init().unwrap_or_else(|error| fail("trap table", error));
    if let Some(cpu) = percpu::prepare(CpuId(0)) {
        let base = cpu.expose_provenance() as u64;
        // SAFETY: a prepared structure in a static.
        unsafe { xen_pv::set_gs_base(base) }.unwrap_or_else(|error| fail("GS base", error));
        percpu::boot_cpu_ready();
    }
    let mut taken = taken(info);
    // SAFETY: 1. Xen's tables, in force; 2. these are the image's parts, and `reserved` names all else.
    let paging::pv::Completed { tables, mapped_end } =
        unsafe { paging::pv::init(start, &taken, &sections()) }
            .unwrap_or_else(|error| fail("page tables", error));
    let len = tables.end.0 - tables.start.0;
    taken.push(MemoryRange { start: tables.start, len, kind: MemoryKind::Reserved });
    // SAFETY: 1. as above, with the new tables; 2. all memory below is mapped now.
    unsafe { frames::init(info.memory.ranges(), &taken, mapped_end) }
        .unwrap_or_else(|error| fail("memory", error));
    frames::defer(mapped_end, paging::pv::extend);
    console::init_pv(start);
    logger::init(crate::command_line());
    xen_pv::init_timer().unwrap_or_else(|error| fail("timer", error));
    start_services();
}

/// What Xen adds to a natively started PVH guest.
pub(crate) fn start_pvh() {
    xen_pvh::init_hypercalls();
    xen_pvh::init().unwrap_or_else(|error| fail("shared info page", error));
    console::init_pvh();
    xen_pvh::init_events().unwrap_or_else(|error| fail("events", error));
    start_services();
}

/// What both kinds of guest have.
fn start_services() {
    console::start();
    if let Err(error) = grant::init() {
        log::error!("no devices: {error}");
    }
}
