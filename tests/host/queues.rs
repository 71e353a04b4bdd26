//! Disks and cards with several queues: our frontends against our backends.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use janus::blkback::{self, Blkback, BlkbackFeatures};
use janus::memory::GrantMapper as _;
use janus::netback::{
    self, Cable, CardNet, Frame, FrontendCard, NetBackend as _, Netback, NetbackFeatures, QueueNet,
};
use janus::storage::{MemoryDisk, SharedDisk};
use janus_front::class::{BlockDevice as _, BlockOp, BlockStatus, NetDevice as _, NetOffloads};
use janus_front::class::{TX_HEADROOM, TxFrame};
use janus_front::dma::DmaBuf;
use janus_front::fake::{FakeXen, hal_of};
use janus_front::xen::blkfront_queues::{BlkfrontQueues, QueuesSetup};
use janus_front::xen::blkfront_xs::{self, DETAIL_NODES, Details};
use janus_front::xen::grants::Grave;
use janus_front::xen::netfront_queues::NetfrontQueues;
use janus_front::xen::netfront_xs;
use janus_front::xen::nodes::Nodes;
use janus_proto::addr::GrantRef;
use janus_proto::grant::Access;

use crate::world::{HOST, Mapper, Store};

const QUEUES: u32 = 3;

struct Disk {
    xen: &'static FakeXen,
    front: BlkfrontQueues,
    backs: Vec<(blkback::Frontend, Blkback<Mapper, SharedDisk>)>,
    grave: Grave,
}

impl Disk {
    fn new(features: BlkbackFeatures) -> Self {
        let xen = FakeXen::new();
        let mut store = Store::new("vbd", 51712);
        let disk = SharedDisk::new(Box::new(MemoryDisk::new(4096)));
        store.publish_back(&blkback::offer_nodes(features));
        let offer = store.back_nodes(blkfront_xs::OFFER_NODES);
        let offer = blkfront_xs::Offer::read(&offer).unwrap();
        let setup = QueuesSetup::new(hal_of(xen), HOST, offer, QUEUES).unwrap();
        store.publish_front(&setup.publication());
        store.publish_back(&blkback::detail_nodes(features, &disk));
        let details = Details::read(&store.back_nodes(DETAIL_NODES)).unwrap();
        let store = RefCell::new(store);
        let read = |node: &str| store.borrow_mut().front_node(node);
        let frontends = blkback::Frontend::read_all(&read, features).unwrap();
        let ports: Vec<_> = frontends.iter().map(|frontend| frontend.port).collect();
        assert_eq!(ports, setup.ports());
        let grave = Grave::default();
        let backs = frontends.into_iter().map(|frontend| {
            let back = Blkback::connect(Mapper(xen), disk.clone(), features, &frontend).unwrap();
            (frontend, back)
        });
        let backs = backs.collect();
        Self { xen, front: setup.connect(details, 51712, &grave), backs, grave }
    }

    fn turn(&mut self) {
        for (frontend, back) in &mut self.backs {
            if self.xen.take_for_peer(frontend.port) > 0 && back.serve().unwrap() {
                self.xen.notify_guest(frontend.port);
            }
        }
    }

    /// Does everything at once, as far as there is room; answers how each ended.
    fn run(&mut self, ops: Vec<BlockOp>) -> BTreeMap<u64, (BlockStatus, Option<DmaBuf>)> {
        let count = ops.len();
        let mut done = BTreeMap::new();
        let mut waiting: Vec<_> = (0_u64..).zip(ops).collect();
        waiting.reverse();
        while done.len() < count {
            while let Some((id, op)) = waiting.pop() {
                match self.front.submit(id, op) {
                    Ok(()) => {}
                    Err(janus_front::class::SubmitError::Busy(op)) => {
                        waiting.push((id, op));
                        break;
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
            self.front.kick();
            self.turn();
            while let Some(completion) = self.front.complete().unwrap() {
                done.insert(completion.id, (completion.status, completion.buf));
            }
            self.front.arm();
        }
        done
    }

    fn close(self) {
        drop(self.backs);
        drop(self.front);
        self.grave.empty();
        let left = (self.xen.granted(), self.xen.allocated_pages(), self.xen.open_ports());
        assert_eq!(left, (0, 0, 0), "left behind");
    }
}

#[test]
fn a_disk_uses_all_its_rings_and_mixes_nothing_up() {
    for persistent in [false, true] {
        for max_ring_page_order in [0, 1] {
            let features =
                BlkbackFeatures { persistent, max_ring_page_order, ..BlkbackFeatures::default() };
            let mut disk = Disk::new(features);
            assert_eq!(disk.backs.len(), QUEUES as usize);
            let slots = if max_ring_page_order == 0 { 32 } else { 64 };
            assert_eq!(u32::from(disk.front.geometry().queue_depth), QUEUES * slots);
            let xen = disk.xen;
            let buf = |seed: u8| {
                let mut buf = DmaBuf::new(xen, 4096).unwrap();
                buf.fill(seed);
                buf
            };
            let write = |index: u8| BlockOp::Write {
                sector: u64::from(index) * 8,
                len: 4096,
                buf: buf(index),
            };
            let written = disk.run((0..200).map(write).collect());
            assert!(written.values().all(|(status, _)| *status == BlockStatus::Ok));
            drop(written);
            let read = |index: u8| BlockOp::Read {
                sector: u64::from(index) * 8,
                len: 4096,
                buf: buf(0xff),
            };
            for (id, (status, buf)) in disk.run((0..200).map(read).collect()) {
                assert_eq!(status, BlockStatus::Ok);
                assert!(buf.unwrap()[..4096].iter().all(|byte| u64::from(*byte) == id), "{id}");
            }
            let flushed =
                disk.run(vec![BlockOp::Flush, BlockOp::Discard { sector: 0, sectors: 8 }]);
            assert!(flushed.values().all(|(status, _)| *status == BlockStatus::Ok));
            let counts: Vec<_> = disk.backs.iter().map(|back| back.1.counters().requests).collect();
            assert!(counts.iter().all(|count| *count > 100), "{counts:?}");
            disk.close();
        }
    }
}

#[test]
fn a_disk_of_one_ring_is_published_as_ever() {
    let features = BlkbackFeatures { max_queues: 1, ..BlkbackFeatures::default() };
    let disk = Disk::new(features);
    assert_eq!(disk.backs.len(), 1);
    disk.close();
}

#[test]
fn a_backend_that_breaks_one_ring_has_broken_the_disk() {
    let mut disk = Disk::new(BlkbackFeatures::default());
    for id in 0..9 {
        let buf = DmaBuf::new(disk.xen, 4096).unwrap();
        disk.front.submit(id, BlockOp::Read { sector: 0, len: 4096, buf }).unwrap();
    }
    disk.front.kick();
    let ring = Mapper(disk.xen).map(&disk.backs[1].0.ring, Access::ReadWrite).unwrap();
    // rsp_prod
    ring[2].store(77, Ordering::SeqCst);
    drop(ring);
    let error = std::iter::repeat_with(|| disk.front.complete()).take(3).find_map(Result::err);
    assert!(error.is_some());
    let mut ended = BTreeSet::new();
    while let Some(completion) = disk.front.complete().unwrap() {
        assert_eq!(completion.status, BlockStatus::IoError);
        assert!(ended.insert(completion.id));
    }
    assert_eq!(ended.len(), 9, "all of them end, also those of the other rings");
    disk.close();
}

#[test]
fn a_frontend_that_breaks_one_ring_does_not_harm_the_others() {
    let mut disk = Disk::new(BlkbackFeatures::default());
    let ring = Mapper(disk.xen).map(&disk.backs[0].0.ring, Access::ReadWrite).unwrap();
    // req_prod
    ring[0].store(7777, Ordering::SeqCst);
    drop(ring);
    assert!(disk.backs[0].1.serve().is_err());
    for (_, back) in &mut disk.backs[1..] {
        assert!(back.serve().is_ok());
    }
    disk.close();
}

struct Card {
    xen: &'static FakeXen,
    front: NetfrontQueues,
    backs: Vec<(netback::Frontend, Netback<Mapper, QueueNet>)>,
    net: Arc<Mutex<CardNet>>,
    wire: Cable,
    grave: Grave,
}

impl Card {
    fn new(features: NetbackFeatures) -> Self {
        let xen = FakeXen::new();
        let mut store = Store::new("vif", 0);
        store.publish_back(&netback::offer_nodes(features));
        let mut own = Nodes::default();
        own.insert("mac", b"00:16:3e:00:00:05");
        let offer = store.back_nodes(netfront_xs::OFFER_NODES);
        let offer = netfront_xs::Offer::read(&offer, &own, NetOffloads::all()).unwrap();
        let grave = Grave::default();
        let mut front = NetfrontQueues::new(hal_of(xen), HOST, offer, QUEUES, &grave).unwrap();
        front.kick();
        store.publish_front(&front.publication());
        let store = RefCell::new(store);
        let read = |node: &str| store.borrow_mut().front_node(node);
        let frontend = FrontendCard::read(&read, features).unwrap();
        let (near, wire) = Cable::pair();
        let net = Arc::new(Mutex::new(CardNet::new(Box::new(near))));
        net.lock().unwrap().connect(frontend.queues.len(), frontend.multicast_control);
        let backs = frontend.queues.into_iter().enumerate().map(|(index, queue)| {
            let back = Netback::connect(Mapper(xen), QueueNet::new(&net, index), queue).unwrap();
            (queue, back)
        });
        let backs = backs.collect();
        Self { xen, front, backs, net, wire, grave }
    }

    fn serve(&mut self) {
        loop {
            for (frontend, back) in &mut self.backs {
                let notify = back.serve().unwrap();
                for (due, port) in [(notify.tx, frontend.tx_port), (notify.rx, frontend.rx_port)] {
                    assert!(!due || self.xen.notify_guest(port));
                }
            }
            if !self.net.lock().unwrap().take_stirred() {
                return;
            }
        }
    }
}

/// A TCP frame of a flow, with a number in it.
fn flow_frame(flow: u8, number: u8) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    bytes[12] = 8;
    bytes[14] = 0x45;
    bytes[23] = 6;
    bytes[35] = flow;
    bytes[59] = number;
    bytes
}

#[test]
fn a_card_keeps_every_flow_in_order_on_all_its_queues() {
    for split_event_channels in [false, true] {
        let features = NetbackFeatures { split_event_channels, ..NetbackFeatures::default() };
        let mut card = Card::new(features);
        assert_eq!(card.backs.len(), QUEUES as usize);
        let mut next = BTreeMap::<u8, u8>::new();
        for number in 0..20 {
            for flow in 0..30 {
                let bytes = flow_frame(flow, number);
                let mut buf = DmaBuf::new(card.xen, TX_HEADROOM + bytes.len()).unwrap();
                buf[TX_HEADROOM..TX_HEADROOM + bytes.len()].copy_from_slice(&bytes);
                let frame = TxFrame { buf, len: bytes.len(), checksum: None, segmentation: None };
                card.front.transmit(frame).unwrap();
                card.wire.send(Frame { bytes, ..Frame::default() });
            }
            card.front.kick();
            card.serve();
            while card.front.transmitted().unwrap().is_some() {}
            while let Some(frame) = card.wire.receive() {
                let expected = next.entry(frame.bytes[35]).or_default();
                assert_eq!(frame.bytes[59], *expected);
                *expected += 1;
            }
            let mut parts = Vec::new();
            let mut came = 0;
            while card.front.receive(&mut parts).unwrap().is_some() {
                let part = parts.pop().unwrap();
                assert_eq!(part.buf[part.offset + 59], number, "one round at a time");
                card.front.recycle(part.buf);
                came += 1;
            }
            assert_eq!(came, 30);
            card.front.kick();
            card.front.arm();
        }
        assert!(next.len() == 30 && next.values().all(|count| *count == 20));
        let Card { xen, front, backs, grave, .. } = card;
        drop(backs);
        drop(front);
        grave.empty();
        assert_eq!((xen.granted(), xen.allocated_pages(), xen.open_ports()), (0, 0, 0));
    }
}

#[test]
fn a_backend_that_breaks_one_ring_has_broken_the_card() {
    let mut card = Card::new(NetbackFeatures::default());
    let ring: [GrantRef; 1] = [card.backs[2].0.rx_ring];
    let ring = Mapper(card.xen).map(&ring, Access::ReadWrite).unwrap();
    ring[2].store(7777, Ordering::SeqCst);
    drop(ring);
    let mut parts = Vec::new();
    let looks = std::iter::repeat_with(|| card.front.receive(&mut parts).err()).take(3);
    assert!(looks.flatten().next().is_some());
    assert!(!card.front.link_up());
    assert!(card.front.receive(&mut parts).unwrap().is_none());
    assert!(card.front.transmitted().unwrap().is_none());
}
