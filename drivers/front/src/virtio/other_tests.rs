//! Console, entropy and balloon, and the `virtio-drivers` crate's disk, against devices in memory.
// UNSAFETY: says that in this process a pointer is its own device address, as the fake device takes it.
#![expect(unsafe_code, reason = "the crate's Hal shares by pointer")]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use std::sync::OnceLock;

use janus_proto::abi::virtio::{DeviceId, feature};
use janus_proto::virtqueue::Segment;

use super::balloon::VirtioBalloon;
use super::baseline::DeviceFrames;
use super::baseline_blk::BaselineBlk;
use super::fake::{FakeDevice, ProcessMemory, read, write};
use super::low_rate::{VirtioConsole, VirtioRng};
use super::{COMMON_FEATURES, InitError};
use crate::class::{
    BalloonDevice, BlockDevice, BlockOp, BlockStatus, ConsoleDevice, EntropyDevice, SubmitError,
};
use crate::dma::{DmaBuf, FrameSource};
use crate::heap_frames::HeapFrames;

#[derive(Debug)]
struct Host;

fn frames() -> &'static HeapFrames {
    static FRAMES: OnceLock<&'static HeapFrames> = OnceLock::new();
    FRAMES.get_or_init(HeapFrames::leaked)
}

// SAFETY: `ProcessMemory` takes every device address for a pointer.
unsafe impl DeviceFrames for Host {
    const ANY_MEMORY: bool = true;
    fn frames() -> &'static dyn FrameSource {
        frames()
    }
}

#[test]
fn console_output_and_input_pass_through_without_waiting() {
    let device = FakeDevice::new(DeviceId::CONSOLE, COMMON_FEATURES, Vec::new(), &[64, 64]);
    let mut console = VirtioConsole::<Host>::new(Box::new(device.clone())).unwrap();
    assert_eq!(device.registers().taken & feature::RING_EVENT_IDX, 0, "hidden from the crate");
    let text: Vec<u8> = (0..30_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut sent = 0;
    let mut seen = Vec::new();
    while sent < text.len() {
        let taken = console.write(&text[sent..]);
        assert!(taken != 0, "there is room after each service");
        assert_eq!(console.write(&[]), 0);
        assert!(console.output_pending());
        sent += taken;
        if sent < text.len() {
            assert_eq!(console.write(&text[sent..]), 0, "full, and it does not wait");
        }
        device.serve(1, |chain| {
            seen.extend(read(chain[0]));
            0
        });
        assert!(!console.output_pending());
    }
    assert_eq!(seen, text);
    // Input: at most as many bytes at a time as the reader has room for.
    let mut buf = [0; 5];
    assert_eq!(console.read(&mut buf), 0);
    let mut pieces = vec![b"hello world".as_slice(), b"!"].into_iter();
    deliver(&device, &mut pieces);
    let mut got = Vec::new();
    loop {
        let count = console.read(&mut buf);
        if count == 0 {
            break;
        }
        got.extend_from_slice(&buf[..count]);
    }
    assert_eq!(got, b"hello world!");
}

/// Puts one piece into each waiting buffer of queue 0, while there are pieces.
fn deliver(device: &FakeDevice, pieces: &mut dyn Iterator<Item = &'static [u8]>) {
    let mut registers = device.registers();
    let queue = registers.queues[0].as_mut().unwrap();
    let mut chain = Vec::new();
    for piece in pieces {
        let head = queue.device.pop(&ProcessMemory, &mut chain).unwrap().unwrap();
        write(chain[0], piece);
        queue.device.push(&ProcessMemory, head, u32::try_from(piece.len()).unwrap()).unwrap();
        queue.device.publish(&ProcessMemory).unwrap();
    }
}

#[test]
fn a_console_that_lies_is_given_up_without_a_panic() {
    for (head, len) in [(7, 1), (200, 1), (0, 5000)] {
        let device = FakeDevice::new(DeviceId::CONSOLE, COMMON_FEATURES, Vec::new(), &[64, 64]);
        let mut console = VirtioConsole::<Host>::new(Box::new(device.clone())).unwrap();
        {
            let mut registers = device.registers();
            let queue = registers.queues[0].as_mut().unwrap();
            queue.device.push(&ProcessMemory, head, len).unwrap();
            queue.device.publish(&ProcessMemory).unwrap();
        }
        assert_eq!(console.read(&mut [0; 8]), 0);
        assert!(console.failure().is_some());
        assert_eq!(console.write(b"x"), 0);
    }
}

#[test]
fn entropy_is_asked_for_once_for_each_time_somebody_needs_it() {
    let device = FakeDevice::new(DeviceId::ENTROPY, COMMON_FEATURES, Vec::new(), &[8]);
    let mut rng = VirtioRng::<Host>::new(Box::new(device.clone())).unwrap();
    let mut served = 0u8;
    let mut serve = || {
        let before = served;
        device.serve(0, |chain: &[Segment]| {
            served += 1;
            write(chain[0], &[served; 32]);
            32
        });
        served - before
    };
    assert_eq!(rng.read(&mut [0; 32]), 0, "nothing has arrived");
    assert_eq!(serve(), 1);
    let mut buf = [0; 32];
    assert_eq!(rng.read(&mut buf), 32);
    assert_eq!(buf, [1; 32]);
    assert_eq!(serve(), 0, "a completion alone asks for nothing");
    assert_eq!(rng.read(&mut buf), 0);
    assert_eq!(serve(), 1);
    let small = FakeDevice::new(DeviceId::ENTROPY, COMMON_FEATURES, Vec::new(), &[4]);
    assert_eq!(VirtioRng::<Host>::new(Box::new(small)).err(), Some(InitError::Queue(0)));
}

#[test]
#[expect(clippy::cast_possible_truncation, reason = "the low bits are meant")]
fn the_balloon_follows_the_host_up_and_down() {
    let source = HeapFrames::leaked();
    let device = FakeDevice::new(DeviceId::BALLOON, COMMON_FEATURES, vec![0; 8], &[128, 128]);
    let mut balloon = VirtioBalloon::new(Box::new(device.clone()), source).unwrap();
    // Addresses of this process are beyond 16 TiB; their low bits will do to tell pages apart.
    balloon.number = |page| Some((page.0 >> 12) as u32);
    let own = source.pages_out();
    let set_target =
        |pages: u32| device.registers().config[..4].copy_from_slice(&pages.to_le_bytes());
    let actual = || u32::from_le_bytes(device.registers().config[4..8].try_into().unwrap());
    let numbers = |queue: usize| {
        let mut numbers = Vec::new();
        device.serve(queue, |chain| {
            let bytes = read(chain[0]);
            numbers.extend(bytes.chunks(4).map(|n| u32::from_le_bytes(n.try_into().unwrap())));
            0
        });
        numbers
    };
    assert_eq!(balloon.step(100), Ok(0));
    set_target(2500);
    let mut given = Vec::new();
    for expected in [1000, 1000, 500] {
        assert_eq!(balloon.step(1000), Ok(expected));
        assert!(balloon.busy());
        assert_eq!(balloon.step(1000), Ok(0), "one request at a time");
        given.extend(numbers(0));
    }
    assert_eq!(balloon.step(1000), Ok(0));
    assert_eq!((balloon.held_pages(), actual(), balloon.busy()), (2500, 2500, false));
    assert_eq!(source.pages_out(), own + 2500);
    let mut unique = given.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), 2500);
    // Down again: the pages are used only after the host has heard of it.
    set_target(2000);
    assert_eq!(balloon.step(1000), Ok(500));
    assert_eq!(source.pages_out(), own + 2500);
    let mut back = numbers(1);
    assert_eq!(balloon.step(1000), Ok(0));
    assert_eq!((source.pages_out(), actual()), (own + 2000, 2000));
    back.retain(|page| !given.contains(page));
    assert!(back.is_empty(), "only pages that were given come back");
    // No memory: no progress, no error.
    source.set_limit(source.pages_out() + 3);
    set_target(5000);
    assert_eq!(balloon.step(1000), Ok(3));
    numbers(0);
    assert_eq!(balloon.step(1000), Ok(0));
    device.fail();
    balloon.step(1000).unwrap_err();
    drop(balloon);
    assert_eq!(source.pages_out(), 2003, "what a failed device may hold stays with it");
}

#[test]
fn the_crates_disk_runs_on_our_transport() {
    let mut config = vec![0; 64];
    config[..8].copy_from_slice(&64u64.to_le_bytes());
    let device = FakeDevice::new(DeviceId::BLOCK, COMMON_FEATURES, config, &[256]);
    let mut disk = BaselineBlk::<Host>::new(Box::new(device.clone())).unwrap();
    assert_eq!(device.registers().taken & feature::RING_EVENT_IDX, 0);
    assert_eq!(disk.geometry().sectors, 64);
    let buf = || DmaBuf::new(frames(), 4096).unwrap();
    for id in 0..16 {
        disk.submit(id, BlockOp::Read { sector: id, len: 4096, buf: buf() }).unwrap();
    }
    let more = disk.submit(16, BlockOp::Read { sector: 0, len: 512, buf: buf() });
    assert!(matches!(more, Err(SubmitError::Busy(_))));
    let outside = disk.submit(16, BlockOp::Write { sector: 63, len: 1024, buf: buf() });
    assert!(matches!(outside, Err(SubmitError::Invalid(_))));
    assert!(!disk.arm());
    device.serve(0, |chain| {
        let [header, data, status] = chain else { panic!("three buffers, not {chain:?}") };
        let sector = read(*header)[8];
        write(*data, &[sector; 4096]);
        write(*status, &[0]);
        4097
    });
    for id in 0..16u8 {
        let done = disk.complete().unwrap().unwrap();
        assert_eq!((done.id, done.status), (id.into(), BlockStatus::Ok));
        assert!(done.buf.unwrap().iter().all(|byte| *byte == id));
    }
    assert!(disk.complete().unwrap().is_none());
}
