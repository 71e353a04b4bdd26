//! Xen and the guest over the same bits.
#![cfg(not(loom))]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

struct Shared {
    pending: Vec<AtomicU64>,
    mask: Vec<AtomicU64>,
    selector: AtomicU64,
    upcall: AtomicU8,
}

impl Shared {
    fn new(mask: u64) -> Self {
        let words = |value: u64| (0..64).map(|_| AtomicU64::new(value)).collect();
        Self {
            pending: words(0),
            mask: words(mask),
            selector: AtomicU64::new(0),
            upcall: AtomicU8::new(0),
        }
    }
    fn ports(&self) -> PortBits<'_> {
        PortBits { pending: &self.pending, mask: &self.mask }
    }
    fn vcpu(&self) -> VcpuBits<'_> {
        VcpuBits { upcall_pending: &self.upcall, selector: &self.selector }
    }
    fn drain(&self) -> Vec<u32> {
        let mut handled = Vec::new();
        let count = self.ports().drain(self.vcpu(), |port| handled.push(port.0));
        assert_eq!(count as usize, handled.len());
        handled
    }
}

#[test]
fn signals_arrive_once_lowest_port_first() {
    let shared = Shared::new(0);
    assert!(shared.ports().signal(shared.vcpu(), Port(4095)));
    for port in [4095, 64, 0, 63, 64] {
        assert!(!shared.ports().signal(shared.vcpu(), Port(port)), "one upcall is enough: {port}");
    }
    assert_eq!(shared.upcall.load(Ordering::Relaxed), 1);
    assert_eq!(shared.drain(), [0, 63, 64, 4095]);
    assert_eq!(shared.upcall.load(Ordering::Relaxed), 0);
    assert_eq!(shared.drain(), []);
}

#[test]
fn a_masked_event_waits_for_its_unmask() {
    let shared = Shared::new(u64::MAX);
    let ports = shared.ports();
    assert!(!ports.signal(shared.vcpu(), Port(70)));
    assert_eq!(shared.drain(), []);
    assert!(ports.is_pending(Port(70)) && ports.is_masked(Port(70)));
    assert!(ports.unmask(Port(70)), "the guest must ask Xen to deliver it");
    assert!(ports.is_masked(Port(70)), "or Xen would find nothing to unmask");
    assert!(ports.unmask_and_deliver(shared.vcpu(), Port(70)));
    assert_eq!(shared.drain(), [70]);
    assert!(!ports.unmask(Port(70)), "not masked");
    assert!(!ports.mask(Port(70)));
    assert!(ports.mask(Port(70)));
    assert!(!ports.unmask(Port(70)), "nothing waits");
    assert!(!ports.clear(Port(70)));
}

#[test]
fn ports_beyond_the_bitmap_are_ignored() {
    let shared = Shared::new(0);
    let ports = shared.ports();
    for port in [4096, u32::MAX] {
        let port = Port(port);
        assert!(!ports.signal(shared.vcpu(), port) && !ports.unmask(port) && !ports.clear(port));
        assert!(ports.is_masked(port) && !ports.is_pending(port) && ports.mask(port));
    }
    // A selector that names words outside a short bitmap.
    let short = PortBits { pending: &shared.pending[..1], mask: &shared.mask[..1] };
    shared.selector.store(u64::MAX, Ordering::Relaxed);
    assert_eq!(short.drain(shared.vcpu(), |_| ()), 0);
}

#[test]
fn an_event_during_its_handler_is_a_new_one() {
    let shared = Shared::new(0);
    shared.ports().signal(shared.vcpu(), Port(5));
    shared.ports().drain(shared.vcpu(), |port| {
        assert!(shared.ports().signal(shared.vcpu(), port));
    });
    assert_eq!(shared.upcall.load(Ordering::Relaxed), 1);
    assert_eq!(shared.drain(), [5]);
}

proptest! {
    /// No event is lost or invented under any sequence of signals, masks, unmasks and drains.
    #[test]
    fn every_event_is_delivered(steps in prop::collection::vec((0_u8..4, 0_u32..200), 0..300)) {
        let shared = Shared::new(0);
        let ports = shared.ports();
        let (mut due, mut masked) = (BTreeSet::new(), BTreeSet::new());
        for (step, port) in steps {
            match step {
                0 => { due.insert(port); ports.signal(shared.vcpu(), Port(port)); }
                1 => { prop_assert_eq!(ports.mask(Port(port)), !masked.insert(port)); }
                2 => {
                    let was = masked.remove(&port);
                    let hypercall = ports.unmask(Port(port));
                    prop_assert_eq!(hypercall, was && due.contains(&port));
                    if hypercall {
                        ports.unmask_and_deliver(shared.vcpu(), Port(port));
                    }
                }
                _ => {
                    let want: Vec<_> = due.difference(&masked).copied().collect();
                    prop_assert!(want.is_empty() || shared.upcall.load(Ordering::Relaxed) == 1);
                    prop_assert_eq!(shared.drain(), want);
                    due.retain(|port| masked.contains(port));
                }
            }
        }
    }
}
