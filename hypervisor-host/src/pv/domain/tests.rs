use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use janus_proto::abi::xen::event_channel::ChannelStatus;
use janus_proto::grant::Access;

use super::*;
use crate::machine::ram::FIRST_FRAME;
use crate::pv::grant::{MAX_GRANT_FRAMES, MAX_STATUS_FRAMES};

struct AnyType;

impl FrameTypes for AnyType {
    fn get(&self, _frame: Mfn, _access: Access) -> bool {
        true
    }
    fn put(&self, _frame: Mfn, _access: Access) {}
}

pub(crate) fn setup(vcpus: usize) -> Setup {
    let frames = 16 + 1 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES;
    let at = |index| Mfn(FIRST_FRAME.0 + index);
    Setup {
        id: DomId(7),
        uuid: [7; 16],
        vcpus,
        ram: Arc::new(Ram::new(frames).unwrap()),
        shared_info: at(16),
        grant_frames: at(17),
        console: at(3),
        store: at(2),
    }
}

fn domain() -> Arc<Domain> {
    Domain::new(&setup(2), Arc::new(AnyType)).unwrap()
}

fn word(domain: &Domain, byte: usize) -> &AtomicU64 {
    &domain.ram().frame(domain.shared_info()).unwrap()[byte / 8]
}

#[test]
fn the_toolstacks_ports_are_one_and_two_and_reach_the_guest() {
    let domain = domain();
    let store = domain.bind(Arc::new(|| {})).unwrap();
    let console = domain.bind(Arc::new(|| {})).unwrap();
    assert_eq!((store.guest_port(), console.guest_port()), (Port(1), Port(2)));
    // Binding raises an event of its own; take it.
    word(&domain, 2048).store(0, SeqCst);
    word(&domain, 0).store(0, SeqCst);
    word(&domain, 8).store(0, SeqCst);
    assert!(console.notify());
    assert_eq!(word(&domain, 2048).load(SeqCst), 1 << 2);
    assert_eq!((word(&domain, 0).load(SeqCst), word(&domain, 8).load(SeqCst)), (1, 1));
    drop(store);
    assert_eq!(domain.events().status(Port(1)).unwrap().status, ChannelStatus::UNBOUND);
}

#[test]
fn ports_that_do_not_wait_for_the_host_are_not_bound() {
    let domain = domain();
    let port = domain.events().alloc_unbound(DomId(3)).unwrap();
    for port in [port, Port(0), Port(5), Port(u32::MAX)] {
        let refused = domain.bind_interdomain(port, Arc::new(|| {})).map(drop);
        assert_eq!(refused, Err(Errno::EINVAL), "{port}");
    }
}

#[test]
fn a_domain_that_was_not_started_ends_at_once() {
    let domain = domain();
    domain.destroy();
    domain.destroy();
    let ended = domain.wait();
    assert!(matches!(ended.reason, EndReason::Destroyed) && ended.report.is_none());
}

#[test]
fn nonsense_is_not_made_into_a_domain() {
    for vcpus in [0, 33, usize::MAX] {
        let setup = Setup { vcpus, ..setup(1) };
        assert!(Domain::new(&setup, Arc::new(AnyType)).is_err());
    }
}
