//! The console ring that the toolstack gives every guest, and `console_io` of the first domain.
//!
//! `struct xencons_interface` (`xen/include/public/io/console.h`): two byte streams in one page. The
//! early console of `janus_boot` writes to the same ring until [`init`]; both leave the indices right
//! for the other, so the last words of a crash may take the early way again.
// UNSAFETY: makes a reference to the page that Xen names as the ring.
#![expect(unsafe_code, reason = "the ring page is found by address")]

use alloc::boxed::Box;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

use janus_boot::start_info::StartInfo;
use janus_front::class::ConsoleDevice;
use janus_proto::abi::xen::Virq;
use janus_proto::abi::xen::hvm::HvmParam;
use janus_proto::addr::{Pfn, Port};

use crate::irq::{Handler, evtchn};
use crate::mm::paging::pv;
use crate::{console, hypercall, platform};

const IN_SIZE: usize = 1024;
const OUT_SIZE: usize = 2048;
/// How long the end of the domain waits for the console daemon to take what was written.
const DRAIN_NS: u64 = 2_000_000_000;

/// `struct xencons_interface`. The daemon writes `in_bytes`, `in_prod` and `out_cons`.
#[repr(C)]
struct Ring {
    in_bytes: [AtomicU8; IN_SIZE],
    out_bytes: [AtomicU8; OUT_SIZE],
    in_cons: AtomicU32,
    in_prod: AtomicU32,
    out_cons: AtomicU32,
    out_prod: AtomicU32,
}
janus_proto::assert_layout!(Ring, size = 3088, out_bytes = 1024, in_cons = 3072, out_cons = 3080);

static RING: AtomicPtr<Ring> = AtomicPtr::new(core::ptr::null_mut());
static PORT: AtomicU32 = AtomicU32::new(0);

fn ring() -> Option<&'static Ring> {
    // SAFETY: null, or the ring page, which `init` found mapped and nobody ever unmaps; all atomics.
    unsafe { RING.load(Ordering::Acquire).as_ref() }
}

fn port() -> Port {
    Port(PORT.load(Ordering::Relaxed))
}

fn publish(frame: Pfn, port: Port) {
    PORT.store(port.0, Ordering::Relaxed);
    let address = usize::try_from(frame.start().0).unwrap_or(0);
    RING.store(core::ptr::with_exposed_provenance_mut(address), Ordering::Release);
}

/// Finds the ring of a PV guest; paging is set up. The first domain has none and uses `console_io`.
pub(crate) fn init_pv(start: &StartInfo) {
    if let Some(console) = start.console
        && let Some(frame) = pv::pfn(console.mfn)
    {
        publish(frame, console.port);
    }
}

/// Finds the ring of a PVH guest, whose page is mapped.
pub(crate) fn init_pvh() {
    let param = hypercall::hvm::param;
    if let (Ok(frame), Ok(port)) = (param(HvmParam::CONSOLE_PFN), param(HvmParam::CONSOLE_EVTCHN))
        && let Ok(port) = u32::try_from(port)
        && frame != 0
        && port != 0
    {
        publish(Pfn(frame), Port(port));
    }
}

/// Puts Xen's console behind the kernel's: the heap is there.
pub(crate) fn start() {
    let id = console::attach(Box::new(XenConsole));
    let handler: Handler = Box::new(move || console::service(id));
    let channel = if ring().is_some() {
        evtchn::attach(port(), "console", handler)
    } else {
        evtchn::bind_virq(Virq::CONSOLE, 0, "console", handler)
    };
    match channel {
        Ok(channel) => {
            let _ = channel.keep();
        }
        Err(error) => log::warn!("no console input: {error}"),
    }
}

/// Xen's console: the ring, or Xen's own for the first domain.
#[derive(Debug)]
struct XenConsole;

impl ConsoleDevice for XenConsole {
    fn write(&mut self, bytes: &[u8]) -> usize {
        match ring() {
            Some(ring) => write_ring(ring, bytes),
            // Refused only to domains that have a ring.
            None => hypercall::console_write(bytes).map_or(bytes.len(), |()| bytes.len()),
        }
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        match ring() {
            Some(ring) => read_ring(ring, buf),
            None => hypercall::console_read(buf).unwrap_or(0),
        }
    }
}

fn write_ring(ring: &Ring, bytes: &[u8]) -> usize {
    let prod = ring.out_prod.load(Ordering::Relaxed);
    let cons = ring.out_cons.load(Ordering::Acquire);
    let used = usize::try_from(prod.wrapping_sub(cons)).unwrap_or(usize::MAX);
    // A daemon whose index lies gets no more bytes than the ring holds, and none while it lies.
    let room = OUT_SIZE.saturating_sub(used).min(bytes.len());
    let mut at = prod;
    for &byte in bytes.iter().take(room) {
        if let Some(slot) = ring.out_bytes.get(at as usize % OUT_SIZE) {
            slot.store(byte, Ordering::Relaxed);
        }
        at = at.wrapping_add(1);
    }
    if room != 0 {
        // The bytes before the index that shows them.
        ring.out_prod.store(at, Ordering::Release);
        evtchn::notify(port());
    }
    room
}

fn read_ring(ring: &Ring, buf: &mut [u8]) -> usize {
    let cons = ring.in_cons.load(Ordering::Relaxed);
    let prod = ring.in_prod.load(Ordering::Acquire);
    let waiting = usize::try_from(prod.wrapping_sub(cons)).unwrap_or(usize::MAX);
    if waiting > IN_SIZE {
        // A lying index: forget what it claims.
        ring.in_cons.store(prod, Ordering::Release);
        return 0;
    }
    let count = waiting.min(buf.len());
    let mut at = cons;
    for byte in buf.iter_mut().take(count) {
        if let Some(slot) = ring.in_bytes.get(at as usize % IN_SIZE) {
            *byte = slot.load(Ordering::Relaxed);
        }
        at = at.wrapping_add(1);
    }
    if count != 0 {
        // The bytes are read before the daemon may overwrite them.
        ring.in_cons.store(at, Ordering::Release);
        evtchn::notify(port());
    }
    count
}

/// Waits, a little while, until the console daemon has taken everything: the domain is about to end.
pub(crate) fn drain() {
    let Some(ring) = ring() else { return };
    let deadline = platform::now_ns().saturating_add(DRAIN_NS);
    loop {
        console::flush();
        let empty = ring.out_cons.load(Ordering::Relaxed) == ring.out_prod.load(Ordering::Relaxed);
        if empty || platform::now_ns() >= deadline {
            return;
        }
        evtchn::notify(port());
        hypercall::yield_cpu();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_ring() -> Box<Ring> {
        Box::new(Ring {
            in_bytes: [const { AtomicU8::new(0) }; IN_SIZE],
            out_bytes: [const { AtomicU8::new(0) }; OUT_SIZE],
            in_cons: AtomicU32::new(0),
            in_prod: AtomicU32::new(0),
            out_cons: AtomicU32::new(0),
            out_prod: AtomicU32::new(0),
        })
    }

    #[test]
    fn output_stops_at_a_full_ring_and_goes_on_when_it_is_drained() {
        let ring = new_ring();
        // Near the end of the numbers, so that the indices wrap.
        ring.out_prod.store(u32::MAX - 5, Ordering::Relaxed);
        ring.out_cons.store(u32::MAX - 5, Ordering::Relaxed);
        let bytes = [7; OUT_SIZE + 100];
        assert_eq!(write_ring(&ring, &bytes), OUT_SIZE);
        assert_eq!(write_ring(&ring, &bytes), 0);
        ring.out_cons.fetch_add(10, Ordering::Relaxed);
        assert_eq!(write_ring(&ring, &bytes), 10);
    }

    #[test]
    fn input_arrives_in_order_across_the_end_of_the_ring() {
        let ring = new_ring();
        let start = u32::try_from(IN_SIZE).unwrap() - 2;
        ring.in_cons.store(start, Ordering::Relaxed);
        for (offset, byte) in (0_u32..).zip(b"abcde") {
            let at = (start + offset) as usize % IN_SIZE;
            ring.in_bytes[at].store(*byte, Ordering::Relaxed);
        }
        ring.in_prod.store(start + 5, Ordering::Relaxed);
        let mut buf = [0; 3];
        assert_eq!((read_ring(&ring, &mut buf), &buf), (3, b"abc"));
        assert_eq!((read_ring(&ring, &mut buf), &buf[..2]), (2, &b"de"[..]));
        assert_eq!(read_ring(&ring, &mut buf), 0);
    }

    #[test]
    fn a_lying_daemon_gets_and_gives_nothing() {
        let ring = new_ring();
        for lie in [u32::MAX, 1 << 31, 3000] {
            ring.in_prod.store(lie, Ordering::Relaxed);
            ring.in_cons.store(0, Ordering::Relaxed);
            assert_eq!(read_ring(&ring, &mut [0; 16]), 0);
            ring.out_prod.store(0, Ordering::Relaxed);
            ring.out_cons.store(lie, Ordering::Relaxed);
            let ahead = lie.wrapping_neg();
            let room = OUT_SIZE.saturating_sub(ahead as usize);
            assert_eq!(write_ring(&ring, &[1; 16]), room.min(16));
        }
    }
}
