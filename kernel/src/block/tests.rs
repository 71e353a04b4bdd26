//! The block layer over a disk that answers late, out of order, or not at all.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::sync::Mutex;

use janus_front::class::{Completion, PeerError, SubmitError};
use janus_front::heap_frames::HeapFrames;

use super::cache::Cached;
use super::*;
use crate::task::{block_on, spawn, yield_now};

const SECTORS: u64 = 8192;
const DEPTH: usize = 4;
const MAX_REQUEST: u32 = 16 * 1024;

/// What a test does to its disk.
#[derive(Default)]
struct Control {
    contents: Vec<u8>,
    in_flight: Vec<(u64, BlockOp)>,
    kicked: usize,
    deepest: usize,
    /// Completions stay away while set.
    hold: bool,
    /// The next `complete` breaks the protocol.
    lie: bool,
    /// Sectors from here on fail.
    bad_from: Option<u64>,
    bogus_completion: Option<u64>,
    broken: bool,
}

#[derive(Clone)]
struct FakeDisk(Arc<Mutex<Control>>);

impl BlockDevice for FakeDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: SECTORS,
            block_size: 512,
            max_request: MAX_REQUEST,
            queue_depth: DEPTH as u16,
            features: BlockFeatures::WRITE | BlockFeatures::FLUSH | BlockFeatures::DISCARD,
        }
    }
    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        let mut control = self.0.lock().unwrap();
        if control.in_flight.len() == DEPTH {
            return Err(SubmitError::Busy(op));
        }
        control.in_flight.push((id, op));
        control.deepest = control.deepest.max(control.in_flight.len());
        Ok(())
    }
    fn kick(&mut self) {
        let mut control = self.0.lock().unwrap();
        control.kicked = control.in_flight.len();
    }
    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        let mut control = self.0.lock().unwrap();
        if core::mem::take(&mut control.lie) {
            control.broken = true;
            return Err(PeerError("used index ran ahead"));
        }
        if let Some(id) = control.bogus_completion.take() {
            return Ok(Some(Completion { id, status: BlockStatus::Ok, buf: None }));
        }
        if (control.hold && !control.broken) || control.kicked == 0 {
            return Ok(None);
        }
        control.kicked -= 1;
        let last = control.kicked; // newest first: out of order
        let (id, op) = control.in_flight.remove(last);
        let bad_from = control.bad_from.unwrap_or(u64::MAX);
        let ok = |sector: u64, len: usize| {
            if sector + (len as u64 / 512) > bad_from {
                BlockStatus::IoError
            } else {
                BlockStatus::Ok
            }
        };
        let (status, buf) = match op {
            BlockOp::Read { sector, len, mut buf } => {
                let at = sector as usize * 512;
                buf[..len].copy_from_slice(&control.contents[at..at + len]);
                (ok(sector, len), Some(buf))
            }
            BlockOp::Write { sector, len, buf } => {
                let at = sector as usize * 512;
                control.contents[at..at + len].copy_from_slice(&buf[..len]);
                (ok(sector, len), Some(buf))
            }
            _ => (BlockStatus::Ok, None),
        };
        let status = if control.broken { BlockStatus::IoError } else { status };
        Ok(Some(Completion { id, status, buf }))
    }
    fn arm(&mut self) -> bool {
        let control = self.0.lock().unwrap();
        !control.hold && control.kicked > 0
    }
}

fn byte(at: usize) -> u8 {
    (at / 512 * 7 + at) as u8
}

fn disk() -> (Arc<Block>, Arc<Mutex<Control>>, &'static HeapFrames) {
    let contents = (0..SECTORS as usize * 512).map(byte).collect();
    let control = Arc::new(Mutex::new(Control { contents, ..Control::default() }));
    let frames = HeapFrames::leaked();
    let block = Block::start("test0".into(), Box::new(FakeDisk(Arc::clone(&control))), frames);
    (block, control, frames)
}

#[test]
fn many_readers_get_their_own_data_and_fill_the_queue() {
    let (block, control, _) = disk();
    block_on(async {
        let tasks: Vec<_> = (0..40_u64)
            .map(|i| {
                let block = Arc::clone(&block);
                spawn("reader", async move { block.read(i * 4096, 4096).await })
            })
            .collect();
        for (i, task) in tasks.into_iter().enumerate() {
            let data = task.await.unwrap();
            assert!(data.iter().enumerate().all(|(j, b)| *b == byte(i * 4096 + j)), "{i}");
        }
    });
    assert_eq!(control.lock().unwrap().deepest, DEPTH);
    let counters = block.counters();
    assert_eq!((counters.requests, counters.bytes_read, counters.errors), (40, 40 * 4096, 0));
    assert!(counters.kicks <= 11, "kicks are for batches: {counters:?}");
    assert!(counters.queue_full > 0);
    assert_eq!(block.in_flight(), 0);
}

#[test]
fn any_range_of_bytes_can_be_read() {
    let (block, _, _) = disk();
    let cached = Cached::new(Arc::clone(&block));
    block_on(async {
        for (offset, len) in [
            (0, 1),
            (511, 2),
            (1000, 70_001),
            (4096, 4096),
            (0, 0),
            (SECTORS as usize * 512 - 3, 3),
        ] {
            let mut data = vec![0; len];
            block.read_into(offset as u64, &mut data).await.unwrap();
            assert!(data.iter().enumerate().all(|(j, b)| *b == byte(offset + j)), "{offset}");
            data.fill(0);
            cached.read_into(offset as u64, &mut data).await.unwrap();
            assert!(data.iter().enumerate().all(|(j, b)| *b == byte(offset + j)), "{offset}");
        }
    });
}

#[test]
fn writes_arrive_split_as_the_disk_needs() {
    let (block, control, _) = disk();
    let data: Vec<u8> = (0..100 * 1024_u32).map(|i| (i * 31) as u8).collect();
    block_on(async {
        block.write_from(512, &data).await.unwrap();
        let mut one = block.buffer(512).unwrap();
        one.fill(0xEE);
        block.write(0, one).await.unwrap();
        block.flush().await.unwrap();
        block.discard(0, 1024).await.unwrap();
        assert_eq!(block.write_zeroes(0, 512).await, Err(BlockError::Unsupported));
    });
    let control = control.lock().unwrap();
    assert!(control.contents[..512].iter().all(|b| *b == 0xEE));
    assert_eq!(&control.contents[512..512 + data.len()], &data);
    assert_eq!(block.counters().bytes_written, data.len() as u64 + 512);
}

#[test]
fn wrong_ranges_are_refused() {
    let (block, _, _) = disk();
    let end = block.capacity();
    block_on(async {
        assert_eq!(block.read(1, 512).await.unwrap_err(), BlockError::Misaligned);
        assert_eq!(block.read(0, 100).await.unwrap_err(), BlockError::Misaligned);
        assert_eq!(block.read(end, 512).await.unwrap_err(), BlockError::OutOfRange);
        assert_eq!(block.read(u64::MAX - 511, 512).await.unwrap_err(), BlockError::OutOfRange);
        assert_eq!(block.read(0, 32 * 1024).await.unwrap_err(), BlockError::TooLong);
        assert_eq!(block.read_into(end - 1, &mut [0; 2]).await, Err(BlockError::OutOfRange));
        let cached = Cached::new(Arc::clone(&block));
        assert_eq!(cached.read_into(end, &mut [0; 1]).await, Err(BlockError::OutOfRange));
    });
}

#[test]
fn a_bad_sector_fails_its_request_only() {
    let (block, control, _) = disk();
    control.lock().unwrap().bad_from = Some(100);
    block_on(async {
        assert_eq!(block.read(100 * 512, 512).await.unwrap_err(), BlockError::Io);
        assert!(block.read(0, 512).await.is_ok());
        let cached = Cached::new(Arc::clone(&block));
        assert_eq!(cached.read_into(51_200, &mut [0; 1]).await, Err(BlockError::Io));
        control.lock().unwrap().bad_from = None;
        assert_eq!(cached.read_into(51_200, &mut [0; 1]).await, Ok(()));
    });
    assert!(block.is_alive());
}

#[test]
fn a_dropped_request_keeps_its_buffer_until_the_device_is_done() {
    let (block, control, frames) = disk();
    control.lock().unwrap().hold = true;
    block_on(async {
        let task = {
            let block = Arc::clone(&block);
            spawn("impatient", async move { block.read(0, 4096).await })
        };
        for _ in 0..4 {
            yield_now().await;
        }
        assert_eq!(control.lock().unwrap().kicked, 1);
        assert!(task.cancel().await.is_none());
        assert_eq!(frames.pages_out(), 1); // the device still has it
        control.lock().unwrap().hold = false;
        block.interrupt();
        while block.in_flight() != 0 {
            yield_now().await;
        }
        // Back in the pool, and used by the next one.
        block.read(4096, 4096).await.unwrap();
        assert_eq!(frames.pages_out(), 1);
    });
}

#[test]
fn a_request_dropped_before_its_turn_is_not_made() {
    let (block, control, _) = disk();
    control.lock().unwrap().hold = true;
    block_on(async {
        let held: Vec<_> =
            (0..DEPTH).map(|i| block.start_read(i as u64 * 512, 512).unwrap()).collect();
        drop(block.start_read(8192, 512).unwrap());
        control.lock().unwrap().hold = false;
        block.interrupt();
        for request in held {
            request.await.unwrap();
        }
        assert!(block.read(0, 512).await.is_ok());
    });
    assert_eq!(block.counters().requests, DEPTH as u64 + 1);
}

#[test]
fn a_detached_disk_fails_everyone_at_once() {
    let (block, control, frames) = disk();
    control.lock().unwrap().hold = true;
    block_on(async {
        let tasks: Vec<_> = (0..10_u64)
            .map(|i| {
                let block = Arc::clone(&block);
                spawn("reader", async move { block.read(i * 512, 512).await.map(drop) })
            })
            .collect();
        for _ in 0..4 {
            yield_now().await;
        }
        crate::devices::add_block(Arc::clone(&block));
        let seen = crate::devices::generation();
        crate::devices::remove_block(&block);
        crate::devices::changed_since(seen).await;
        for task in tasks {
            assert_eq!(task.await, Err(BlockError::Gone));
        }
        assert_eq!(block.read(0, 512).await.unwrap_err(), BlockError::Gone);
    });
    assert!(!block.is_alive());
    control.lock().unwrap().in_flight.clear();
    drop(block);
    assert_eq!(frames.pages_out(), 0);
}

#[test]
fn a_lying_backend_ends_all_requests_with_its_error() {
    let (block, control, _) = disk();
    control.lock().unwrap().hold = true;
    block_on(async {
        let requests: Vec<_> =
            (0..10_u64).map(|i| block.start_read(i * 512, 512).unwrap()).collect();
        yield_now().await;
        control.lock().unwrap().lie = true;
        block.interrupt();
        for request in requests {
            let error = request.await.unwrap_err();
            assert_eq!(error, BlockError::Peer("used index ran ahead"));
        }
        assert!(!block.is_alive());
    });
}

#[test]
fn a_completion_that_nobody_asked_for_is_ignored() {
    let (block, control, _) = disk();
    block_on(async {
        for id in [0, 77, u64::MAX] {
            control.lock().unwrap().bogus_completion = Some(id);
            let data = block.read(512, 512).await;
            // With id 0 the lie hits the request itself: an error, never a wrong buffer.
            match data {
                Ok(data) => assert!(data.iter().enumerate().all(|(j, b)| *b == byte(512 + j))),
                Err(error) => assert_eq!(error, BlockError::Io),
            }
        }
        assert!(block.read(0, 512).await.is_ok());
    });
}

#[test]
fn short_memory_is_an_error_and_not_the_end() {
    let (block, _, frames) = disk();
    frames.set_limit(2);
    block_on(async {
        let first = block.read(0, 8192).await.unwrap();
        assert_eq!(block.read(0, 512).await.unwrap_err(), BlockError::NoMemory);
        drop(first);
        assert!(block.read(0, 512).await.is_ok()); // the pool gives up its stock
    });
}

#[test]
fn a_sequential_reader_of_a_cache_is_read_ahead_of() {
    let (block, _, _) = disk();
    let cached = Cached::new(Arc::clone(&block));
    block_on(async {
        let mut piece = [0; 4096];
        for at in (0..1024 * 1024_usize).step_by(4096) {
            cached.read_into(at as u64, &mut piece).await.unwrap();
            assert!(piece.iter().enumerate().all(|(j, b)| *b == byte(at + j)), "{at}");
        }
    });
    let (hits, misses) = cached.hits_and_misses();
    assert!((64..=64 + AHEAD).contains(&misses), "{misses} chunks of 16 KiB for 1 MiB");
    assert!(hits >= 190, "{hits}");
}
/// Chunks that may have been read ahead past the end.
const AHEAD: u64 = 8;

#[test]
fn a_dropped_reader_leaves_nothing_behind() {
    let (block, _, _) = disk();
    block_on(async {
        let mut reader = Reader::new(&block, 0, 100_000, 4096, 3).unwrap();
        let first = reader.next().await.unwrap().unwrap();
        assert_eq!(first.len(), 4096);
        drop((reader, first));
        assert!(block.read(0, 512).await.is_ok());
        while block.in_flight() != 0 {
            yield_now().await;
        }
    });
}
