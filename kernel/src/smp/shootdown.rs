//! Making all CPUs forget translations that page tables no longer have.
//!
//! Under Xen PV the hypercalls that change tables do it. Under PVH Xen has a call. Elsewhere each other CPU is
//! interrupted and answers; one that has interrupts masked because it waits for a lock answers from there
//! ([`crate::platform::relax`]), so that it does not matter who holds what.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::irq::apic;
use crate::mm::paging::native;
use crate::percpu;
use crate::platform::lock::IrqLock;
use crate::platform::{self, Platform};

/// What is to be forgotten.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static PAGES: AtomicUsize = AtomicUsize::new(0);
/// A bit for each CPU that has not yet.
static WAITING: AtomicU64 = AtomicU64::new(0);
/// One request at a time.
static TURN: IrqLock<()> = IrqLock::new(());

/// Has all other CPUs forget `pages` pages at `va`; they have when this returns. Tables are changed already.
pub(crate) fn flush_others(va: usize, pages: usize) {
    if !super::several() {
        return;
    }
    match platform::current() {
        Platform::Kvm => interrupt_others(va, pages),
        Platform::XenPvh => {
            if let Err(error) = crate::hypercall::hvm::flush_tlbs() {
                log::error!("Xen does not flush TLBs: {error}");
            }
        }
        _ => {}
    }
}

fn interrupt_others(va: usize, pages: usize) {
    let _turn = TURN.lock();
    ADDRESS.store(va, Ordering::Relaxed);
    PAGES.store(pages, Ordering::Relaxed);
    let mut set = 0;
    for cpu in super::others() {
        set |= cpu.bit();
    }
    // Publishes the range, and the page tables.
    WAITING.store(set, Ordering::SeqCst);
    for cpu in super::all_in(set) {
        apic::send(cpu.apic_id(), u32::from(apic::FLUSH_VECTOR));
    }
    while WAITING.load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
}

/// Answers a request, if there is one for this CPU.
pub(crate) fn attend() {
    let own = percpu::current().bit();
    if WAITING.load(Ordering::Acquire) & own != 0 {
        native::forget(ADDRESS.load(Ordering::Relaxed), PAGES.load(Ordering::Relaxed));
        WAITING.fetch_and(!own, Ordering::Release);
    }
}

/// A CPU has come up: requests reach it from here on, and what changed before is forgotten.
pub(crate) fn begin() {
    if platform::current().is_native() {
        native::forget(0, usize::MAX);
    }
}
