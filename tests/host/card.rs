//! netfront against netback.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use janus::memory::GrantMapper as _;
use janus::netback::{self, Cable, Frame, Gso, NetBackend as _, Netback, NetbackFeatures};
use janus_front::class::{
    NetDevice as _, NetOffloads, PartialChecksum, RxChecksum, Segmentation, TX_HEADROOM, TxFrame,
};
use janus_front::dma::DmaBuf;
use janus_front::fake::{FakeXen, hal_of};
use janus_front::xen::grants::Grave;
use janus_front::xen::netfront::Netfront;
use janus_front::xen::netfront_xs::{OFFER_NODES, Offer};
use janus_front::xen::nodes::Nodes;
use janus_proto::abi::xen_io::netif::GsoType;
use janus_proto::grant::Access;
use proptest::prelude::*;

use crate::world::{HOST, Mapper, Store};

/// A connected card with both ends, the other end of its cable, and the events between.
struct Card {
    xen: &'static FakeXen,
    front: Option<Netfront>,
    back: Option<Netback<Mapper, Cable>>,
    wire: Cable,
    frontend: netback::Frontend,
    grave: Grave,
}

impl Card {
    fn new(features: NetbackFeatures, wanted: NetOffloads) -> Self {
        let xen = FakeXen::new();
        let mut store = Store::new("vif", 0);
        store.publish_back(&netback::offer_nodes(features));
        let mut own = Nodes::default();
        own.insert("mac", b"00:16:3e:00:00:05");
        let offer = Offer::read(&store.back_nodes(OFFER_NODES), &own, wanted).unwrap();
        let grave = Grave::default();
        let front = Netfront::new(hal_of(xen), HOST, offer, grave.clone()).unwrap();
        store.publish_front(&front.publication());
        let store = RefCell::new(store);
        let frontend =
            netback::Frontend::read(&|node| store.borrow_mut().front_node(node)).unwrap();
        assert_eq!(frontend.tx_port != frontend.rx_port, features.split_event_channels);
        let (near, wire) = Cable::pair();
        let back = Netback::connect(Mapper(xen), near, frontend).unwrap();
        let mut this = Self { xen, front: Some(front), back: Some(back), wire, frontend, grave };
        this.front().kick();
        this
    }

    fn front(&mut self) -> &mut Netfront {
        self.front.as_mut().unwrap()
    }

    fn serve(&mut self) {
        let notify = self.back.as_mut().unwrap().serve().unwrap();
        for (due, port) in [(notify.tx, self.frontend.tx_port), (notify.rx, self.frontend.rx_port)]
        {
            assert!(!due || self.xen.notify_guest(port));
        }
    }

    /// Sends a frame; `false`: the queue is full.
    fn send(&mut self, bytes: &[u8], checksum: bool, segmentation: Option<Segmentation>) -> bool {
        let mut buf = DmaBuf::new(self.xen, TX_HEADROOM + bytes.len()).unwrap();
        buf[TX_HEADROOM..TX_HEADROOM + bytes.len()].copy_from_slice(bytes);
        let checksum = checksum.then_some(PartialChecksum { start: 34, offset: 16 });
        let frame = TxFrame { buf, len: bytes.len(), checksum, segmentation };
        self.front().transmit(frame).is_ok()
    }

    /// Takes a received frame and gives its pages back.
    fn receive(&mut self) -> Option<(Vec<u8>, RxChecksum)> {
        let mut parts = Vec::new();
        let checksum = self.front().receive(&mut parts).unwrap()?;
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend_from_slice(&part.buf[part.offset..part.offset + part.len]);
            self.front().recycle(part.buf);
        }
        Some((bytes, checksum))
    }

    fn close(mut self) {
        self.back = None;
        drop(self.front.take());
        self.grave.empty();
        let left = (self.xen.granted(), self.xen.allocated_pages(), self.xen.open_ports());
        assert_eq!(left, (0, 0, 0), "left behind");
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index % 241).unwrap() ^ seed).collect()
}

fn every_feature_set() -> impl Iterator<Item = NetbackFeatures> {
    (0..8).map(|bits| NetbackFeatures {
        sg: bits & 1 != 0,
        gso: bits & 2 != 0,
        split_event_channels: bits & 4 != 0,
        ..NetbackFeatures::default()
    })
}

#[test]
fn frames_of_every_kind_arrive_with_every_set_of_features() {
    for features in every_feature_set() {
        let mut card = Card::new(features, NetOffloads::all());
        let offloads = card.front().properties().offloads;
        assert_eq!(offloads.contains(NetOffloads::TX_TSO4), features.sg && features.gso);
        for len in [14, 60, 1514, 4080, 4081, 9014, 65000] {
            // Longer ones leave the guest in several slots.
            let frame = pattern(len, 7);
            let goes = TX_HEADROOM + len <= 4096 || features.sg;
            assert!(card.send(&frame, true, None));
            card.front().kick();
            card.serve();
            let sent = card.wire.receive();
            assert_eq!(sent.is_some(), goes, "{features:?} {len}");
            if let Some(sent) = sent {
                assert!(sent.bytes == frame && sent.checksum_blank && sent.gso.is_none());
            }
            assert!(card.front().transmitted().unwrap().is_some());

            card.wire.send(Frame {
                bytes: frame.clone(),
                checksum_blank: true,
                ..Frame::default()
            });
            card.serve();
            let (bytes, checksum) = card.receive().unwrap();
            assert!(bytes == frame, "{features:?} {len}");
            assert_eq!(checksum, RxChecksum::Trusted);
            card.front().kick();
        }
        for (ipv6, kind) in [(false, GsoType::TCPV4), (true, GsoType::TCPV6)] {
            let frame = pattern(20_000, 9);
            let how = Segmentation { mss: 1448, header_len: 66, ipv6 };
            assert!(card.send(&frame, true, Some(how)));
            card.front().kick();
            card.serve();
            let gso = Some(Gso { size: 1448, kind });
            match card.wire.receive() {
                Some(sent) => assert!(sent.bytes == frame && sent.gso == gso),
                None => assert!(!features.sg || !features.gso),
            }
            assert!(card.front().transmitted().unwrap().is_some());
            let (bytes, checksum_blank) = (frame.clone(), true);
            card.wire.send(Frame { bytes, checksum_blank, gso, validated: false });
            card.serve();
            assert!(card.receive().unwrap().0 == frame);
            card.front().kick();
        }
        assert_eq!(card.back.as_ref().unwrap().dropped(), 0);
        card.close();
    }
}

#[test]
fn what_the_frontend_did_not_ask_for_is_not_delivered() {
    let mut card = Card::new(NetbackFeatures::default(), NetOffloads::empty());
    let bytes = pattern(3000, 1);
    card.wire.send(Frame { bytes: bytes.clone(), checksum_blank: true, ..Frame::default() });
    let gso = Some(Gso { size: 1448, kind: GsoType::TCPV4 });
    card.wire.send(Frame { bytes: bytes.clone(), gso, ..Frame::default() });
    card.wire.send(Frame { bytes: bytes.clone(), ..Frame::default() });
    card.serve();
    assert_eq!(card.receive(), Some((bytes, RxChecksum::Unknown)));
    assert_eq!(card.receive(), None);
    assert_eq!(card.back.as_ref().unwrap().dropped(), 2);
    card.close();
}

#[test]
fn a_sleeping_guest_is_woken_for_each_frame() {
    for features in every_feature_set() {
        let mut card = Card::new(features, NetOffloads::empty());
        for round in 0..600_u32 {
            while card.front().arm() {
                assert!(card.receive().is_some() || card.front().transmitted().unwrap().is_some());
            }
            card.xen.take_for_guest(card.frontend.rx_port);
            card.wire.send(Frame { bytes: pattern(100, 3), ..Frame::default() });
            card.serve();
            assert!(card.xen.take_for_guest(card.frontend.rx_port), "asleep at frame {round}");
            assert!(card.receive().is_some());
            card.front().kick();
        }
        card.close();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize, u8),
    Arrive(usize, u8),
    Kick,
    Serve,
    Receive,
    Transmitted,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![14_usize..200, 1000_usize..9100, 14_usize..30_000];
    let step = prop_oneof![
        4 => (len.clone(), any::<u8>()).prop_map(|(len, seed)| Step::Send(len, seed)),
        4 => (len, any::<u8>()).prop_map(|(len, seed)| Step::Arrive(len, seed)),
        3 => Just(Step::Kick),
        2 => Just(Step::Serve),
        4 => Just(Step::Receive),
        2 => Just(Step::Transmitted),
    ];
    prop::collection::vec(step, 0..250)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// In any rhythm both directions are queues: each frame arrives once, whole and in order.
    #[test]
    fn any_rhythm_equals_two_queues(steps in steps(), split: bool) {
        let features = NetbackFeatures { split_event_channels: split, ..NetbackFeatures::default() };
        let mut card = Card::new(features, NetOffloads::all());
        let (mut outward, mut inward) = (VecDeque::new(), VecDeque::new());
        let (mut sent, mut returned) = (0, 0);
        for step in steps {
            match step {
                Step::Send(len, seed) => {
                    if card.send(&pattern(len, seed), false, None) {
                        outward.push_back(pattern(len, seed));
                        sent += 1;
                    }
                }
                Step::Arrive(len, seed) => {
                    card.wire.send(Frame { bytes: pattern(len, seed), ..Frame::default() });
                    inward.push_back(pattern(len, seed));
                }
                Step::Kick => card.front().kick(),
                Step::Serve => card.serve(),
                Step::Receive => {
                    if let Some((bytes, _)) = card.receive() {
                        prop_assert!(inward.pop_front() == Some(bytes));
                    }
                }
                Step::Transmitted => returned += u32::from(card.front().transmitted().unwrap().is_some()),
            }
            while let Some(frame) = card.wire.receive() {
                prop_assert!(outward.pop_front() == Some(frame.bytes));
            }
        }
        for _ in 0..1000 {
            card.front().kick();
            card.serve();
            while let Some((bytes, _)) = card.receive() {
                prop_assert!(inward.pop_front() == Some(bytes));
            }
            while card.front().transmitted().unwrap().is_some() {
                returned += 1;
            }
        }
        while let Some(frame) = card.wire.receive() {
            prop_assert!(outward.pop_front() == Some(frame.bytes));
        }
        prop_assert!(inward.is_empty() && outward.is_empty(), "{} in, {} out lost", inward.len(), outward.len());
        prop_assert_eq!(sent, returned);
        card.close();
    }

    /// Whatever the backend writes into the rings, the frontend answers with an error or a frame inside its
    /// own pages, and all memory comes back.
    #[test]
    fn a_lying_backend_is_survived(
        scribbles in prop::collection::vec((0_usize..60, any::<u32>(), 0_u8..3, any::<bool>()), 1..80),
    ) {
        let mut card = Card::new(NetbackFeatures::default(), NetOffloads::all());
        let tx = Mapper(card.xen).map(&[card.frontend.tx_ring], Access::ReadWrite).unwrap();
        let rx = Mapper(card.xen).map(&[card.frontend.rx_ring], Access::ReadWrite).unwrap();
        for (word, value, how, is_tx) in scribbles {
            let ring = if is_tx { &tx } else { &rx };
            match how {
                0 => ring[word % 4].store(value % 260, Ordering::Relaxed),
                1 => ring[16 + word].store(value, Ordering::Relaxed),
                _ => ring[16 + word].store(value & 0x001f_00ff, Ordering::Relaxed),
            }
            card.send(&pattern(5000, 2), false, None);
            card.front().kick();
            let mut parts = Vec::new();
            for _ in 0..20 {
                let _ = card.front().transmitted();
                if let Ok(Some(_)) = card.front().receive(&mut parts) {
                    for part in parts.drain(..) {
                        prop_assert!(part.offset + part.len <= part.buf.len());
                        card.front().recycle(part.buf);
                    }
                }
            }
            let _ = card.front().arm();
        }
        drop((tx, rx));
        card.close();
    }

    /// Whatever the frontend writes, the backend answers with an error and touches only what is granted.
    #[test]
    fn a_lying_frontend_is_survived(
        scribbles in prop::collection::vec((0_usize..60, any::<u32>(), 0_u8..3, any::<bool>()), 1..80),
    ) {
        let mut card = Card::new(NetbackFeatures::default(), NetOffloads::all());
        let tx = Mapper(card.xen).map(&[card.frontend.tx_ring], Access::ReadWrite).unwrap();
        let rx = Mapper(card.xen).map(&[card.frontend.rx_ring], Access::ReadWrite).unwrap();
        for (word, value, how, is_tx) in scribbles {
            let ring = if is_tx { &tx } else { &rx };
            match how {
                0 => ring[word % 4].store(value % 260, Ordering::Relaxed),
                1 => ring[16 + word].store(value, Ordering::Relaxed),
                _ => ring[16 + word].store(value & 0x001f_00ff, Ordering::Relaxed),
            }
            card.wire.send(Frame { bytes: pattern(6000, 2), ..Frame::default() });
            let _ = card.back.as_mut().unwrap().serve();
            while let Some(frame) = card.wire.receive() {
                prop_assert!((14..=65_535).contains(&frame.bytes.len()));
            }
        }
    }
}

#[test]
fn a_backend_that_vanishes_leaves_nothing_behind() {
    let mut card = Card::new(NetbackFeatures::default(), NetOffloads::all());
    for _ in 0..10 {
        assert!(card.send(&pattern(9000, 1), false, None));
        card.wire.send(Frame { bytes: pattern(9000, 1), ..Frame::default() });
    }
    card.front().kick();
    card.serve();
    assert!(card.send(&pattern(9000, 1), false, None));
    card.front().kick();
    assert!(card.receive().is_some());
    card.close();
}
