//! What QEMU's emulation (TCG) needs to be fast: a larger software TLB.
//!
//! TCG starts with a TLB of 256 pages and only looks at its size when the guest flushes it: a flush
//! doubles it if more than 70 % were in use (`accel/tcg/cputlb.c`, `tlb_mmu_resize_locked`). A kernel that
//! maps its memory once never flushes, so everything beyond 1 MiB misses: copying 1 MiB took 2.6 ms here,
//! and 0.15 ms after a flush at the right moment. So, shortly after boot, and a while after page tables
//! have changed (QEMU may shrink the TLB then), a task touches many pages and flushes, a few times.
// UNSAFETY: reads memory it has allocated, and flushes the TLB.
#![expect(unsafe_code, reason = "touches page frames")]

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;

use janus_proto::addr::PAGE_SIZE;

use crate::mm::frames;
use crate::sync::Notify;
use crate::{cpu, task, time};

/// TCG's signature in CPUID.
const SIGNATURE: [u8; 12] = *b"TCGTCGTCGTCG";
/// Entries that TCG's TLB starts with, and that it shall have (16 MiB).
const FIRST_ENTRIES: usize = 256;
const ENTRIES: usize = 4096;
/// A flush doubles a TLB of which more than 70 % are in use.
const PERCENT: usize = 75;
/// How long the first growth leaves the start of services alone, and how rarely it is repeated.
const AFTER_BOOT: Duration = Duration::from_millis(10);
const PAUSE: Duration = Duration::from_secs(1);

static FLUSHED: AtomicBool = AtomicBool::new(false);
static CHANGED: Notify = Notify::new();

/// Notes that the TLB was flushed, after which QEMU may have made it smaller.
#[inline]
pub(crate) fn flushed() {
    if !FLUSHED.swap(true, Ordering::Relaxed) {
        CHANGED.notify();
    }
}

/// Starts the task that keeps the TLB large, if this is TCG.
pub(crate) fn init() {
    if cpu::hypervisors().any(|hypervisor| hypervisor.signature == SIGNATURE) {
        drop(task::spawn("tlb", keep_large()));
    }
}

async fn keep_large() {
    time::sleep(AFTER_BOOT).await;
    loop {
        FLUSHED.store(false, Ordering::Relaxed);
        grow().await;
        while !FLUSHED.load(Ordering::Relaxed) {
            CHANGED.notified().await;
        }
        time::sleep(PAUSE).await;
    }
}

/// Touches enough pages for each doubling and flushes.
async fn grow() {
    let mut entries = FIRST_ENTRIES;
    while entries < ENTRIES {
        let count = entries * PERCENT / 100;
        // A small machine has no use for a TLB larger than its memory.
        let Some(run) =
            frames::statistics().free.checked_sub(2 * count).and_then(|_| frames::allocate(count))
        else {
            return;
        };
        let start = usize::try_from(run.start().0).unwrap_or(0);
        for page in 0..count {
            let address = core::ptr::with_exposed_provenance::<u8>(start + page * PAGE_SIZE);
            // SAFETY: a frame of the run just allocated, mapped; any byte is a `u8`.
            unsafe { address.read_volatile() };
        }
        x86_64::instructions::tlb::flush_all();
        // SAFETY: allocated above, and not used any more.
        unsafe { frames::free(run, count) };
        entries *= 2;
        task::yield_now().await;
    }
}
