//! Requests to a disk, right ones and wrong ones.

use std::sync::Arc;

use janus_proto::abi::virtio::blk::{F_DISCARD, F_FLUSH, F_RO, F_WRITE_ZEROES};
use janus_proto::abi::virtio::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC};

use super::*;
use crate::storage::MemoryDisk;
use crate::virtio::testing::Driver;

const ALL: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES | F_MQ | RING_EVENT_IDX | RING_INDIRECT_DESC;
const SECTORS: usize = 64;
/// Where the parts of a request are, from the driver's buffers on.
const STATUS: u64 = 0x800;
const DATA: u64 = 0x1000;

fn disk() -> MemoryDisk {
    let mut disk = MemoryDisk::new(SECTORS);
    for (index, byte) in disk.bytes.iter_mut().enumerate() {
        *byte = u8::try_from(index / SECTOR).unwrap() + 1;
    }
    disk
}

fn driver(disk: MemoryDisk, wanted: u64) -> Driver {
    Driver::new(
        Box::new(Blk::new(Box::new(disk), 2, "a disk with a name that is too long")),
        wanted,
    )
}

/// Sends a request with these data buffers; its status.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    driver.put(0, &header);
    driver.put(STATUS, &[0xee]);
    let mut buffers = vec![(0, HEADER, false)];
    buffers.extend_from_slice(data);
    buffers.push((STATUS, 1, true));
    let written = driver.ask(0, &buffers);
    (driver.peek(STATUS, 1)[0], written)
}

/// The data of a discard.
fn ranges(driver: &Driver, ranges: &[(u64, u32, u32)]) -> u32 {
    for (index, (sector, count, flags)) in (0..).zip(ranges) {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        driver.put(DATA + 16 * index, &bytes);
    }
    16 * u32::try_from(ranges.len()).unwrap()
}

fn first_bytes(driver: &mut Driver, sector: u64, count: u32) -> Vec<u8> {
    assert_eq!(ask(driver, 0, sector, &[(DATA, 512 * count, true)]).0, 0);
    driver.peek(DATA, 512 * count as usize).chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn what_is_written_is_read_again_however_it_is_cut() {
    let mut driver = driver(disk(), ALL);
    assert_eq!(first_bytes(&mut driver, 3, 4), [4, 5, 6, 7]);
    driver.put(DATA, &[0xab; 1536]);
    // Not at sectors, not at words.
    let cut = [(DATA, 1, false), (DATA + 1, 1000, false), (DATA + 1001, 535, false)];
    assert_eq!(ask(&mut driver, 1, 10, &cut), (0, 1));
    assert_eq!(first_bytes(&mut driver, 9, 5), [10, 0xab, 0xab, 0xab, 14]);
    let cut = [(DATA, 511, true), (DATA + 511, 513, true)];
    assert_eq!(ask(&mut driver, 0, 62, &cut), (0, 1025));
}

#[test]
fn header_and_status_may_share_buffers_with_data() {
    let mut driver = driver(disk(), ALL);
    driver.put(0, &[1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    driver.put(16, &[0xcd; 512]);
    assert_eq!(driver.ask(0, &[(0, 528, false), (STATUS, 1, true)]), 1);
    driver.put(0, &[0; 1]);
    assert_eq!(driver.ask(0, &[(0, 16, false), (DATA, 513, true)]), 513);
    assert_eq!(driver.peek(DATA, 513), [vec![0xcd; 512], vec![0]].concat());
}

#[test]
fn requests_that_make_no_sense_are_errors_and_change_nothing() {
    let mut driver = driver(disk(), ALL);
    let last = SECTORS as u64;
    for (name, kind, sector, data, status) in [
        ("read behind the end", 0, last, (DATA, 512, true), 1),
        ("read across the end", 0, last - 1, (DATA, 1024, true), 1),
        ("read from nowhere", 0, u64::MAX, (DATA, 512, true), 1),
        ("write behind the end", 1, last, (DATA, 512, false), 1),
        ("write around the end", 1, u64::MAX, (DATA, 1024, false), 1),
        ("read of half a sector", 0, 0, (DATA, 256, true), 1),
        ("write of half a sector", 1, 0, (DATA, 768, false), 1),
        ("read to where no memory is", 0, 0, (1 << 40, 512, true), 1),
        ("write from where no memory is", 1, 0, (1 << 40, 512, false), 1),
        ("unknown", 99, 0, (DATA, 512, false), 2),
        ("SCSI", 2, 0, (DATA, 512, false), 2),
        ("discard of nothing", 11, 0, (DATA, 8, false), 1),
        ("discard of too many ranges", 11, 0, (DATA, 17 * 16, false), 1),
    ] {
        driver.put(DATA, &[0; 512]);
        assert_eq!(ask(&mut driver, kind, sector, &[data]), (status, 1), "{name}");
    }
    assert_eq!(first_bytes(&mut driver, 0, 4), [1, 2, 3, 4]);
    // No room for a status, or no header: the chain comes back, and the device goes on.
    driver.put(0, &[0; 16]);
    assert_eq!(driver.ask(0, &[(0, 16, false)]), 0);
    driver.put(STATUS, &[0xee]);
    assert_eq!(driver.ask(0, &[(0, 15, false), (STATUS, 1, true)]), 1);
    assert_eq!(driver.peek(STATUS, 1), [1]);
    assert_eq!(driver.ask(0, &[(STATUS, 1, true)]), 1);
    assert_eq!(first_bytes(&mut driver, 0, 1), [1]);
}

#[test]
fn ranges_are_discarded_and_filled_with_zeroes() {
    let mut driver = driver(disk(), ALL);
    let len = ranges(&driver, &[(1, 2, 0), (5, 1, 0)]);
    assert_eq!(ask(&mut driver, 11, 0, &[(DATA, len, false)]), (0, 1));
    assert_eq!(first_bytes(&mut driver, 0, 7), [1, 0, 0, 4, 5, 0, 7]);
    for (flags, sector) in [(0, 10), (1, 20)] {
        let len = ranges(&driver, &[(sector, 3, flags)]);
        assert_eq!(ask(&mut driver, 13, 0, &[(DATA, len, false)]), (0, 1));
        assert_eq!(first_bytes(&mut driver, sector, 4)[..3], [0, 0, 0]);
    }
    let last = SECTORS as u64;
    for (kind, range, status) in [
        (11, (0, 1, 1), 2),
        (13, (0, 1, 2), 2),
        (11, (last, 1, 0), 1),
        (11, (u64::MAX, 2, 0), 1),
        (13, (0, MOST_ZEROES + 1, 0), 1),
    ] {
        // The good one before it is not done either.
        let len = ranges(&driver, &[(30, 1, 0), range]);
        assert_eq!(ask(&mut driver, kind, 0, &[(DATA, len, false)]).0, status, "{kind} {range:?}");
        assert_eq!(first_bytes(&mut driver, 30, 1), [31]);
    }
}

#[test]
fn a_driver_that_does_not_flush_has_every_write_stable() {
    for (wanted, flushes) in [(ALL, 1), (ALL & !F_FLUSH, 2)] {
        let shared = Arc::new(Mutex::new(disk()));
        let model = Blk::new(Box::new(Counted(shared.clone())), 1, "");
        let mut driver = Driver::new(Box::new(model), wanted);
        assert_eq!(ask(&mut driver, 1, 0, &[(DATA, 512, false)]).0, 0);
        assert_eq!(ask(&mut driver, 4, 0, &[]).0, 0);
        assert_eq!(shared.lock().unwrap().flushes, flushes);
    }
}

/// A disk that others look at.
struct Counted(Arc<Mutex<MemoryDisk>>);

impl BlockBackend for Counted {
    fn sectors(&self) -> u64 {
        self.0.lock().unwrap().sectors()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.lock().unwrap().read(sector, buf)
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().write(sector, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().flush()
    }
    fn discard(&mut self, _sector: u64, _sectors: u64) -> io::Result<()> {
        Err(io::Error::other("broken"))
    }
}

#[test]
fn errors_of_the_medium_are_errors_of_the_request() {
    let shared = Arc::new(Mutex::new(disk()));
    let mut driver = Driver::new(Box::new(Blk::new(Box::new(Counted(shared)), 1, "")), ALL);
    let len = ranges(&driver, &[(0, 1, 0)]);
    assert_eq!(ask(&mut driver, 11, 0, &[(DATA, len, false)]), (1, 1));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut disk = disk();
    disk.read_only = true;
    let mut driver = driver(disk, ALL);
    assert_eq!(driver.offered() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    let len = ranges(&driver, &[(0, 1, 0)]);
    for (kind, len) in [(1, 512), (11, len), (13, len)] {
        assert_eq!(ask(&mut driver, kind, 0, &[(DATA, len, false)]), (1, 1));
    }
    assert_eq!(first_bytes(&mut driver, 0, 1), [1]);
}

#[test]
fn it_tells_its_name_size_and_limits() {
    let mut driver = driver(disk(), ALL);
    assert_eq!(ask(&mut driver, 8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(driver.peek(DATA, 20), b"a disk with a name t");
    assert_eq!(ask(&mut driver, 8, 0, &[(DATA, 5, true)]), (0, 6));
    let config = |offset: usize| driver.get(0x100 + offset);
    assert_eq!((config(0), config(4), config(12), config(20)), (64, 0, 254, 512));
    let mut queues = [0; 2];
    driver.mmio.read(0x100 + 34, &mut queues);
    assert_eq!(queues, [2, 0]);
    assert_eq!(config(0x1000), 0);
}

#[test]
fn queues_are_served_apart() {
    let mut driver = driver(disk(), ALL);
    driver.put(0, &[0; 16]);
    assert_eq!(driver.ask(1, &[(0, 16, false), (DATA, 512, true), (STATUS, 1, true)]), 513);
    assert_eq!(driver.peek(DATA, 1), [1]);
}
