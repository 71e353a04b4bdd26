//! blkfront against blkback.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use janus::blkback::{self, Blkback, BlkbackError, BlkbackFeatures};
use janus::storage::MemoryDisk;
use janus_front::class::{BlockDevice as _, BlockOp, BlockStatus, SubmitError};
use janus_front::dma::DmaBuf;
use janus_front::fake::{FakeXen, hal_of};
use janus_front::xen::blkfront::{Blkfront, Setup};
use janus_front::xen::blkfront_xs::{DETAIL_NODES, Details, OFFER_NODES, Offer};
use janus_front::xen::grants::Grave;
use janus_proto::addr::{GrantRef, Port};
use janus_proto::grant::Access;
use proptest::prelude::*;

use janus::memory::GrantMapper as _;

use crate::world::{HOST, Mapper, Store};

const SECTORS: usize = 4096;

/// A connected disk with both ends, and the events between them.
struct Disk {
    xen: &'static FakeXen,
    front: Option<Blkfront>,
    back: Option<Blkback<Mapper, MemoryDisk>>,
    port: Port,
    ring: Vec<GrantRef>,
    grave: Grave,
}

impl Disk {
    fn new(features: BlkbackFeatures) -> Self {
        let xen = FakeXen::new();
        let mut store = Store::new("vbd", 51712);
        let disk = MemoryDisk::new(SECTORS);
        store.publish_back(&blkback::offer_nodes(features));
        let offer = Offer::read(&store.back_nodes(OFFER_NODES)).unwrap();
        let setup = Setup::new(hal_of(xen), HOST, offer).unwrap();
        store.publish_front(&setup.publication());
        store.publish_back(&blkback::detail_nodes(features, &disk));
        let store = RefCell::new(store);
        let frontend =
            blkback::Frontend::read(&|node| store.borrow_mut().front_node(node), features).unwrap();
        let port = setup.port();
        assert_eq!(frontend.port, port);
        let back = Blkback::connect(Mapper(xen), disk, features, &frontend).unwrap();
        let details = Details::read(&store.borrow_mut().back_nodes(DETAIL_NODES)).unwrap();
        let grave = Grave::default();
        let front = setup.connect(details, 51712, grave.clone());
        Self { xen, front: Some(front), back: Some(back), port, ring: frontend.ring, grave }
    }

    fn front(&mut self) -> &mut Blkfront {
        self.front.as_mut().unwrap()
    }

    fn buf(&self, len: usize) -> DmaBuf {
        DmaBuf::new(self.xen, len).unwrap()
    }

    /// The backend runs if it was sent an event; the frontend looks if it was sent one.
    fn turn(&mut self) -> Result<(), BlkbackError> {
        if self.xen.take_for_peer(self.port) > 0 && self.back.as_mut().unwrap().serve()? {
            self.xen.notify_guest(self.port);
        }
        Ok(())
    }

    /// Submits and waits as a kernel does: asleep until an event, armed before that.
    fn run(&mut self, op: BlockOp) -> (BlockStatus, Option<DmaBuf>) {
        self.front().submit(1, op).map_err(|error| format!("{error:?}")).unwrap();
        self.front().kick();
        for _ in 0..10 {
            if let Some(done) = self.front().complete().unwrap() {
                assert_eq!(done.id, 1);
                return (done.status, done.buf);
            }
            if self.front().arm() {
                continue;
            }
            self.turn().unwrap();
            assert!(self.xen.take_for_guest(self.port), "asleep, and nothing will wake it");
        }
        panic!("no completion");
    }

    /// Ends both sides and sees that nothing is left granted, allocated or open.
    fn close(mut self) -> MemoryDisk {
        let disk = self.back.take().unwrap().disconnect();
        drop(self.front.take());
        self.grave.empty();
        assert_eq!(
            (self.xen.granted(), self.xen.allocated_pages(), self.xen.open_ports()),
            (0, 0, 0),
            "left behind"
        );
        disk
    }
}

fn every_feature_set() -> Vec<BlkbackFeatures> {
    let all = BlkbackFeatures::default();
    let none = BlkbackFeatures {
        max_ring_page_order: 0,
        max_indirect_segments: 0,
        flush_cache: false,
        barrier: false,
        discard: false,
        persistent: false,
        max_queues: 1,
    };
    let mut sets = vec![all, none];
    for persistent in [false, true] {
        for max_indirect_segments in [0, 12, 32] {
            for max_ring_page_order in [0, 1] {
                let base = if persistent { none } else { all };
                sets.push(BlkbackFeatures {
                    max_ring_page_order,
                    max_indirect_segments,
                    persistent,
                    ..base
                });
            }
        }
    }
    sets.push(BlkbackFeatures { flush_cache: false, ..all });
    sets
}

#[test]
fn everything_works_with_every_set_of_features() {
    for features in every_feature_set() {
        let mut disk = Disk::new(features);
        let most = disk.front().geometry().max_request as usize;
        for len in [512, 4096, 4608, 11 * 4096, most] {
            let mut buf = disk.buf(len);
            for (index, byte) in buf.iter_mut().enumerate() {
                *byte = u8::try_from(index % 251).unwrap();
            }
            let (status, buf) = disk.run(BlockOp::Write { sector: 9, len, buf });
            assert_eq!((status, buf.is_some()), (BlockStatus::Ok, true), "{features:?} {len}");
            let (status, buf) = disk.run(BlockOp::Read { sector: 9, len, buf: disk.buf(len) });
            assert_eq!(status, BlockStatus::Ok);
            let buf = buf.unwrap();
            let right = (0..len).all(|index| usize::from(buf[index]) == index % 251);
            assert!(right, "{features:?} {len}");
        }
        let flushing = features.flush_cache || features.barrier;
        if flushing {
            assert_eq!(disk.run(BlockOp::Flush).0, BlockStatus::Ok);
        }
        if features.discard {
            let done = disk.run(BlockOp::Discard { sector: 8, sectors: 64 });
            assert_eq!(done.0, BlockStatus::Ok);
        }
        let counters = disk.back.as_ref().unwrap().counters();
        let indirect = features.max_indirect_segments > 11;
        assert_eq!(counters.errors, 0);
        assert_eq!(counters.indirect > 0, indirect, "{features:?}: {counters:?}");
        let image = disk.close();
        assert_eq!(image.flushes > 0, flushing);
        assert_eq!(image.bytes[9 * 512], 0);
        assert_eq!(image.bytes[9 * 512 + 1], u8::from(!features.discard));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read { sector: u64, sectors: usize },
    Write { sector: u64, sectors: usize, fill: u8 },
    Discard { sector: u64, sectors: u64 },
    Flush,
    Kick,
    ServeOne,
    Serve,
    Complete,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sector = 0_u64..600;
    let step = prop_oneof![
        3 => (sector.clone(), 1_usize..120).prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        3 => (sector.clone(), 1_usize..120, any::<u8>())
            .prop_map(|(sector, sectors, fill)| Step::Write { sector, sectors, fill }),
        1 => (sector, 1_u64..50).prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        2 => Just(Step::Kick),
        2 => Just(Step::ServeOne),
        1 => Just(Step::Serve),
        4 => Just(Step::Complete),
    ];
    prop::collection::vec(step, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Many requests at once, in any rhythm: the disk is what an array would be, because the backend works in
    /// the order of the ring. Nothing is lost, nothing stays granted.
    #[test]
    fn any_rhythm_equals_an_array(steps in steps(), set in 0..every_feature_set().len()) {
        let features = every_feature_set()[set];
        let mut disk = Disk::new(features);
        let mut model = vec![0_u8; SECTORS * 512];
        let mut expected: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
        for (id, step) in (0_u64..).zip(steps) {
            let most = disk.front().geometry().max_request as usize / 512;
            match step {
                Step::Read { sector, sectors } => {
                    let len = sectors.min(most) * 512;
                    let op = BlockOp::Read { sector, len, buf: disk.buf(len) };
                    let start = usize::try_from(sector).unwrap() * 512;
                    match disk.front().submit(id, op) {
                        Ok(()) => drop(expected.insert(id, Some(model[start..start + len].to_vec()))),
                        Err(SubmitError::Busy(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                Step::Write { sector, sectors, fill } => {
                    let len = sectors.min(most) * 512;
                    let mut buf = disk.buf(len);
                    buf[..len].fill(fill);
                    let start = usize::try_from(sector).unwrap() * 512;
                    match disk.front().submit(id, BlockOp::Write { sector, len, buf }) {
                        Ok(()) => {
                            model[start..start + len].fill(fill);
                            expected.insert(id, None);
                        }
                        Err(SubmitError::Busy(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                Step::Discard { sector, sectors } => {
                    let start = usize::try_from(sector).unwrap() * 512;
                    let len = usize::try_from(sectors).unwrap() * 512;
                    match disk.front().submit(id, BlockOp::Discard { sector, sectors }) {
                        Ok(()) => {
                            model[start..start + len].fill(0);
                            expected.insert(id, None);
                        }
                        Err(SubmitError::Busy(_)) => {}
                        Err(SubmitError::Invalid(_)) => prop_assert!(!features.discard),
                        Err(error) => panic!("{error:?}"),
                    }
                }
                Step::Flush => {
                    if disk.front().submit(id, BlockOp::Flush).is_ok() {
                        expected.insert(id, None);
                    }
                }
                Step::Kick => disk.front().kick(),
                Step::ServeOne => {
                    let mut notify = false;
                    disk.back.as_mut().unwrap().serve_one(&mut notify).unwrap();
                }
                Step::Serve => { disk.back.as_mut().unwrap().serve().unwrap(); }
                Step::Complete => take(&mut disk, &mut expected),
            }
        }
        disk.front().kick();
        disk.back.as_mut().unwrap().serve().unwrap();
        while !expected.is_empty() {
            let before = expected.len();
            take(&mut disk, &mut expected);
            prop_assert!(expected.len() < before, "lost: {:?}", expected.keys());
        }
        let image = disk.close();
        prop_assert!(image.bytes == model, "the disk differs");
    }

    /// A backend that writes anything into the ring gets errors and completions out of the frontend, never a
    /// panic, a lost buffer or a reused page.
    #[test]
    fn a_lying_backend_is_survived(
        scribbles in prop::collection::vec((0_usize..100, any::<u32>(), any::<bool>(), any::<bool>()), 1..60),
        persistent: bool,
    ) {
        let features = BlkbackFeatures { persistent, ..BlkbackFeatures::default() };
        let mut disk = Disk::new(features);
        let ring = Mapper(disk.xen).map(&disk.ring, Access::ReadWrite).unwrap();
        let (mut submitted, mut completed) = (0, 0);
        for (id, (word, value, small, submit)) in (0_u64..).zip(scribbles) {
            if submit {
                let buf = disk.buf(8192);
                submitted += u32::from(disk.front().submit(id, BlockOp::Read { sector: 0, len: 8192, buf }).is_ok());
                disk.front().kick();
            }
            // Mostly the indices and the first response, with values near the truth.
            let word = if small { word % 4 } else { 16 + word };
            ring[word].store(if small { value % 8 } else { value % 300 }, Ordering::Relaxed);
            for _ in 0..40 {
                match disk.front().complete() {
                    Ok(Some(_)) => completed += 1,
                    Ok(None) => break,
                    Err(_) => {}
                }
            }
            let _ = disk.front().arm();
        }
        prop_assert!(completed <= submitted);
        // Once broken, or not, everything comes back when the backend is gone.
        drop(ring);
        disk.back = None;
        drop(disk.front.take());
        disk.grave.empty();
        prop_assert_eq!((disk.xen.granted(), disk.xen.allocated_pages()), (0, 0));
    }

    /// A frontend that writes anything into the ring gets errors, and the backend touches only what is granted.
    #[test]
    fn a_lying_frontend_is_survived(
        scribbles in prop::collection::vec((0_usize..100, any::<u32>(), any::<bool>()), 1..80),
    ) {
        let mut disk = Disk::new(BlkbackFeatures::default());
        let ring = Mapper(disk.xen).map(&disk.ring, Access::ReadWrite).unwrap();
        for (word, value, small) in scribbles {
            if small {
                ring[word % 4].store(value % 70, Ordering::Relaxed);
            } else {
                // Operations, counts, sectors and references, plausible and not.
                ring[16 + word].store(value % 0x0b07, Ordering::Relaxed);
            }
            let _ = disk.back.as_mut().unwrap().serve();
        }
    }
}

fn take(disk: &mut Disk, expected: &mut BTreeMap<u64, Option<Vec<u8>>>) {
    while let Some(done) = disk.front().complete().unwrap() {
        assert_eq!(done.status, BlockStatus::Ok);
        let want = expected.remove(&done.id).expect("a completion of an unknown request");
        if let Some(want) = want {
            assert!(
                done.buf.unwrap()[..want.len()] == want,
                "request {} read wrong bytes",
                done.id
            );
        }
    }
}

#[test]
fn a_backend_that_vanishes_during_io_leaves_nothing_behind() {
    for features in every_feature_set() {
        for served in 0..3 {
            let mut disk = Disk::new(features);
            for id in 0..5 {
                let buf = disk.buf(8192);
                disk.front().submit(id, BlockOp::Read { sector: 0, len: 8192, buf }).unwrap();
            }
            disk.front().kick();
            let mut notify = false;
            for _ in 0..served {
                assert!(disk.back.as_mut().unwrap().serve_one(&mut notify).unwrap());
            }
            // Gone: everything unmapped, nothing answered any more.
            disk.back = None;
            let mut answered = 0;
            while disk.front().complete().unwrap().is_some() {
                answered += 1;
            }
            assert_eq!(answered, served);
            drop(disk.front.take());
            disk.grave.empty();
            assert_eq!((disk.xen.granted(), disk.xen.allocated_pages()), (0, 0), "{features:?}");
            assert_eq!(disk.xen.leaked_pages(), 0);
        }
    }
}

#[test]
fn pages_that_the_backend_keeps_are_leaked_not_reused() {
    for persistent in [false, true] {
        let features = BlkbackFeatures { persistent, ..BlkbackFeatures::default() };
        let mut disk = Disk::new(features);
        disk.xen.hold_everything(true);
        let buf = disk.buf(4096);
        disk.front().submit(1, BlockOp::Read { sector: 0, len: 4096, buf }).unwrap();
        disk.front().kick();
        disk.turn().unwrap();
        let done = disk.front().complete().unwrap().unwrap();
        // Persistent: the caller's buffer was never granted, so it comes back.
        assert_eq!(done.buf.is_some(), persistent);
        drop(done);
        disk.back = None;
        drop(disk.front.take());
        disk.grave.empty();
        assert!(disk.xen.leaked_pages() > 0);
        assert_eq!(disk.xen.allocated_pages(), disk.xen.leaked_pages());
    }
}
