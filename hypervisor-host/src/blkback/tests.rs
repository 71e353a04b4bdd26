//! Requests with one thing wrong each: refused, nothing touched, and the next one works.

use janus_proto::abi::xen_io::blkif::BlkifSegment;
use janus_proto::ring::Front;
use zerocopy::IntoBytes;

use super::*;
use crate::memory::copy_in;
use crate::memory::fake::Pages;
use crate::storage::MemoryDisk;

const SECTORS: usize = 64;
/// Page 0 is the ring, 2 and 4 data, 5 data that the backend may only read, 6 segments.
const DATA: GrantRef = GrantRef(2);

struct World<B = MemoryDisk> {
    pages: Pages,
    front: Front<<Pages as GrantMapper>::Mapping, SLOT_WORDS>,
    back: Blkback<Pages, B>,
    next_id: u64,
}

impl World {
    fn new(features: BlkbackFeatures) -> Self {
        let mut disk = MemoryDisk::new(SECTORS);
        disk.bytes.fill(0x11);
        Self::with(disk, features)
    }
}

impl<B: BlockBackend> World<B> {
    fn with(disk: B, features: BlkbackFeatures) -> Self {
        let pages = Pages::new(8);
        let front = Front::new(pages.page(0)).unwrap();
        let frontend = Frontend { ring: vec![GrantRef(0)], port: Port(1), persistent: true };
        let back = Blkback::connect(pages.clone(), disk, features, &frontend);
        let back = back.map_err(|(error, _)| error).unwrap();
        Self { pages, front, back, next_id: 1 << 40 }
    }

    /// Sends a slot, answers the status.
    fn send<T: IntoBytes + zerocopy::Immutable>(&mut self, request: &T) -> BlkifStatus {
        self.front.push(request).unwrap();
        let _ = self.front.publish();
        let mut notify = false;
        assert!(self.back.serve_one(&mut notify).unwrap());
        let response: BlkifResponse = self.front.pop().unwrap().unwrap();
        response.status
    }

    fn request(&mut self, operation: BlkifOp, segments: &[BlkifSegment]) -> BlkifRequest {
        self.next_id += 1;
        let mut request = BlkifRequest::new_zeroed();
        (request.operation, request.id) = (operation, self.next_id);
        request.nr_segments = u8::try_from(segments.len()).unwrap();
        request.seg[..segments.len()].copy_from_slice(segments);
        request
    }

    fn works(&mut self) {
        let read = self.request(BlkifOp::READ, &[segment(DATA, 0, 0)]);
        assert_eq!(self.send(&read), BlkifStatus::OKAY);
    }
}

fn segment(gref: GrantRef, first_sect: u8, last_sect: u8) -> BlkifSegment {
    BlkifSegment { gref, first_sect, last_sect, pad0: [0; 2] }
}

#[test]
fn segments_move_exactly_their_sectors() {
    for persistent in [false, true] {
        let mut world = World::new(BlkbackFeatures { persistent, ..BlkbackFeatures::default() });
        assert!(copy_in(&world.pages.page(2), 0, &[0xaa; 4096]));
        let parts = [segment(DATA, 3, 4), segment(GrantRef(4), 7, 7)];
        let mut write = world.request(BlkifOp::WRITE, &parts);
        write.sector_number = 10;
        assert_eq!(world.send(&write), BlkifStatus::OKAY);
        let mut read = world.request(BlkifOp::READ, &[segment(GrantRef(6), 1, 5)]);
        read.sector_number = 9;
        assert_eq!(world.send(&read), BlkifStatus::OKAY);
        let mut page = [0; 4096];
        assert!(copy_out(&world.pages.page(6), 0, &mut page));
        let sectors: Vec<_> = page.chunks(512).map(|sector| (sector[0], sector[511])).collect();
        let want = [0, 0x11, 0xaa, 0xaa, 0, 0x11, 0, 0].map(|byte| (byte, byte));
        assert_eq!(sectors, want, "persistent: {persistent}");
    }
}

#[test]
fn a_request_with_one_thing_wrong_is_refused() {
    let good = || segment(DATA, 0, 7);
    type Spoil = fn(&mut BlkifRequest);
    let wrong: &[(&str, Spoil)] = &[
        ("no segments", |r| r.nr_segments = 0),
        ("twelve segments", |r| r.nr_segments = 12),
        ("255 segments", |r| r.nr_segments = 255),
        ("first after last", |r| r.seg[1].first_sect = 8),
        ("last beyond the page", |r| r.seg[1].last_sect = 8),
        ("last far beyond the page", |r| r.seg[1].last_sect = 255),
        ("beyond the disk by one", |r| r.sector_number = 49),
        ("beyond the disk", |r| r.sector_number = 64),
        ("a sector that wraps", |r| r.sector_number = u64::MAX - 7),
        ("a reference that grants nothing", |r| r.seg[1].gref = GrantRef(99)),
        ("the greatest reference", |r| r.seg[1].gref = GrantRef(u32::MAX)),
    ];
    for (what, spoil) in wrong {
        for operation in [BlkifOp::READ, BlkifOp::WRITE] {
            let mut world = World::new(BlkbackFeatures::default());
            let mut request = world.request(operation, &[good(), good()]);
            spoil(&mut request);
            assert_eq!(world.send(&request), BlkifStatus::ERROR, "{what}, {operation:?}");
            world.works();
            let reference =
                matches!(*what, "a reference that grants nothing" | "the greatest reference");
            // The segment before a bad reference may have moved; nothing else.
            let touched = world.back.disk.bytes.iter().position(|&byte| byte != 0x11);
            assert!(touched.is_none() || reference, "{what} wrote at {touched:?}");
            assert_eq!(world.back.counters().errors, 1);
        }
    }
    // A page granted for reading cannot be read into.
    let mut world = World::new(BlkbackFeatures { persistent: false, ..BlkbackFeatures::default() });
    let read = world.request(BlkifOp::READ, &[segment(GrantRef(5), 0, 0)]);
    assert_eq!(world.send(&read), BlkifStatus::ERROR);
    let write = world.request(BlkifOp::WRITE, &[segment(GrantRef(5), 0, 0)]);
    assert_eq!(world.send(&write), BlkifStatus::OKAY);
    world.back.disk.read_only = true;
    let write = world.request(BlkifOp::WRITE, &[good()]);
    assert_eq!(world.send(&write), BlkifStatus::ERROR, "a read-only disk");
}

#[test]
fn indirect_requests_are_checked_twice() {
    let mut world =
        World::new(BlkbackFeatures { max_indirect_segments: 20, ..BlkbackFeatures::default() });
    let list = world.pages.page(6);
    for index in 0..32 {
        let part = segment(DATA, 0, 0);
        assert!(copy_in(&list, index * 8, part.as_bytes()));
    }
    let mut good = BlkifRequestIndirect::new_zeroed();
    (good.operation, good.indirect_op, good.nr_segments) = (BlkifOp::INDIRECT, BlkifOp::READ, 20);
    good.indirect_grefs[0] = GrantRef(6);
    assert_eq!(world.send(&good), BlkifStatus::OKAY);
    type Spoil = fn(&mut BlkifRequestIndirect);
    let wrong: &[(&str, Spoil)] = &[
        ("more than offered", |r| r.nr_segments = 21),
        ("far more", |r| r.nr_segments = u16::MAX),
        ("none", |r| r.nr_segments = 0),
        ("a list that is not granted", |r| r.indirect_grefs[0] = GrantRef(77)),
        ("another indirect one", |r| r.indirect_op = BlkifOp::INDIRECT),
        ("a discard", |r| r.indirect_op = BlkifOp::DISCARD),
        ("beyond the disk", |r| r.sector_number = 45),
    ];
    for (what, spoil) in wrong {
        let mut request = good;
        spoil(&mut request);
        assert_eq!(world.send(&request), BlkifStatus::ERROR, "{what}");
    }
    // The list itself is nonsense.
    assert!(copy_in(&list, 19 * 8, segment(DATA, 5, 4).as_bytes()));
    assert_eq!(world.send(&good), BlkifStatus::ERROR);
    world.works();
    let mut none =
        World::new(BlkbackFeatures { max_indirect_segments: 0, ..BlkbackFeatures::default() });
    assert_eq!(none.send(&good), BlkifStatus::EOPNOTSUPP);
}

#[test]
fn flush_barrier_discard_and_unknown_operations() {
    let mut world = World::new(BlkbackFeatures::default());
    let flush = world.request(BlkifOp::FLUSH_DISKCACHE, &[]);
    assert_eq!(world.send(&flush), BlkifStatus::OKAY);
    let barrier = world.request(BlkifOp::WRITE_BARRIER, &[]);
    assert_eq!(world.send(&barrier), BlkifStatus::OKAY);
    let barrier = world.request(BlkifOp::WRITE_BARRIER, &[segment(DATA, 0, 0)]);
    assert_eq!(world.send(&barrier), BlkifStatus::OKAY);
    assert_eq!((world.back.disk.flushes, world.back.disk.bytes[0]), (4, 0));
    for operation in [4, 7, 255] {
        let request = world.request(BlkifOp(operation), &[segment(DATA, 0, 0)]);
        assert_eq!(world.send(&request), BlkifStatus::EOPNOTSUPP, "{operation}");
    }
    let mut discard = BlkifRequestDiscard::new_zeroed();
    discard.operation = BlkifOp::DISCARD;
    for (start, count, status) in [
        (60, 4, BlkifStatus::OKAY),
        (60, 5, BlkifStatus::ERROR),
        (u64::MAX, 2, BlkifStatus::ERROR),
        (0, u64::MAX, BlkifStatus::ERROR),
    ] {
        (discard.sector_number, discard.nr_sectors) = (start, count);
        assert_eq!(world.send(&discard), status, "{start} {count}");
    }
    let features = BlkbackFeatures {
        flush_cache: false,
        barrier: false,
        discard: false,
        ..BlkbackFeatures::default()
    };
    let mut world = World::new(features);
    for operation in [BlkifOp::FLUSH_DISKCACHE, BlkifOp::WRITE_BARRIER, BlkifOp::DISCARD] {
        let request = world.request(operation, &[]);
        assert_eq!(world.send(&request), BlkifStatus::EOPNOTSUPP, "{operation:?}");
    }
}

/// A medium that fails for one sector.
struct Failing(MemoryDisk, u64);

impl BlockBackend for Failing {
    fn sectors(&self) -> u64 {
        self.0.sectors()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let range = sector..sector + (buf.len() / SECTOR) as u64;
        if range.contains(&self.1) {
            Err(std::io::ErrorKind::Other.into())
        } else {
            self.0.read(sector, buf)
        }
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> std::io::Result<()> {
        let range = sector..sector + (bytes.len() / SECTOR) as u64;
        if range.contains(&self.1) {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.0.write(sector, bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Other.into())
    }
    fn discard(&mut self, _sector: u64, _sectors: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Other.into())
    }
}

#[test]
fn a_medium_that_fails_is_an_error_for_the_guest() {
    for persistent in [false, true] {
        let mut world = World::with(
            Failing(MemoryDisk::new(SECTORS), 20),
            BlkbackFeatures { persistent, ..BlkbackFeatures::default() },
        );
        for operation in [BlkifOp::READ, BlkifOp::WRITE] {
            for (sector, status) in
                [(4, BlkifStatus::OKAY), (16, BlkifStatus::ERROR), (21, BlkifStatus::OKAY)]
            {
                let mut request = world.request(operation, &[segment(DATA, 0, 7)]);
                request.sector_number = sector;
                assert_eq!(world.send(&request), status, "{operation:?} of sector {sector}");
            }
        }
        let flush = world.request(BlkifOp::FLUSH_DISKCACHE, &[]);
        assert_eq!(world.send(&flush), BlkifStatus::ERROR);
        let barrier = world.request(BlkifOp::WRITE_BARRIER, &[segment(DATA, 0, 0)]);
        assert_eq!(world.send(&barrier), BlkifStatus::ERROR);
        let mut discard = BlkifRequestDiscard::new_zeroed();
        (discard.operation, discard.nr_sectors) = (BlkifOp::DISCARD, 1);
        assert_eq!(world.send(&discard), BlkifStatus::ERROR);
        world.works();
    }
}

#[test]
fn a_frontends_directory_is_read_with_suspicion() {
    let read = |nodes: &[(&str, &str)]| {
        let find =
            |name: &str| nodes.iter().find(|node| node.0 == name).map(|node| node.1.to_owned());
        Frontend::read(&find, BlkbackFeatures::default())
    };
    let one =
        read(&[("ring-ref", "9"), ("event-channel", "4"), ("protocol", "x86_64-abi")]).unwrap();
    assert_eq!((one.ring, one.port, one.persistent), (vec![GrantRef(9)], Port(4), false));
    let two = read(&[
        ("ring-page-order", "1"),
        ("ring-ref0", "9"),
        ("ring-ref1", "12"),
        ("event-channel", "4"),
        ("feature-persistent", "1"),
    ]);
    assert_eq!(two.unwrap().ring, [GrantRef(9), GrantRef(12)]);
    for (nodes, bad) in [
        (&[("event-channel", "4")][..], "ring-ref"),
        (&[("ring-ref", "-1"), ("event-channel", "4")], "ring-ref"),
        (&[("ring-ref", "4294967296"), ("event-channel", "4")], "ring-ref"),
        (&[("ring-ref", "1")], "event-channel"),
        (&[("ring-ref", "1"), ("event-channel", "")], "event-channel"),
        (&[("ring-page-order", "5"), ("event-channel", "4")], "ring-page-order"),
        (&[("ring-page-order", "1"), ("ring-ref0", "1"), ("event-channel", "4")], "ring-ref*"),
        (&[("protocol", "x86_32-abi"), ("ring-ref", "1"), ("event-channel", "4")], "protocol"),
    ] {
        assert_eq!(read(nodes), Err(BadNode(bad)), "{nodes:?}");
    }
}
