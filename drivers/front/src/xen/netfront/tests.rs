//! The card's driver over fake Xen, against a small honest backend and against lies.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers of the test's own"
)]

use std::sync::atomic::Ordering;

use janus_proto::ring::Back;
use proptest::prelude::*;

use super::*;
use crate::class::{PartialChecksum, Segmentation};
use crate::fake::{FakeXen, Mapping, hal_of};

const PEER: DomId = DomId(3);
const MAC: [u8; 6] = [0, 0x16, 0x3e, 1, 2, 3];

#[expect(clippy::fn_params_excessive_bools, reason = "the two features that the tests vary")]
fn offer(scatter_gather: bool, split: bool) -> Offer {
    Offer {
        mac: MAC,
        mtu: 1500,
        scatter_gather,
        split_event_channels: split,
        queues: 1,
        offloads: if scatter_gather { NetOffloads::all() } else { NetOffloads::TX_CHECKSUM },
    }
}

struct Rig {
    xen: &'static FakeXen,
    front: Netfront,
    grave: Grave,
    tx: Back<Mapping, TX_SLOT_WORDS>,
    rx: Back<Mapping, RX_SLOT_WORDS>,
}

/// A frame as the backend saw it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    data: Vec<u8>,
    flags: NetTxFlags,
    gso: Option<(u16, GsoType)>,
}

fn rig(offer: Offer) -> Rig {
    let xen = FakeXen::new();
    let grave = Grave::default();
    let mut front = Netfront::new(hal_of(xen), PEER, offer, grave.clone()).unwrap();
    front.kick();
    let map = |gref| xen.map(PEER, gref, GrantAccess::ReadWrite).unwrap();
    let [tx, rx] = front.refs;
    let (tx, rx) = (Back::attach(map(tx)).unwrap(), Back::attach(map(rx)).unwrap());
    Rig { xen, front, grave, tx, rx }
}

impl Rig {
    fn frame(&self, len: usize, seed: u8) -> TxFrame {
        let mut buf = DmaBuf::new(self.xen, TX_HEADROOM + len).unwrap();
        for (at, byte) in buf[TX_HEADROOM..TX_HEADROOM + len].iter_mut().enumerate() {
            *byte = (at as u8).wrapping_mul(31) ^ seed;
        }
        TxFrame { buf, len, checksum: None, segmentation: None }
    }

    /// Takes one frame off the transmit ring; the ids of its slots are for [`Self::sent`].
    fn take_frame(&mut self) -> Option<(Seen, Vec<u16>)> {
        let first = self.tx.pop::<NetTxRequest>().unwrap()?;
        let mut gso = None;
        if first.flags.contains(NetTxFlags::EXTRA_INFO) {
            let extra = self.tx.pop::<NetExtraInfo>().unwrap().unwrap();
            assert_eq!((extra.kind, extra.flags), (ExtraType::GSO, 0));
            gso = Some((extra.gso_size, extra.gso_type));
        }
        let mut rest = Vec::new();
        let mut last = first;
        while last.flags.contains(NetTxFlags::MORE_DATA) {
            last = self.tx.pop::<NetTxRequest>().unwrap().unwrap();
            rest.push(last);
        }
        // As netback: the first slot has what the others leave of the whole.
        let others: u16 = rest.iter().map(|slot| slot.size).sum();
        let mut data = Vec::new();
        for (slot, size) in
            std::iter::once((first, first.size - others)).chain(rest.iter().map(|s| (*s, s.size)))
        {
            assert!(usize::from(slot.offset) + usize::from(size) <= PAGE_SIZE && size > 0);
            let page = self.xen.map(PEER, slot.gref, GrantAccess::ReadOnly).unwrap();
            let bytes: Vec<u8> =
                page.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
            data.extend_from_slice(&bytes[usize::from(slot.offset)..][..usize::from(size)]);
        }
        let ids = std::iter::once(first.id).chain(rest.iter().map(|slot| slot.id)).collect();
        Some((Seen { data, flags: first.flags, gso }, ids))
    }

    fn sent(&mut self, ids: &[u16], extra: bool) -> bool {
        for (at, &id) in ids.iter().enumerate() {
            self.tx.push(&NetTxResponse { id, status: NetStatus::OKAY.0 }).unwrap();
            if at == 0 && extra {
                self.tx.push(&NetTxResponse { id: 0xbad, status: NetStatus::NULL.0 }).unwrap();
            }
        }
        self.tx.publish()
    }

    /// Delivers one frame in parts, each into the page that is posted next.
    fn deliver(&mut self, parts: &[(u16, &[u8])], flags: NetRxFlags, extra: bool) -> bool {
        for (at, (offset, data)) in parts.iter().enumerate() {
            let request = self.rx.pop::<NetRxRequest>().unwrap().unwrap();
            let page = self.xen.map(PEER, request.gref, GrantAccess::ReadWrite).unwrap();
            let mut bytes: Vec<u8> =
                page.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
            bytes[usize::from(*offset)..][..data.len()].copy_from_slice(data);
            for (word, value) in page.iter().zip(bytes.chunks(4)) {
                word.store(u32::from_ne_bytes(value.try_into().unwrap()), Ordering::Relaxed);
            }
            let mut own = NetRxFlags::empty();
            if at == 0 {
                own |= flags;
                own.set(NetRxFlags::EXTRA_INFO, extra);
            }
            own.set(NetRxFlags::MORE_DATA, at + 1 < parts.len());
            let status = data.len() as i16;
            self.rx
                .push(&NetRxResponse { id: request.id, offset: *offset, flags: own, status })
                .unwrap();
            if at == 0 && extra {
                self.rx.pop::<NetRxRequest>().unwrap().unwrap();
                let (kind, gso_type) = (ExtraType::GSO, GsoType::TCPV4);
                let info = NetExtraInfo {
                    kind,
                    flags: 0,
                    gso_size: 1460,
                    gso_type,
                    gso_pad: 0,
                    gso_features: 0,
                };
                self.rx.push(&info).unwrap();
            }
        }
        self.rx.publish()
    }

    /// Answers the page that is posted next with anything.
    fn respond(&mut self, offset: u16, flags: NetRxFlags, status: i16) {
        let request = self.rx.pop::<NetRxRequest>().unwrap().unwrap();
        self.rx.push(&NetRxResponse { id: request.id, offset, flags, status }).unwrap();
        let _ = self.rx.publish();
    }

    fn received(&mut self) -> Option<(Vec<u8>, RxChecksum)> {
        let mut parts = Vec::new();
        let checksum = self.front.receive(&mut parts).unwrap()?;
        let mut data = Vec::new();
        for part in parts {
            data.extend_from_slice(&part.buf[part.offset..part.offset + part.len]);
            self.front.recycle(part.buf);
        }
        Some((data, checksum))
    }

    fn finish(self) {
        let Rig { xen, front, grave, tx, rx } = self;
        drop(front);
        drop((tx, rx));
        grave.empty();
        assert_eq!((xen.granted(), xen.leaked_pages(), xen.open_ports()), (0, 0, 0));
        assert_eq!(xen.allocated_pages(), 0);
    }
}

#[test]
fn frames_of_every_length_arrive_whole() {
    let mut rig = rig(offer(true, true));
    for len in [14, 60, 1514, 4079, 4080, 4081, 8176, 8177, 40_000, 65_535] {
        let frame = rig.frame(len, 7);
        let expected = frame.buf[TX_HEADROOM..TX_HEADROOM + len].to_vec();
        rig.front.transmit(frame).unwrap();
        assert!(rig.take_frame().is_none(), "nothing is visible before the kick");
        rig.front.kick();
        let (seen, ids) = rig.take_frame().unwrap();
        assert_eq!(seen.flags & !NetTxFlags::MORE_DATA, NetTxFlags::empty());
        assert!(seen.data == expected && seen.gso.is_none(), "{len}");
        assert!(rig.front.transmitted().unwrap().is_none());
        rig.sent(&ids, false);
        assert!(rig.front.transmitted().unwrap().is_some());
        assert!(rig.front.transmitted().unwrap().is_none());
    }
    rig.finish();
}

#[test]
fn offloads_are_said_in_the_first_slot() {
    let mut rig = rig(offer(true, false));
    let mut frame = rig.frame(30_000, 1);
    frame.checksum = Some(PartialChecksum { start: 34, offset: 16 });
    frame.segmentation = Some(Segmentation { mss: 1460, header_len: 54, ipv6: false });
    rig.front.transmit(frame).unwrap();
    rig.front.kick();
    let (seen, ids) = rig.take_frame().unwrap();
    let said = NetTxFlags::CSUM_BLANK | NetTxFlags::DATA_VALIDATED | NetTxFlags::EXTRA_INFO;
    assert!(seen.flags.contains(said));
    assert_eq!(seen.gso, Some((1460, GsoType::TCPV4)));
    rig.sent(&ids, true);
    assert!(rig.front.transmitted().unwrap().is_some());
    assert_eq!(rig.front.tx_free.len(), 256, "the slot of the extra information is free again");
    rig.finish();
}

#[test]
fn what_cannot_be_sent_is_dropped_with_its_buffer() {
    let mut rig = rig(offer(false, false));
    let mut frames = vec![rig.frame(13, 0), rig.frame(5000, 0)];
    let mut beyond = rig.frame(60, 0);
    beyond.len = 4081;
    frames.push(beyond);
    let mut segmented = rig.frame(600, 0);
    segmented.checksum = Some(PartialChecksum { start: 34, offset: 16 });
    segmented.segmentation = Some(Segmentation { mss: 100, header_len: 54, ipv6: true });
    frames.push(segmented);
    for frame in frames {
        rig.front.transmit(frame).unwrap();
        rig.front.kick();
        assert!(rig.take_frame().is_none());
        assert!(rig.front.transmitted().unwrap().is_some());
    }
    rig.finish();
}

#[test]
fn a_full_ring_gives_frames_back_and_takes_them_later() {
    let mut rig = rig(offer(true, true));
    let mut taken = 0;
    let back = loop {
        let frame = rig.frame(12_000, taken as u8);
        match rig.front.transmit(frame) {
            Ok(()) => taken += 1,
            Err(back) => break back,
        }
    };
    assert_eq!(taken, 256 / 3);
    rig.front.kick();
    assert!(!rig.front.arm());
    let mut told = 0;
    while let Some((_, ids)) = rig.take_frame() {
        told += usize::from(rig.sent(&ids, false));
    }
    assert_eq!(told, 1, "one event for many frames");
    let mut done = 0;
    while rig.front.transmitted().unwrap().is_some() {
        done += 1;
    }
    assert_eq!(done, taken);
    rig.front.transmit(back).unwrap();
    rig.finish();
}

#[test]
fn frames_are_received_in_parts_with_and_without_extra_information() {
    let mut rig = rig(offer(true, true));
    let data: Vec<u8> = (0..12_000).map(|at| (at / 3) as u8).collect();
    for round in 0..300 {
        assert_eq!(rig.front.arm(), rig.front.tx.as_ref().unwrap().outstanding() > 0);
        let parts: [(u16, &[u8]); 4] = [
            (100, &data[..3900]),
            (0, &data[3900..7900]),
            (0, &data[7900..11_900]),
            (0, &data[11_900..]),
        ];
        let flags = if round % 2 == 0 { NetRxFlags::CSUM_BLANK } else { NetRxFlags::empty() };
        assert!(rig.deliver(&parts, flags, round % 3 == 0), "the front had asked");
        assert!(rig.front.arm());
        let (got, checksum) = rig.received().unwrap();
        assert!(got == data);
        let trusted = if round % 2 == 0 { RxChecksum::Trusted } else { RxChecksum::Unknown };
        assert_eq!(checksum, trusted);
        assert!(rig.received().is_none());
        rig.front.kick();
    }
    assert_eq!(posted(&rig), rig.front.rx_target, "every page is posted again");
    rig.finish();
}

/// Pages posted for receiving.
fn posted(rig: &Rig) -> usize {
    rig.front.rx.as_ref().unwrap().outstanding() as usize
}

#[test]
fn a_card_that_is_used_gets_more_pages_to_receive_into() {
    let mut rig = rig(offer(true, true));
    assert_eq!(posted(&rig), RX_BUFFERS_FIRST);
    for wanted in [RX_BUFFERS_FIRST * 2, RX_BUFFERS, RX_BUFFERS] {
        // More than half of what is posted, before anybody looks.
        let count = posted(&rig) / 2 + 1;
        for _ in 0..count {
            rig.deliver(&[(0, b"frame")], NetRxFlags::empty(), false);
        }
        for _ in 0..count {
            assert_eq!(rig.received().unwrap().0, b"frame");
        }
        rig.front.kick();
        assert_eq!(posted(&rig), wanted);
    }
    rig.finish();
}

#[test]
fn a_failed_part_drops_its_frame_and_nothing_else() {
    let more = NetRxFlags::MORE_DATA;
    let none = NetRxFlags::empty();
    let mut rig = rig(offer(true, true));
    // Failed; beyond the page; a bad part in the middle; then a good frame.
    rig.respond(0, none, NetStatus::ERROR.0);
    rig.respond(4000, none, 97);
    rig.respond(0, more, 4096);
    rig.respond(u16::MAX, more, i16::MAX);
    rig.respond(0, none, 10);
    rig.deliver(&[(0, b"good frame")], none, false);
    assert_eq!(rig.received().unwrap().0, b"good frame");
    assert!(rig.received().is_none());
    rig.front.kick();
    assert_eq!(posted(&rig), rig.front.rx_target);
    rig.finish();
}

#[test]
fn a_backend_that_lies_breaks_the_card() {
    let more = NetRxFlags::MORE_DATA;
    for lie in 0..7 {
        let mut rig = rig(offer(true, true));
        let frame = rig.frame(100, 0);
        rig.front.transmit(frame).unwrap();
        rig.front.kick();
        let (_, ids) = rig.take_frame().unwrap();
        match lie {
            0 => drop(rig.sent(&[999], false)),
            1 => drop(rig.sent(&[ids[0] + 1], false)),
            2 => {
                let frame = rig.frame(100, 0);
                rig.front.transmit(frame).unwrap();
                rig.front.kick();
                rig.take_frame().unwrap();
                rig.sent(&[ids[0], ids[0]], false);
            }
            3 => rig.respond(0, more, 100),
            4 => (0..40).for_each(|_| rig.respond(0, more, 100)),
            5 => rig.respond(0, NetRxFlags::EXTRA_INFO, 100),
            _ => {
                let page = rig.xen.map(PEER, rig.front.refs[1], GrantAccess::ReadWrite).unwrap();
                page[janus_proto::abi::xen_io::ring::RSP_PROD].store(300, Ordering::Relaxed);
            }
        }
        let mut parts = Vec::new();
        let mut errors = 0;
        for _ in 0..3 {
            errors += usize::from(rig.front.receive(&mut parts).is_err());
            assert!(parts.is_empty());
            errors += usize::from(rig.front.transmitted().is_err());
        }
        assert_eq!(errors, 1, "lie {lie} is told once");
        assert!(!rig.front.link_up() && !rig.front.arm());
        let frame = rig.frame(100, 0);
        assert!(rig.front.transmit(frame).is_err());
        rig.front.kick();
        rig.finish();
    }
}

#[test]
fn a_page_that_the_backend_holds_is_leaked_and_replaced() {
    let mut rig = rig(offer(true, true));
    let before = rig.xen.allocated_pages();
    let request = rig.rx.pop::<NetRxRequest>().unwrap().unwrap();
    rig.xen.hold(request.gref);
    let (id, flags) = (request.id, NetRxFlags::empty());
    rig.rx.push(&NetRxResponse { id, offset: 0, flags, status: 60 }).unwrap();
    let _ = rig.rx.publish();
    assert!(rig.received().is_none(), "its frame is lost");
    rig.front.kick();
    assert_eq!(rig.xen.leaked_pages(), 1);
    assert_eq!(rig.xen.allocated_pages(), before + 1);
    assert_eq!(posted(&rig), rig.front.rx_target);
}

#[test]
fn shortages_at_birth_are_errors_and_later_ones_are_waited_out() {
    let xen = FakeXen::new();
    let new = || Netfront::new(hal_of(xen), PEER, offer(true, true), Grave::default()).map(drop);
    xen.limit_ports(Some(1));
    assert_eq!(new(), Err(HalError::NoPort));
    xen.limit_ports(None);
    xen.limit_grants(Some(1));
    assert_eq!(new(), Err(HalError::NoGrants));
    xen.limit_grants(Some(2));
    assert_eq!(new(), Err(HalError::NoMemory), "no page to receive into");
    xen.limit_grants(None);

    let mut rig = rig(offer(true, true));
    rig.xen.limit_grants(Some(0));
    let frame = rig.frame(100, 0);
    let frame = rig.front.transmit(frame).unwrap_err();
    rig.deliver(&[(0, b"x")], NetRxFlags::empty(), false);
    assert_eq!(rig.received().unwrap().0, b"x");
    rig.front.kick();
    assert_eq!(posted(&rig), rig.front.rx_target - 1);
    rig.xen.limit_grants(None);
    rig.front.transmit(frame).unwrap();
    rig.front.kick();
    assert_eq!(posted(&rig), rig.front.rx_target);
    rig.finish();
}

proptest! {
    #[test]
    fn any_traffic_arrives_in_order_and_frees_everything(
        work in prop::collection::vec((0..5u8, 14..30_000usize, any::<prop::sample::Index>()), 1..150),
        split in any::<bool>(),
    ) {
        let mut rig = rig(offer(true, split));
        let mut expected = VecDeque::new();
        let mut unanswered: Vec<(Vec<u16>, bool)> = Vec::new();
        let mut received = VecDeque::new();
        for (what, len, pick) in work {
            match what {
                0 | 1 => {
                    let mut frame = rig.frame(len, len as u8);
                    if what == 1 {
                        frame.checksum = Some(PartialChecksum { start: 34, offset: 16 });
                        frame.segmentation = Some(Segmentation { mss: 1000, header_len: 54, ipv6: true });
                    }
                    let data = frame.buf[TX_HEADROOM..TX_HEADROOM + len].to_vec();
                    if rig.front.transmit(frame).is_ok() {
                        expected.push_back((data, what == 1));
                    }
                }
                2 => {
                    rig.front.kick();
                    while let Some((seen, ids)) = rig.take_frame() {
                        let (data, segmented) = expected.pop_front().unwrap();
                        prop_assert!(seen.data == data);
                        prop_assert_eq!(seen.gso.is_some(), segmented);
                        unanswered.push((ids, segmented));
                    }
                }
                3 if !unanswered.is_empty() => {
                    let (ids, extra) = unanswered.remove(pick.index(unanswered.len()));
                    rig.sent(&ids, extra);
                    while rig.front.transmitted().unwrap().is_some() {}
                }
                _ => {
                    let data: Vec<u8> = (0..len).map(|at| at as u8).collect();
                    let parts: Vec<(u16, &[u8])> = data.chunks(4096).map(|part| (0, part)).collect();
                    if rig.rx.waiting().unwrap() as usize > parts.len() {
                        rig.deliver(&parts, NetRxFlags::DATA_VALIDATED, len % 2 == 0);
                        received.push_back(data);
                    }
                    if pick.index(2) == 0 {
                        while let Some((got, _)) = rig.received() {
                            prop_assert!(got == received.pop_front().unwrap());
                        }
                        prop_assert!(received.is_empty());
                    }
                }
            }
        }
        rig.finish();
    }

    #[test]
    fn any_responses_are_survived(
        tx in prop::collection::vec((0..300u16, -3..3i16), 0..20),
        rx in prop::collection::vec((any::<u16>(), 0..32u16, any::<i16>()), 0..60),
    ) {
        let mut rig = rig(offer(true, true));
        for _ in 0..20 {
            let frame = rig.frame(100, 0);
            rig.front.transmit(frame).unwrap();
        }
        rig.front.kick();
        while rig.take_frame().is_some() {}
        for (id, status) in tx {
            rig.tx.push(&NetTxResponse { id, status }).unwrap();
        }
        let _ = rig.tx.publish();
        for (offset, flags, status) in rx {
            rig.respond(offset, NetRxFlags::from_bits_retain(flags), status);
        }
        let mut parts = Vec::new();
        for _ in 0..80 {
            let _ = rig.front.transmitted();
            if rig.front.receive(&mut parts).is_ok() {
                for part in parts.drain(..) {
                    prop_assert!(part.offset + part.len <= part.buf.len());
                    rig.front.recycle(part.buf);
                }
            }
        }
        rig.front.kick();
        rig.finish();
    }
}
