//! Frames with one thing wrong each, and what is fatal.

use janus_proto::addr::{GrantRef, Port};
use janus_proto::ring::Front;

use super::*;
use crate::memory::fake::Pages;

/// Page 0 is the transmit ring, 2 the receive ring, 4 and 6 data.
const DATA: GrantRef = GrantRef(4);

struct World {
    tx: Front<<Pages as GrantMapper>::Mapping, TX_SLOT_WORDS>,
    rx: Front<<Pages as GrantMapper>::Mapping, RX_SLOT_WORDS>,
    back: Netback<Pages, Cable>,
    wire: Cable,
    pages: Pages,
}

impl World {
    fn new() -> Self {
        let pages = Pages::new(8);
        let (tx, rx) = (Front::new(pages.page(0)).unwrap(), Front::new(pages.page(2)).unwrap());
        let frontend = Frontend {
            tx_ring: GrantRef(0),
            rx_ring: GrantRef(2),
            tx_port: Port(1),
            rx_port: Port(1),
            sg: true,
            gso_tcpv4: true,
            gso_tcpv6: false,
            checksum_offload: true,
            hash: false,
        };
        let (near, wire) = Cable::pair();
        let back = Netback::connect(pages.clone(), near, frontend).unwrap();
        Self { tx, rx, back, wire, pages }
    }

    fn slot(&mut self, id: u16, flags: NetTxFlags, offset: u16, size: u16) {
        self.tx.push(&NetTxRequest { gref: DATA, offset, flags, id, size }).unwrap();
    }

    fn serve(&mut self) -> Result<Notify, NetbackError> {
        let _ = self.tx.publish();
        let _ = self.rx.publish();
        self.back.serve()
    }

    fn responses(&mut self) -> Vec<(u16, i16)> {
        std::iter::from_fn(|| self.tx.pop::<NetTxResponse>().unwrap())
            .map(|response| (response.id, response.status))
            .collect()
    }
}

#[test]
fn a_frame_of_several_slots_is_put_together() {
    let mut world = World::new();
    assert!(copy_in(&world.pages.page(4), 0, &[1; 2048]));
    assert!(copy_in(&world.pages.page(4), 2048, &[2; 2048]));
    // 100 bytes from 2000 on in the first slot, whose size is that of the frame.
    let first = NetTxFlags::MORE_DATA | NetTxFlags::EXTRA_INFO | NetTxFlags::CSUM_BLANK;
    world.slot(7, first, 2000, 150);
    let extra = NetExtraInfo {
        kind: ExtraType::GSO,
        gso_size: 1400,
        gso_type: GsoType::TCPV4,
        ..NetExtraInfo::new_zeroed()
    };
    world.tx.push(&extra).unwrap();
    world.slot(9, NetTxFlags::empty(), 4046, 50);
    assert!(world.serve().unwrap().tx);
    let frame = world.wire.receive().unwrap();
    assert_eq!(frame.bytes, [vec![1; 48], vec![2; 102]].concat());
    assert!(frame.checksum_blank && !frame.validated);
    assert_eq!(frame.gso, Some(Gso { size: 1400, kind: GsoType::TCPV4 }));
    assert_eq!(world.responses(), [(7, 0), (0, 1), (9, 0)]);
}

#[test]
fn a_malformed_frame_is_refused_and_the_next_one_goes() {
    let more = NetTxFlags::MORE_DATA;
    let none = NetTxFlags::empty();
    for (what, slots) in [
        ("shorter than a header", &[(none, 0, 13)][..]),
        ("empty", &[(none, 0, 0)]),
        ("across its page", &[(none, 4090, 14)]),
        ("an offset beyond the page", &[(none, u16::MAX, 60)]),
        ("parts longer than the whole", &[(more, 0, 60), (none, 0, 61)]),
        ("longer than a page in one slot", &[(none, 0, 5000)]),
    ] {
        let mut world = World::new();
        for (id, (flags, offset, size)) in (1..).zip(slots) {
            world.slot(id, *flags, *offset, *size);
        }
        world.slot(99, none, 0, 60);
        assert!(world.serve().unwrap().tx, "{what}");
        assert_eq!(world.wire.receive().map(|frame| frame.bytes.len()), Some(60), "{what}");
        assert_eq!(world.wire.receive(), None);
        let responses = world.responses();
        let (last, bad) = responses.split_last().unwrap();
        assert_eq!(*last, (99, 0));
        assert!(bad.len() == slots.len() && bad.iter().all(|response| response.1 == -1), "{what}");
        assert_eq!(world.back.dropped(), 1);
    }
    let mut world = World::new();
    let (gref, flags) = (GrantRef(44), none);
    world.tx.push(&NetTxRequest { gref, offset: 0, flags, id: 3, size: 60 }).unwrap();
    world.serve().unwrap();
    assert_eq!(world.responses(), [(3, -1)], "a page that is not granted");
}

#[test]
fn what_cannot_be_answered_is_fatal() {
    let more = NetTxFlags::MORE_DATA;
    let mut world = World::new();
    world.slot(1, more, 0, 100);
    assert_eq!(world.serve(), Err(NetbackError::Truncated));
    let mut world = World::new();
    world.slot(1, NetTxFlags::EXTRA_INFO, 0, 100);
    assert_eq!(world.serve(), Err(NetbackError::Truncated));
    let mut world = World::new();
    world.slot(1, NetTxFlags::EXTRA_INFO, 0, 100);
    world.tx.push(&NetExtraInfo { kind: ExtraType(9), ..NetExtraInfo::new_zeroed() }).unwrap();
    assert_eq!(world.serve(), Err(NetbackError::BadExtra));
    for extra in [false, true] {
        let mut world = World::new();
        let flags = if extra { NetTxFlags::EXTRA_INFO } else { more };
        world.slot(1, flags, 0, 4000);
        for id in 2..100 {
            if extra {
                let (kind, flags) = (ExtraType::GSO, EXTRA_FLAG_MORE);
                world.tx.push(&NetExtraInfo { kind, flags, ..NetExtraInfo::new_zeroed() }).unwrap();
            } else {
                world.slot(id, more, 0, 10);
            }
        }
        assert_eq!(world.serve(), Err(NetbackError::TooManySlots), "extra: {extra}");
    }
    let mut world = World::new();
    world.pages.page(0)[0].store(1000, janus_proto::sync::Ordering::Relaxed);
    assert_eq!(world.back.serve(), Err(NetbackError::Ring(RingError::Overrun)));
}

#[test]
fn a_frame_waits_for_pages_and_then_wakes_the_guest() {
    let mut world = World::new();
    world.wire.send(Frame { bytes: vec![3; 5000], ..Frame::default() });
    let page = |id, gref| NetRxRequest { id, pad: 0, gref: GrantRef(gref) };
    world.rx.push(&page(0, 4)).unwrap();
    assert_eq!(world.serve().unwrap(), Notify::default(), "one page is not enough");
    world.rx.push(&page(1, 6)).unwrap();
    assert!(world.rx.publish(), "the backend waits for pages and asked to be told");
    assert!(world.back.serve().unwrap().rx);
    let got: Vec<NetRxResponse> =
        std::iter::from_fn(|| world.rx.pop::<NetRxResponse>().unwrap()).collect();
    let summary: Vec<_> = got.iter().map(|r| (r.id, r.offset, r.flags, r.status)).collect();
    let (more, none) = (NetRxFlags::MORE_DATA, NetRxFlags::empty());
    assert_eq!(summary, [(0, 0, more, 4096), (1, 0, none, 904)]);
    assert!(!world.rx.final_check_for_responses());
    // A page that may not be written: an error for the slot, not for the card.
    world.wire.send(Frame { bytes: vec![3; 60], ..Frame::default() });
    world.rx.push(&page(2, 5)).unwrap();
    assert!(world.serve().unwrap().rx);
    assert_eq!(world.rx.pop::<NetRxResponse>().unwrap().unwrap().status, -1);
}

#[test]
fn groups_are_changed_by_frames_that_go_nowhere() {
    let mut world = World::new();
    let extra = |kind| NetExtraMulticast { kind, flags: 0, address: [1, 0, 0x5e, 0, 0, 9] };
    for kind in [ExtraType::MCAST_ADD, ExtraType::MCAST_DEL] {
        world.slot(1, NetTxFlags::EXTRA_INFO, 0, 60);
        world.tx.push(&extra(kind)).unwrap();
        world.slot(2, NetTxFlags::empty(), 0, 61);
        world.serve().unwrap();
        // A cable knows nothing of groups.
        assert_eq!(world.responses(), [(1, -1), (0, 1), (2, 0)]);
        assert_eq!(world.wire.receive().map(|frame| frame.bytes.len()), Some(61));
        assert_eq!(world.wire.receive(), None);
    }
}
