//! The disk driver against a disk in memory, honest and lying.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use janus_proto::abi::virtio::blk::{
    Config, DiscardWriteZeroes, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX,
    F_WRITE_ZEROES, RequestHeader, RequestStatus, RequestType,
};
use janus_proto::abi::virtio::{DeviceId, InterruptStatus, Status, feature};
use janus_proto::sync::Ordering;
use janus_proto::virtqueue::{GuestWords, Segment};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::blk::VirtioBlk;
use super::fake::{FakeDevice, ProcessMemory, read, write};
use super::{COMMON_FEATURES, InitError, Transport};
use crate::class::{BlockDevice, BlockFeatures, BlockOp, BlockStatus, SubmitError};
use crate::dma::DmaBuf;
use crate::heap_frames::HeapFrames;

const SECTORS: usize = 4096;
const ALL: u64 = COMMON_FEATURES | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;

fn config(change: impl FnOnce(&mut Config)) -> Vec<u8> {
    let mut config = Config::new_zeroed();
    config.capacity = SECTORS as u64;
    config.seg_max = 126;
    config.blk_size = 512;
    config.max_discard_sectors = 1024;
    config.max_write_zeroes_sectors = 1024;
    change(&mut config);
    config.as_bytes().to_vec()
}

struct Disk {
    device: FakeDevice,
    data: Vec<u8>,
    frames: &'static HeapFrames,
}

impl Disk {
    fn new(offered: u64, change: impl FnOnce(&mut Config)) -> Self {
        let device = FakeDevice::new(DeviceId::BLOCK, offered, config(change), &[256]);
        let data = (0..SECTORS * 512).map(|n| (n / 512 * 7 + n) as u8).collect();
        Self { device, data, frames: HeapFrames::leaked() }
    }
    fn driver(&self) -> Result<VirtioBlk, InitError> {
        VirtioBlk::new(Box::new(self.device.clone()), self.frames)
    }
    fn buf(&self, len: usize) -> DmaBuf {
        DmaBuf::new(self.frames, len).unwrap()
    }
    /// Serves everything; whether an interrupt is due.
    fn serve(&mut self) -> bool {
        let data = &mut self.data;
        self.device.serve(0, |chain| execute(data, chain))
    }
}

/// Does one request; answers the bytes written.
fn execute(disk: &mut [u8], chain: &[Segment]) -> u32 {
    let (status, rest) = chain.split_last().unwrap();
    let (head, data) = rest.split_first().unwrap();
    assert_eq!((head.len, head.writable, status.len, status.writable), (16, false, 1, true));
    let header = RequestHeader::read_from_bytes(&read(*head)).unwrap();
    let mut at = header.sector as usize * 512;
    let mut written = 1;
    let range = |data: &[Segment]| {
        let range = DiscardWriteZeroes::read_from_bytes(&read(data[0])).unwrap();
        range.sector as usize * 512..(range.sector as usize + range.num_sectors as usize) * 512
    };
    let answer = match header.request_type {
        RequestType::IN => {
            for segment in data {
                assert!(segment.writable);
                write(*segment, &disk[at..at + segment.len as usize]);
                at += segment.len as usize;
                written += segment.len;
            }
            RequestStatus::OK
        }
        RequestType::OUT => {
            for segment in data {
                assert!(!segment.writable);
                disk[at..at + segment.len as usize].copy_from_slice(&read(*segment));
                at += segment.len as usize;
            }
            RequestStatus::OK
        }
        RequestType::FLUSH => RequestStatus::OK,
        RequestType::DISCARD => {
            disk[range(data)].fill(0xdd);
            RequestStatus::OK
        }
        RequestType::WRITE_ZEROES => {
            disk[range(data)].fill(0);
            RequestStatus::OK
        }
        _ => RequestStatus::UNSUPP,
    };
    write(*status, &[answer.0]);
    written
}

#[test]
fn reads_writes_and_ranges_reach_the_disk() {
    for offered in [
        ALL,
        ALL & !feature::RING_INDIRECT_DESC,
        ALL & !feature::RING_EVENT_IDX,
        feature::VERSION_1,
    ] {
        let mut disk = Disk::new(offered, |_| ());
        let mut driver = disk.driver().unwrap();
        assert_eq!(disk.device.registers().written, [0, 1, 3, 11, 15], "virtio 1.2, 3.1.1");
        let geometry = driver.geometry();
        assert_eq!((geometry.sectors, geometry.block_size), (SECTORS as u64, 512));
        let mut buf = disk.buf(8192);
        buf[..8192].fill(0x5a);
        driver.submit(1, BlockOp::Write { sector: 8, len: 8192, buf }).unwrap();
        driver.submit(2, BlockOp::Read { sector: 100, len: 512, buf: disk.buf(512) }).unwrap();
        if offered == ALL {
            driver.submit(3, BlockOp::Flush).unwrap();
            driver.submit(4, BlockOp::Discard { sector: 200, sectors: 2 }).unwrap();
            driver.submit(5, BlockOp::WriteZeroes { sector: 300, sectors: 3 }).unwrap();
        } else {
            assert_eq!(geometry.features.contains(BlockFeatures::FLUSH), offered & F_FLUSH != 0);
        }
        assert!(!driver.arm());
        driver.kick();
        assert_eq!(disk.device.kicks(0), 1, "one kick for all");
        assert!(disk.serve());
        let mut ended = Vec::new();
        while let Some(done) = driver.complete().unwrap() {
            assert_eq!(done.status, BlockStatus::Ok);
            if done.id == 2 {
                assert_eq!(&done.buf.unwrap()[..512], &disk.data[51200..51712]);
            }
            ended.push(done.id);
        }
        assert_eq!(ended, if offered == ALL { vec![1, 2, 3, 4, 5] } else { vec![1, 2] });
        assert!(disk.data[4096..4096 + 8192].iter().all(|b| *b == 0x5a));
        if offered == ALL {
            assert!(disk.data[200 * 512..202 * 512].iter().all(|b| *b == 0xdd));
            assert!(disk.data[300 * 512..303 * 512].iter().all(|b| *b == 0));
        }
        drop(driver);
        assert_eq!(disk.frames.pages_out(), 0, "everything came back");
    }
}

#[test]
fn a_full_queue_is_busy_and_drains() {
    let mut disk = Disk::new(ALL, |_| ());
    let mut driver = disk.driver().unwrap();
    let depth = u64::from(driver.geometry().queue_depth);
    assert_eq!(depth, 256, "one descriptor each, thanks to indirect tables");
    for round in 0..5 {
        for id in 0..depth {
            driver.submit(id, BlockOp::Read { sector: id, len: 512, buf: disk.buf(512) }).unwrap();
        }
        let more = BlockOp::Read { sector: 0, len: 512, buf: disk.buf(512) };
        assert!(matches!(driver.submit(depth, more), Err(SubmitError::Busy(BlockOp::Read { .. }))));
        driver.kick();
        disk.serve();
        for id in 0..depth {
            let done = driver.complete().unwrap().unwrap();
            assert_eq!((done.id, done.status), (id, BlockStatus::Ok));
            let at = id as usize * 512;
            assert_eq!(&done.buf.unwrap()[..512], &disk.data[at..at + 512]);
        }
        assert!(driver.complete().unwrap().is_none());
        assert_eq!(disk.device.kicks(0), round + 1);
    }
}

#[test]
fn long_requests_are_cut_where_the_device_limits_segments() {
    let mut disk = Disk::new(ALL | F_SIZE_MAX, |config| {
        config.size_max = 4096 + 100; // not a multiple of the block size
        config.seg_max = 10;
    });
    let mut driver = disk.driver().unwrap();
    assert_eq!(driver.geometry().max_request, 40960);
    driver.submit(1, BlockOp::Read { sector: 16, len: 40960, buf: disk.buf(40960) }).unwrap();
    let over = BlockOp::Read { sector: 16, len: 40960 + 512, buf: disk.buf(65536) };
    assert!(matches!(driver.submit(2, over), Err(SubmitError::Invalid(_))));
    driver.kick();
    disk.serve();
    let done = driver.complete().unwrap().unwrap();
    assert_eq!(&done.buf.unwrap()[..40960], &disk.data[8192..8192 + 40960]);
}

#[test]
fn requests_outside_the_disk_are_refused_unharmed() {
    let disk = Disk::new(ALL | F_RO, |config| config.blk_size = 4096);
    let mut driver = disk.driver().unwrap();
    let read = |sector, len| BlockOp::Read { sector, len, buf: disk.buf(4096) };
    for op in [
        read(SECTORS as u64, 4096),
        read(SECTORS as u64 - 1, 4096),
        read(u64::MAX, 4096),
        read(u64::MAX - 7, 4096),
        read(1, 4096),
        read(0, 512),
        read(0, 0),
        read(0, 8192),
        BlockOp::Write { sector: 0, len: 4096, buf: disk.buf(4096) },
        BlockOp::Discard { sector: 0, sectors: 8 },
        BlockOp::WriteZeroes { sector: 0, sectors: 8 },
    ] {
        let text = format!("{op:?}");
        assert!(matches!(driver.submit(1, op), Err(SubmitError::Invalid(_))), "{text}");
    }
    driver.submit(1, read(SECTORS as u64 - 8, 4096)).unwrap();
}

#[test]
fn nonsense_in_the_configuration_is_an_error() {
    for (change, expected) in [
        (
            Box::new(|c: &mut Config| c.blk_size = 0) as Box<dyn FnOnce(&mut Config)>,
            InitError::Config("block size"),
        ),
        (Box::new(|c: &mut Config| c.blk_size = 513), InitError::Config("block size")),
        (Box::new(|c: &mut Config| c.blk_size = 1 << 31), InitError::Config("block size")),
        (
            Box::new(|c: &mut Config| c.size_max = 100),
            InitError::Config("segment shorter than a block"),
        ),
    ] {
        let disk = Disk::new(ALL | F_SIZE_MAX, change);
        assert_eq!(disk.driver().err(), Some(expected));
        assert_eq!(disk.frames.pages_out(), 0);
    }
    let restless = Disk::new(ALL, |_| ());
    restless.device.registers().restless = true;
    assert_eq!(restless.driver().err(), Some(InitError::Config("it never holds still")));
    let empty = Disk::new(ALL, |config| config.capacity = 0);
    let mut driver = empty.driver().unwrap();
    let op = BlockOp::Read { sector: 0, len: 512, buf: empty.buf(512) };
    assert!(matches!(driver.submit(1, op), Err(SubmitError::Invalid(_))), "a disk of no bytes");
}

#[test]
fn devices_that_cannot_be_set_up_say_why() {
    let check = |offered: u64, lie: fn(&FakeDevice), expected: InitError| {
        let disk = Disk::new(offered, |_| ());
        lie(&disk.device);
        assert_eq!(disk.driver().err(), Some(expected));
        assert_eq!(disk.frames.pages_out(), 0);
    };
    check(ALL & !feature::VERSION_1, |_| (), InitError::Legacy);
    check(ALL, |device| device.registers().accepts = false, InitError::Features);
    check(ALL, |device| device.registers().sizes = vec![0], InitError::NoQueue(0));
    check(ALL, |device| device.registers().sizes = vec![1], InitError::Queue(0));
    check(
        ALL,
        |device| {
            device.registers().status = Status::DRIVER_OK;
            device.registers().resets = false;
        },
        InitError::Reset,
    );
}

/// Submits four reads, lets `lie` act, and expects an error and then all four back as failed.
fn lying_disk(lie: impl FnOnce(&FakeDevice), resets: bool) {
    let disk = Disk::new(ALL, |_| ());
    let mut driver = disk.driver().unwrap();
    for id in 0..4 {
        driver.submit(id, BlockOp::Read { sector: id, len: 512, buf: disk.buf(512) }).unwrap();
    }
    driver.kick();
    disk.device.registers().resets = resets;
    lie(&disk.device);
    driver.complete().unwrap_err();
    assert!(driver.arm(), "there is something to drain");
    let mut ids = Vec::new();
    while let Some(done) = driver.complete().unwrap() {
        assert_eq!(done.status, BlockStatus::IoError);
        assert_eq!(
            done.buf.is_some(),
            resets,
            "a buffer that the device may write is not given back"
        );
        ids.push(done.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2, 3]);
    assert!(!driver.arm());
    let op = BlockOp::Read { sector: 0, len: 512, buf: disk.buf(512) };
    assert!(matches!(driver.submit(9, op), Err(SubmitError::Gone(_))));
    drop(driver);
    if resets {
        assert_eq!(disk.frames.pages_out(), 0);
    } else {
        assert!(
            disk.frames.pages_out() > 4,
            "rings and buffers stay with a device that did not stop"
        );
    }
}

/// Writes a used element and the index.
fn forge(device: &FakeDevice, idx: u32, id: u32, len: u32) {
    let registers = device.registers();
    let used = registers.queues[0].as_ref().unwrap().rings.used.0;
    for (offset, value) in [(4, id), (8, len), (0, idx << 16)] {
        ProcessMemory
            .word(janus_proto::addr::Gpa(used + offset))
            .unwrap()
            .store(value, Ordering::Relaxed);
    }
}

#[test]
fn a_lying_disk_ends_all_requests_as_errors() {
    lying_disk(|device| forge(device, 1, 77, 1), true); // free descriptor
    lying_disk(|device| forge(device, 1, 256, 1), true); // beyond the table
    lying_disk(|device| forge(device, 1, 0, 514), true); // longer than its buffers
    lying_disk(|device| forge(device, 5, 0, 1), true); // more than in flight
    lying_disk(|device| forge(device, 1, 77, 1), false); // and does not even reset
}

#[test]
fn a_disk_that_fails_under_load_ends_all_requests_as_errors() {
    lying_disk(FakeDevice::fail, true);
    lying_disk(
        |device| {
            device.fail();
            device.registers().status = Status::from_bits_retain(0xff); // pulled out
        },
        true,
    );
}

#[test]
fn a_status_that_was_never_written_is_an_error() {
    let disk = Disk::new(ALL, |_| ());
    let mut driver = disk.driver().unwrap();
    for (id, answer, expected) in [
        (1, None, BlockStatus::IoError),
        (2, Some(0), BlockStatus::Ok),
        (3, Some(1), BlockStatus::IoError),
        (4, Some(2), BlockStatus::Unsupported),
        (5, Some(99), BlockStatus::IoError),
    ] {
        driver.submit(id, BlockOp::Flush).unwrap();
        driver.kick();
        disk.device.serve(0, |chain| {
            if let Some(answer) = answer {
                write(*chain.last().unwrap(), &[answer]);
            }
            1
        });
        let done = driver.complete().unwrap().unwrap();
        assert_eq!((done.id, done.status), (id, expected));
    }
}

#[test]
fn messages_need_no_acknowledgement() {
    let device = FakeDevice::new(DeviceId::BLOCK, 0, Vec::new(), &[]);
    assert_eq!(device.interrupts().acknowledge(), InterruptStatus::QUEUE);
}
