//! The disk driver over fake Xen, against a small honest backend and against lies.
#![expect(clippy::cast_possible_truncation, reason = "test values are small")]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use janus_proto::abi::xen_io::blkif::VdiskInfo;
use janus_proto::ring::Back;
use proptest::prelude::*;

use super::*;
use crate::fake::{FakeXen, Mapping, hal_of};
use crate::xen::blkfront_xs::DiscardLimits;

const PEER: DomId = DomId(0);
const SECTORS: usize = 4096;

/// Serves a disk in memory; maps as Linux does, so a grant that ended too early or never existed is a panic.
struct TestBack {
    xen: &'static FakeXen,
    ring: Back<Mapping, SLOT_WORDS>,
    disk: Vec<u8>,
    /// Mapped for good, with persistent grants.
    kept: BTreeMap<u32, Mapping>,
    persistent: bool,
    flushes: usize,
    /// Taken and not answered.
    taken: Vec<(u64, BlkifOp, BlkifStatus)>,
}

fn bytes_of(mapping: &Mapping) -> Vec<u8> {
    mapping.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect()
}

impl TestBack {
    fn transfer(&mut self, op: BlkifOp, sector: u64, segments: &[BlkifSegment]) -> BlkifStatus {
        let mut at = sector as usize * SECTOR_SIZE;
        for segment in segments {
            assert!(segment.first_sect <= segment.last_sect && segment.last_sect < 8);
            let write = self.persistent || op == BlkifOp::READ;
            let access = if write { GrantAccess::ReadWrite } else { GrantAccess::ReadOnly };
            let page = match self.kept.remove(&segment.gref.0) {
                Some(page) => page,
                None => self.xen.map(PEER, segment.gref, access).unwrap(),
            };
            let first = usize::from(segment.first_sect) * SECTOR_SIZE;
            let len = usize::from(segment.last_sect - segment.first_sect + 1) * SECTOR_SIZE;
            if op == BlkifOp::READ {
                let words = self.disk[at..at + len].chunks(4);
                for (shared, word) in page[first / 4..].iter().zip(words) {
                    shared.store(u32::from_ne_bytes(word.try_into().unwrap()), Ordering::Relaxed);
                }
            } else {
                self.disk[at..at + len].copy_from_slice(&bytes_of(&page)[first..first + len]);
            }
            at += len;
            if self.persistent {
                self.kept.insert(segment.gref.0, page);
            }
        }
        BlkifStatus::OKAY
    }

    /// Takes and performs one request.
    fn take(&mut self) -> bool {
        let Some(request) = self.ring.pop::<BlkifRequest>().unwrap() else { return false };
        let (op, status) = match request.operation {
            BlkifOp::READ | BlkifOp::WRITE => {
                let segments = &request.seg[..usize::from(request.nr_segments)];
                assert!(!segments.is_empty());
                let status = self.transfer(request.operation, request.sector_number, segments);
                (request.operation, status)
            }
            BlkifOp::FLUSH_DISKCACHE => {
                self.flushes += 1;
                (request.operation, BlkifStatus::OKAY)
            }
            BlkifOp::DISCARD => {
                // nr_sectors lies where the first segment does.
                let count = request.seg[0].as_bytes().try_into().map(u64::from_ne_bytes).unwrap();
                let start = request.sector_number as usize * SECTOR_SIZE;
                self.disk[start..start + count as usize * SECTOR_SIZE].fill(0);
                (request.operation, BlkifStatus::OKAY)
            }
            BlkifOp::INDIRECT => {
                let request = BlkifRequestIndirect::from_request(&request);
                assert!(usize::from(request.nr_segments) > BLKIF_MAX_SEGMENTS_PER_REQUEST);
                let page =
                    self.xen.map(PEER, request.indirect_grefs[0], GrantAccess::ReadOnly).unwrap();
                let bytes = bytes_of(&page);
                let segments: Vec<BlkifSegment> = bytes
                    .chunks(8)
                    .take(usize::from(request.nr_segments))
                    .map(|raw| zerocopy::FromBytes::read_from_bytes(raw).unwrap())
                    .collect();
                let status = self.transfer(request.indirect_op, request.sector_number, &segments);
                (request.indirect_op, status)
            }
            other => panic!("unexpected {other:?}"),
        };
        self.taken.push((request.id, op, status));
        true
    }

    /// Answers the request taken at `index` of those unanswered; `true`: the front wants to know.
    fn answer(&mut self, index: usize) -> bool {
        let (id, operation, status) = self.taken.remove(index);
        self.respond(id, operation, status)
    }

    fn respond(&mut self, id: u64, operation: BlkifOp, status: BlkifStatus) -> bool {
        let response = BlkifResponse { id, operation, pad0: [0], status, pad1: [0; 4] };
        self.ring.push(&response).unwrap();
        self.ring.publish()
    }

    fn serve_all(&mut self) {
        while self.take() {}
        while !self.taken.is_empty() {
            self.answer(0);
        }
    }
}

trait FromRequest {
    fn from_request(request: &BlkifRequest) -> Self;
}

impl FromRequest for BlkifRequestIndirect {
    fn from_request(request: &BlkifRequest) -> Self {
        zerocopy::FromBytes::read_from_prefix(request.as_bytes()).unwrap().0
    }
}

fn details(persistent: bool, indirect_segments: u16) -> Details {
    Details {
        sectors: SECTORS as u64,
        block_size: 512,
        info: VdiskInfo::empty(),
        flush: FlushMode::Flush,
        discard: Some(DiscardLimits { granularity: 8, alignment: 3 }),
        persistent,
        indirect_segments,
    }
}

struct Rig {
    xen: &'static FakeXen,
    front: Blkfront,
    back: TestBack,
    grave: Grave,
}

fn rig(details: Details, ring_order: u32) -> Rig {
    let xen = FakeXen::new();
    let setup = Setup::new(hal_of(xen), PEER, Offer { ring_order, queues: 1 }).unwrap();
    let ring = xen.map_all(PEER, &setup.refs, GrantAccess::ReadWrite).unwrap();
    let back = TestBack {
        xen,
        ring: Back::attach(ring).unwrap(),
        disk: (0..SECTORS * SECTOR_SIZE).map(|at| (at / 7 + at / 512) as u8).collect(),
        kept: BTreeMap::new(),
        persistent: details.persistent,
        flushes: 0,
        taken: Vec::new(),
    };
    let grave = Grave::default();
    let front = setup.connect(details, 51712, grave.clone());
    Rig { xen, front, back, grave }
}

impl Rig {
    fn buf(&self, len: usize) -> DmaBuf {
        DmaBuf::new(self.xen, len).unwrap()
    }

    /// Both ends go away in order; nothing may be left.
    fn finish(self) {
        let Rig { xen, front, back, grave, .. } = self;
        drop(front);
        drop(back);
        grave.empty();
        assert_eq!((xen.granted(), xen.leaked_pages(), xen.open_ports()), (0, 0, 0));
        assert_eq!(xen.allocated_pages(), 0);
    }
}

const MODES: [(bool, u16, u32); 4] =
    [(false, 0, 0), (false, 256, 1), (true, 32, 0), (true, 256, 1)];

#[test]
fn reads_every_length_in_every_mode() {
    for (persistent, indirect, order) in MODES {
        let mut rig = rig(details(persistent, indirect), order);
        let most = rig.front.geometry().max_request as usize;
        assert_eq!(most, usize::from(indirect.max(11)) * PAGE_SIZE);
        for len in [512, 4096, 4608, 11 * 4096, 11 * 4096 + 512, most] {
            if len > most {
                continue;
            }
            let buf = rig.buf(len);
            rig.front.submit(7, BlockOp::Read { sector: 5, len, buf }).unwrap();
            assert!(rig.front.complete().unwrap().is_none());
            assert!(!rig.back.take(), "nothing is visible before the kick");
            rig.front.kick();
            rig.back.serve_all();
            let done = rig.front.complete().unwrap().unwrap();
            assert_eq!((done.id, done.status), (7, BlockStatus::Ok));
            let start = 5 * SECTOR_SIZE;
            assert!(done.buf.unwrap()[..len] == rig.back.disk[start..start + len]);
        }
        rig.finish();
    }
}

#[test]
fn kicks_are_batched_and_only_sent_when_wanted() {
    let mut rig = rig(details(true, 0), 0);
    for id in 0..10 {
        let buf = rig.buf(512);
        rig.front.submit(id, BlockOp::Read { sector: id, len: 512, buf }).unwrap();
    }
    rig.front.kick();
    rig.front.kick();
    assert_eq!(rig.xen.notifications(), 1);
    // The backend is awake: it has not asked for an event.
    let buf = rig.buf(512);
    rig.front.submit(10, BlockOp::Read { sector: 0, len: 512, buf }).unwrap();
    rig.front.kick();
    assert_eq!(rig.xen.notifications(), 1);
    assert!(!rig.front.arm());
    while rig.back.take() {}
    assert!(rig.back.answer(0), "the front had asked");
    assert!(!rig.back.answer(0), "once");
    assert!(rig.front.arm(), "something is there already");
    while !rig.back.taken.is_empty() {
        rig.back.answer(0);
    }
    while rig.front.complete().unwrap().is_some() {}
    assert!(!rig.front.arm());
    rig.finish();
}

#[test]
fn flush_and_discard() {
    let mut rig = rig(details(false, 0), 0);
    rig.front.submit(1, BlockOp::Flush).unwrap();
    // Whole units start at 3, 11, 19.
    rig.front.submit(2, BlockOp::Discard { sector: 4, sectors: 20 }).unwrap();
    rig.front.submit(3, BlockOp::Discard { sector: 4, sectors: 7 }).unwrap();
    rig.front.kick();
    let early = rig.front.complete().unwrap().unwrap();
    assert_eq!((early.id, early.status), (3, BlockStatus::Ok), "nothing to discard");
    let before = rig.back.disk.clone();
    rig.back.serve_all();
    assert_eq!(rig.back.flushes, 1);
    let (start, end) = (11 * SECTOR_SIZE, 19 * SECTOR_SIZE);
    assert!(rig.back.disk[start..end].iter().all(|&b| b == 0));
    assert!(rig.back.disk[..start] == before[..start] && rig.back.disk[end..] == before[end..]);
    for id in [1, 2] {
        assert_eq!(rig.front.complete().unwrap().unwrap().id, id);
    }
    rig.finish();
}

#[test]
fn requests_outside_the_disk_or_its_features_come_back() {
    let mut read_only = details(false, 0);
    read_only.info = VdiskInfo::READONLY;
    read_only.flush = FlushMode::None;
    read_only.discard = None;
    read_only.block_size = 4096;
    let mut rig = rig(read_only, 0);
    let invalid = |rig: &mut Rig, op| {
        assert!(matches!(rig.front.submit(0, op), Err(SubmitError::Invalid(_))));
    };
    for (sector, len) in
        [(0, 0), (0, 512), (1, 4096), (SECTORS as u64, 4096), (u64::MAX, 4096), (0, 12 * 4096)]
    {
        let buf = rig.buf(12 * 4096);
        invalid(&mut rig, BlockOp::Read { sector, len, buf });
    }
    let buf = rig.buf(4096);
    invalid(&mut rig, BlockOp::Read { sector: 0, len: 8192, buf });
    let buf = rig.buf(4096);
    invalid(&mut rig, BlockOp::Write { sector: 0, len: 4096, buf });
    invalid(&mut rig, BlockOp::Flush);
    invalid(&mut rig, BlockOp::Discard { sector: 0, sectors: 8 });
    invalid(&mut rig, BlockOp::WriteZeroes { sector: 0, sectors: 8 });
    rig.finish();
}

#[test]
fn a_backend_that_lies_breaks_the_disk_and_frees_its_users() {
    for (persistent, _, _) in MODES {
        for lie in 0..3 {
            let mut rig = rig(details(persistent, 0), 0);
            for id in 0..3 {
                let buf = rig.buf(8192);
                rig.front.submit(id, BlockOp::Read { sector: 0, len: 8192, buf }).unwrap();
            }
            rig.front.kick();
            while rig.back.take() {}
            match lie {
                // No such slot; a former generation; the same response twice.
                0 => drop(rig.back.respond(0xffff, BlkifOp::READ, BlkifStatus::OKAY)),
                1 => drop(rig.back.respond(0, BlkifOp::READ, BlkifStatus::OKAY)),
                _ => {
                    let (id, op, status) = rig.back.taken[0];
                    rig.back.respond(id, op, status);
                    rig.back.respond(id, op, status);
                    assert_eq!(rig.front.complete().unwrap().unwrap().id, 0);
                }
            }
            assert!(rig.front.complete().is_err());
            let mut ended = if lie == 2 { vec![0] } else { vec![] };
            while let Some(done) = rig.front.complete().unwrap() {
                assert_eq!(done.status, BlockStatus::IoError);
                assert!(done.buf.is_some());
                ended.push(done.id);
            }
            ended.sort_unstable();
            assert_eq!(ended, [0, 1, 2]);
            assert!(!rig.front.arm());
            let op = BlockOp::Flush;
            assert!(matches!(rig.front.submit(9, op), Err(SubmitError::Gone(_))));
            rig.finish();
        }
    }
}

#[test]
fn an_overrun_index_breaks_the_disk() {
    let mut rig = rig(details(false, 0), 0);
    let buf = rig.buf(512);
    rig.front.submit(0, BlockOp::Read { sector: 0, len: 512, buf }).unwrap();
    rig.front.kick();
    let ring = rig.xen.map_all(PEER, &[GrantRef(8)], GrantAccess::ReadWrite).unwrap();
    ring[janus_proto::abi::xen_io::ring::RSP_PROD].store(99, Ordering::Relaxed);
    drop(ring);
    assert!(rig.front.complete().is_err());
    assert_eq!(rig.front.complete().unwrap().unwrap().status, BlockStatus::IoError);
    rig.finish();
}

#[test]
fn what_a_vanished_backend_holds_is_leaked_and_the_rest_freed() {
    let mut rig = rig(details(false, 0), 0);
    for id in 0..4 {
        let buf = rig.buf(8192);
        rig.front.submit(id, BlockOp::Read { sector: 0, len: 8192, buf }).unwrap();
    }
    rig.front.kick();
    rig.xen.hold(GrantRef(9));
    let Rig { xen, front, back, grave, .. } = rig;
    drop(front);
    assert_eq!(xen.leaked_pages(), 0, "nothing is ended before the backend lets go");
    drop(back);
    grave.empty();
    assert_eq!(xen.leaked_pages(), 2, "the whole buffer of the page that is held");
    assert_eq!(xen.allocated_pages(), 2);
    assert_eq!(xen.granted(), 1);
}

#[test]
fn shortages_are_busy_while_something_can_end_and_errors_otherwise() {
    for persistent in [false, true] {
        let mut rig = rig(details(persistent, 256), 0);
        let (one, two) = (rig.buf(4096), rig.buf(16 * 4096));
        rig.xen.limit_grants(Some(1));
        rig.front.submit(1, BlockOp::Read { sector: 0, len: 4096, buf: one }).unwrap();
        rig.front.kick();
        let Err(SubmitError::Busy(op)) =
            rig.front.submit(2, BlockOp::Read { sector: 0, len: 16 * 4096, buf: two })
        else {
            panic!("a request without grants was taken");
        };
        rig.back.serve_all();
        assert_eq!(rig.front.complete().unwrap().unwrap().id, 1);
        rig.front.submit(2, op).unwrap();
        assert!(rig.front.arm(), "there is something to take");
        let failed = rig.front.complete().unwrap().unwrap();
        assert_eq!((failed.id, failed.status), (2, BlockStatus::IoError));
        // Room for the data, none for its segments.
        rig.xen.limit_grants(Some(if persistent { 15 } else { 16 }));
        rig.front
            .submit(3, BlockOp::Read { sector: 0, len: 16 * 4096, buf: failed.buf.unwrap() })
            .unwrap();
        let failed = rig.front.complete().unwrap().unwrap();
        assert_eq!((failed.id, failed.status), (3, BlockStatus::IoError));
        rig.xen.limit_grants(None);
        rig.front
            .submit(4, BlockOp::Read { sector: 0, len: 16 * 4096, buf: failed.buf.unwrap() })
            .unwrap();
        rig.front.kick();
        rig.back.serve_all();
        let done = rig.front.complete().unwrap().unwrap();
        assert_eq!(done.status, BlockStatus::Ok);
        drop(done);
        rig.finish();
    }
}

#[test]
fn setting_up_fails_cleanly() {
    let xen = FakeXen::new();
    let setup =
        |order| Setup::new(hal_of(xen), PEER, Offer { ring_order: order, queues: 1 }).map(drop);
    xen.limit_grants(Some(1));
    assert_eq!(setup(1), Err(HalError::NoGrants));
    xen.limit_grants(None);
    xen.limit_ports(Some(0));
    assert_eq!(setup(1), Err(HalError::NoPort));
    xen.limit_pages(Some(0));
    assert_eq!(setup(0), Err(HalError::NoMemory));
    assert_eq!((xen.granted(), xen.allocated_pages(), xen.open_ports()), (0, 0, 0));
}

proptest! {
    #[test]
    fn any_load_leaves_the_disk_as_a_model_has_it(
        mode in 0..4usize,
        work in prop::collection::vec((0..6u8, 0..3900u64, 1..180u64, any::<prop::sample::Index>()), 1..150),
    ) {
        let (persistent, indirect, order) = MODES[mode];
        let mut rig = rig(details(persistent, indirect), order);
        let most = u64::from(rig.front.geometry().max_request) / 512;
        let mut model = rig.back.disk.clone();
        // Ranges in flight: only disjoint ones run together, so that the order of answers cannot matter.
        let mut running: BTreeMap<u64, (u64, u64, bool)> = BTreeMap::new();
        for (id, (what, sector, sectors, pick)) in work.into_iter().enumerate() {
            let (id, sectors) = (id as u64, sectors.min(most));
            let clash = running.values().any(|&(start, end, _)| start < sector + sectors && sector < end);
            if what < 4 && !clash {
                let len = sectors as usize * SECTOR_SIZE;
                let mut buf = rig.buf(len);
                let range = sector as usize * SECTOR_SIZE..sector as usize * SECTOR_SIZE + len;
                let write = what < 2;
                let op = if write {
                    buf[..len].iter_mut().enumerate().for_each(|(at, b)| *b = (at as u64 ^ id) as u8);
                    let op = BlockOp::Write { sector, len, buf };
                    if let BlockOp::Write { buf, .. } = &op {
                        model[range].copy_from_slice(&buf[..len]);
                    }
                    op
                } else {
                    BlockOp::Read { sector, len, buf }
                };
                match rig.front.submit(id, op) {
                    Ok(()) => { running.insert(id, (sector, sector + sectors, write)); }
                    Err(SubmitError::Busy(op)) => {
                        prop_assert!(!running.is_empty());
                        // Undo the model for a write that did not happen.
                        if let BlockOp::Write { .. } = op {
                            let range = sector as usize * SECTOR_SIZE..sector as usize * SECTOR_SIZE + len;
                            model[range.clone()].copy_from_slice(&rig.back.disk[range]);
                        }
                    }
                    Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
                }
            } else {
                rig.front.kick();
                while rig.back.take() {}
                if !rig.back.taken.is_empty() {
                    let index = pick.index(rig.back.taken.len());
                    rig.back.answer(index);
                }
            }
            while let Some(done) = rig.front.complete().unwrap() {
                let (start, end, write) = running.remove(&done.id).unwrap();
                prop_assert_eq!(done.status, BlockStatus::Ok);
                let range = start as usize * SECTOR_SIZE..end as usize * SECTOR_SIZE;
                if !write {
                    prop_assert!(done.buf.unwrap()[..range.len()] == model[range]);
                }
            }
        }
        rig.front.kick();
        rig.back.serve_all();
        while let Some(done) = rig.front.complete().unwrap() {
            running.remove(&done.id).unwrap();
        }
        prop_assert!(running.is_empty());
        prop_assert!(rig.back.disk == model);
        rig.finish();
    }

    #[test]
    fn any_response_bytes_are_survived(responses in prop::collection::vec((any::<u64>(), 0..64u64, any::<i16>()), 1..40)) {
        let mut rig = rig(details(true, 32), 0);
        for id in 0..20 {
            let buf = rig.buf(4096);
            rig.front.submit(id, BlockOp::Read { sector: 0, len: 4096, buf }).unwrap();
        }
        rig.front.kick();
        while rig.back.take() {}
        for (wild, near, status) in responses.into_iter().take(20) {
            let id = if near < 40 { 1 << 16 | near } else { wild };
            rig.back.respond(id, BlkifOp::READ, BlkifStatus(status));
        }
        let mut ended = 0;
        for _ in 0..60 {
            if let Ok(Some(_)) = rig.front.complete() { ended += 1; }
        }
        prop_assert!(ended <= 20);
        rig.finish();
    }
}
