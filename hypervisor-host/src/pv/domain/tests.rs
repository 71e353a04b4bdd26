//! A domain without a CPU: its ports, grants and end, as devices and vCPUs use them.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use janus_proto::abi::xen::event_channel::ChannelStatus;
use janus_proto::abi::xen::grant_table::{GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE};
use janus_proto::grant::Access;

use super::*;
use crate::memory::GrantMapper as _;
use crate::pv::fake;

fn domain() -> Arc<Domain> {
    fake::domain(2).0
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
    for (id, vcpus) in [(1, 0), (1, 33), (1, usize::MAX), (0, 1)] {
        let (domain, space) = fake::domain(1);
        let setup = Setup {
            id: DomId(id),
            uuid: [0; 16],
            vcpus,
            ram: domain.ram().clone(),
            shared_info: domain.shared_info(),
            grant_frames: fake::frame(fake::FRAMES + 1),
            console: fake::frame(3),
            store: fake::frame(2),
        };
        assert!(Domain::new(&setup, space).is_err());
    }
}

#[test]
fn the_rings_are_granted_to_the_host() {
    let domain = domain();
    let grants = domain.grants();
    let console = grants.map(&[GNTTAB_RESERVED_CONSOLE], Access::ReadWrite).unwrap();
    console[5].store(99, SeqCst);
    assert_eq!(domain.ram().words(fake::frame(3), 1).unwrap()[5].load(SeqCst), 99);
    assert!(grants.map(&[GNTTAB_RESERVED_XENSTORE], Access::ReadWrite).is_ok());
}

#[test]
fn a_watchdog_is_armed_changed_and_destroyed_by_its_number() {
    let domain = domain();
    assert_eq!(domain.set_watchdog(0, 0, 5), Err(Errno::EINVAL));
    assert_eq!(domain.set_watchdog(1, 1, 5), Err(Errno::EINVAL));
    assert_eq!(domain.set_watchdog(0, 1, 50), Ok(1));
    assert_eq!(domain.set_watchdog(0, 1, 60), Ok(2));
    assert_eq!(domain.set_watchdog(0, 1, 70), Err(Errno::ENOSPC));
    assert_eq!(domain.watchdog(), 50);
    assert_eq!(domain.set_watchdog(1, 1, 80), Ok(0));
    assert_eq!((domain.watchdog(), domain.set_watchdog(2, 0, 0)), (60, Ok(0)));
    assert_eq!(domain.watchdog(), 80);
    assert_eq!(domain.set_watchdog(u32::MAX, 1, 5), Err(Errno::EINVAL));
}
