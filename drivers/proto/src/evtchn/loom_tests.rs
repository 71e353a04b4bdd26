//! Xen signalling against the guest draining and unmasking, in every order.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;

use super::*;

struct Shared {
    pending: [AtomicU64; 1],
    mask: [AtomicU64; 1],
    selector: AtomicU64,
    upcall: AtomicU8,
}

impl Shared {
    fn new(mask: u64) -> Arc<Self> {
        Arc::new(Self {
            pending: [AtomicU64::new(0)],
            mask: [AtomicU64::new(mask)],
            selector: AtomicU64::new(0),
            upcall: AtomicU8::new(0),
        })
    }
    fn ports(&self) -> PortBits<'_> {
        PortBits { pending: &self.pending, mask: &self.mask }
    }
    fn vcpu(&self) -> VcpuBits<'_> {
        VcpuBits { upcall_pending: &self.upcall, selector: &self.selector }
    }
}

#[test]
fn loom_evtchn_unmask_or_upcall_but_never_neither() {
    loom::model(|| {
        let shared = Shared::new(1);
        let xen = {
            let shared = shared.clone();
            thread::spawn(move || shared.ports().signal(shared.vcpu(), Port(0)))
        };
        let hypercall = shared.ports().unmask(Port(0));
        let upcall = xen.join().unwrap();
        assert!(hypercall || upcall, "an event waits and nobody says so");
    });
}

#[test]
fn loom_evtchn_drain_loses_no_signal() {
    loom::model(|| {
        let shared = Shared::new(0);
        shared.ports().signal(shared.vcpu(), Port(0));
        let xen = {
            let shared = shared.clone();
            thread::spawn(move || shared.ports().signal(shared.vcpu(), Port(1)))
        };
        let mut seen = 0;
        shared.ports().drain(shared.vcpu(), |port| seen |= 1 << port.0);
        xen.join().unwrap();
        // What was not handled must stand announced.
        if shared.upcall.load(Ordering::SeqCst) != 0 {
            shared.ports().drain(shared.vcpu(), |port| seen |= 1 << port.0);
        }
        assert_eq!(seen, 3, "a signal was lost");
    });
}
