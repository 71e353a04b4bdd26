//! virtio block device (virtio 1.2, 5.2) on our own ring: many requests in flight, one kick for a batch.
//!
//! A request is a header, the data and a status byte. Header and status of each lie in a slot of
//! their own beside the ring, chosen by the head descriptor, so nothing is allocated on the way.

use alloc::boxed::Box;
use alloc::vec::Vec;

use janus_proto::abi::virtio::blk::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX, F_WRITE_ZEROES,
    RequestStatus, RequestType,
};
use janus_proto::addr::Gpa;
use janus_proto::sync::Ordering;
use janus_proto::virtqueue::{QueueStats, Segment};

use super::{
    COMMON_FEATURES, InitError, Link, NEEDS_RESET, Queue, RingMemory, Transport, make_queue,
};
use crate::class::{
    BlockDevice, BlockFeatures, BlockOp, BlockStatus, Completion, Geometry, PeerError, SECTOR_SIZE,
    SubmitError,
};
use crate::dma::{DmaBuf, FrameSource};

/// The one request queue that is used.
const QUEUE: u16 = 0;
/// Most entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Longest request, where the device sets no limit.
const MAX_REQUEST: u32 = 1 << 20;
/// Most data segments of one request; more than one only where the device limits their length.
const MAX_SEGMENTS: u32 = 62;

/// Bytes of a slot: header or discard range, header first, then the status in a word of its own.
const SLOT_BYTES: usize = 64;
const SLOT_RANGE: usize = 16;
const SLOT_STATUS: usize = 32;
/// A status that no device writes: it is still there if the device wrote none.
const NO_STATUS: u32 = 0xff;

const FEATURES: u64 = COMMON_FEATURES
    | F_SIZE_MAX
    | F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_DISCARD
    | F_WRITE_ZEROES;

macro_rules! config {
    ($field:ident) => {
        core::mem::offset_of!(Config, $field)
    };
}

#[derive(Debug)]
struct Request {
    id: u64,
    buf: Option<DmaBuf>,
}

/// What has become of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Working,
    /// It broke the protocol or failed, and was reset: buffers are ours again.
    Reset,
    /// It did not even finish its reset: it may still write to buffers it was given.
    Stuck,
}

/// A virtio disk.
#[derive(Debug)]
pub struct VirtioBlk {
    link: Link,
    queue: Queue,
    slots: RingMemory,
    /// Requests in flight, by head.
    requests: Box<[Option<Request>]>,
    outstanding: usize,
    geometry: Geometry,
    size_max: u32,
    max_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    chain: Vec<Segment>,
    state: State,
}

impl VirtioBlk {
    /// Sets the device up.
    ///
    /// # Errors
    /// See [`InitError`]; the device is left reset or marked as failed.
    pub fn new(
        mut transport: Box<dyn Transport>,
        frames: &'static dyn FrameSource,
    ) -> Result<Self, InitError> {
        let features = transport.negotiate(FEATURES)?;
        let sectors = transport.config_read64(config!(capacity))?;
        let read = |feature: u64, offset: usize| {
            (features & feature != 0).then(|| transport.config_read32(offset))
        };
        let block_size = read(F_BLK_SIZE, config!(blk_size)).unwrap_or(512);
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            return Err(InitError::Config("block size"));
        }
        let size_max =
            read(F_SIZE_MAX, config!(size_max)).map_or(MAX_REQUEST, |most| most.min(MAX_REQUEST));
        let size_max = size_max / block_size * block_size;
        if size_max == 0 {
            return Err(InitError::Config("segment shorter than a block"));
        }
        let segments = read(F_SEG_MAX, config!(seg_max))
            .map_or(MAX_SEGMENTS, |most| most.clamp(1, MAX_SEGMENTS));
        let segments = MAX_REQUEST.div_ceil(size_max).min(segments);
        let max_request = size_max.saturating_mul(segments).min(MAX_REQUEST);
        let max_discard_sectors = read(F_DISCARD, config!(max_discard_sectors)).unwrap_or(0);
        let max_write_zeroes_sectors =
            read(F_WRITE_ZEROES, config!(max_write_zeroes_sectors)).unwrap_or(0);

        let table = u16::try_from(segments + 2).map_err(|_| InitError::Config("segments"))?;
        let queue = make_queue(transport.as_mut(), frames, QUEUE, QUEUE_SIZE, table, features)?;
        let indirect = features & janus_proto::abi::virtio::feature::RING_INDIRECT_DESC != 0;
        let queue_depth = if indirect { queue.size() } else { queue.size() / table };
        if queue_depth == 0 {
            return Err(InitError::Queue(QUEUE));
        }
        let slots = RingMemory::new(frames, usize::from(queue.size()) * SLOT_BYTES)?;
        let mut accepted = BlockFeatures::empty();
        accepted.set(BlockFeatures::WRITE, features & F_RO == 0);
        accepted.set(BlockFeatures::FLUSH, features & F_FLUSH != 0);
        accepted.set(BlockFeatures::DISCARD, max_discard_sectors != 0);
        accepted.set(BlockFeatures::WRITE_ZEROES, max_write_zeroes_sectors != 0);
        transport.start();
        Ok(Self {
            link: Link::new(transport),
            requests: (0..queue.size()).map(|_| None).collect(),
            queue,
            slots,
            outstanding: 0,
            geometry: Geometry {
                sectors,
                block_size,
                max_request,
                queue_depth,
                features: accepted,
            },
            size_max,
            max_discard_sectors,
            max_write_zeroes_sectors,
            chain: Vec::with_capacity(usize::from(table)),
            state: State::Working,
        })
    }

    /// Counters of the request queue.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.queue.stats()
    }

    fn check(&self, op: &BlockOp) -> bool {
        let Geometry { sectors, block_size, max_request, features, .. } = self.geometry;
        let block_sectors = u64::from(block_size) / SECTOR_SIZE as u64;
        let inside = |sector: u64, count: u64| {
            sector.checked_add(count).is_some_and(|end| end <= sectors)
                && sector.is_multiple_of(block_sectors)
                && count.is_multiple_of(block_sectors)
                && count != 0
        };
        let data = |sector: u64, len: usize, buf: &DmaBuf| {
            len <= buf.len()
                && u32::try_from(len).is_ok_and(|len| len <= max_request)
                && len.is_multiple_of(SECTOR_SIZE)
                && inside(sector, (len / SECTOR_SIZE) as u64)
        };
        match op {
            BlockOp::Read { sector, len, buf } => data(*sector, *len, buf),
            BlockOp::Write { sector, len, buf } => {
                features.contains(BlockFeatures::WRITE) && data(*sector, *len, buf)
            }
            BlockOp::Flush => features.contains(BlockFeatures::FLUSH),
            BlockOp::Discard { sector, sectors } => {
                features.contains(BlockFeatures::DISCARD | BlockFeatures::WRITE)
                    && inside(*sector, *sectors)
                    && *sectors <= u64::from(self.max_discard_sectors)
            }
            BlockOp::WriteZeroes { sector, sectors } => {
                features.contains(BlockFeatures::WRITE_ZEROES | BlockFeatures::WRITE)
                    && inside(*sector, *sectors)
                    && *sectors <= u64::from(self.max_write_zeroes_sectors)
            }
        }
    }

    /// Fills slot and chain for the next head.
    fn build(&mut self, op: &BlockOp) {
        let slot = usize::from(self.queue.next_head()) * SLOT_BYTES;
        let address = Gpa(self.slots.guest_address().0 + slot as u64);
        let (kind, sector) = match op {
            BlockOp::Read { sector, .. } => (RequestType::IN, *sector),
            BlockOp::Write { sector, .. } => (RequestType::OUT, *sector),
            BlockOp::Flush => (RequestType::FLUSH, 0),
            BlockOp::Discard { .. } => (RequestType::DISCARD, 0),
            BlockOp::WriteZeroes { .. } => (RequestType::WRITE_ZEROES, 0),
        };
        self.set_words(slot, [kind.0, 0, low(sector), high(sector)]);
        self.set_words(slot + SLOT_STATUS, [NO_STATUS]);
        self.chain.clear();
        self.chain.push(Segment { address, len: 16, writable: false });
        match op {
            BlockOp::Read { len, buf, .. } => self.push_data(buf, *len, true),
            BlockOp::Write { len, buf, .. } => self.push_data(buf, *len, false),
            BlockOp::Flush => {}
            BlockOp::Discard { sector, sectors } | BlockOp::WriteZeroes { sector, sectors } => {
                // `check` bounded the count by a 32-bit limit. Flags 0: do not insist on unmapping.
                self.set_words(slot + SLOT_RANGE, [low(*sector), high(*sector), low(*sectors), 0]);
                let address = Gpa(address.0 + SLOT_RANGE as u64);
                self.chain.push(Segment { address, len: 16, writable: false });
            }
        }
        let status = Gpa(address.0 + SLOT_STATUS as u64);
        self.chain.push(Segment { address: status, len: 1, writable: true });
    }

    fn push_data(&mut self, buf: &DmaBuf, len: usize, writable: bool) {
        let mut address = buf.guest_address().0;
        let mut left = u32::try_from(len).unwrap_or(0); // `check` bounded it by `max_request`
        while left != 0 {
            let len = left.min(self.size_max);
            self.chain.push(Segment { address: Gpa(address), len, writable });
            address += u64::from(len);
            left -= len;
        }
    }

    fn set_words<const N: usize>(&self, byte: usize, words: [u32; N]) {
        for (slot, word) in self.slots.iter().skip(byte / 4).zip(words) {
            slot.store(word, Ordering::Relaxed);
        }
    }

    /// Gives the device up: no request will be completed by it any more.
    fn give_up(&mut self, error: PeerError) {
        self.state = match self.link.transport.reset() {
            Ok(()) => State::Reset,
            Err(_) => State::Stuck,
        };
        log::error!("virtio-blk: {error}; {} requests end as errors", self.outstanding);
    }

    /// Ends one outstanding request of a device that was given up.
    fn drain(&mut self) -> Option<Completion> {
        let request = self.requests.iter_mut().find_map(Option::take)?;
        self.outstanding -= 1;
        let mut buf = request.buf;
        if self.state == State::Stuck
            && let Some(buf) = buf.take()
        {
            log::error!("virtio-blk: {buf:?} is leaked, the device may still write it");
            buf.leak();
        }
        Some(Completion { id: request.id, status: BlockStatus::IoError, buf })
    }
}

impl BlockDevice for VirtioBlk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        if self.state != State::Working {
            return Err(SubmitError::Gone(op));
        }
        if !self.check(&op) {
            return Err(SubmitError::Invalid(op));
        }
        if self.outstanding >= usize::from(self.geometry.queue_depth) {
            return Err(SubmitError::Busy(op));
        }
        self.build(&op);
        let Ok(head) = self.queue.add(&self.chain) else {
            return Err(SubmitError::Busy(op));
        };
        let buf = match op {
            BlockOp::Read { buf, .. } | BlockOp::Write { buf, .. } => Some(buf),
            BlockOp::Flush | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => None,
        };
        if let Some(entry) = self.requests.get_mut(usize::from(head)) {
            *entry = Some(Request { id, buf });
            self.outstanding += 1;
        }
        Ok(())
    }

    fn kick(&mut self) {
        if self.state == State::Working && self.queue.publish() {
            self.link.transport.notify(QUEUE);
        }
    }

    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        if self.state != State::Working {
            return Ok(self.drain());
        }
        let used = match self.queue.pop() {
            Ok(Some(used)) => used,
            Ok(None) => {
                if self.link.take_config_changed() && self.link.failed() {
                    self.give_up(NEEDS_RESET);
                    return Err(NEEDS_RESET);
                }
                return Ok(None);
            }
            Err(error) => {
                let error = PeerError(error.message());
                self.give_up(error);
                return Err(error);
            }
        };
        let Some(request) = self.requests.get_mut(usize::from(used.head)).and_then(Option::take)
        else {
            return Ok(None); // The queue answers heads in flight only, and each has its request.
        };
        self.outstanding -= 1;
        let word = usize::from(used.head) * SLOT_BYTES + SLOT_STATUS;
        let status =
            self.slots.get(word / 4).map_or(NO_STATUS, |word| word.load(Ordering::Relaxed));
        #[expect(clippy::cast_possible_truncation, reason = "the status is one byte")]
        let status = match RequestStatus(status as u8) {
            RequestStatus::OK => BlockStatus::Ok,
            RequestStatus::UNSUPP => BlockStatus::Unsupported,
            _ => BlockStatus::IoError,
        };
        Ok(Some(Completion { id: request.id, status, buf: request.buf }))
    }

    fn arm(&mut self) -> bool {
        if self.state != State::Working {
            return self.outstanding != 0;
        }
        self.queue.arm() || (self.link.take_config_changed() && self.notice_failure())
    }
}

impl VirtioBlk {
    /// Gives the device up if it failed; whether there is something to drain then.
    fn notice_failure(&mut self) -> bool {
        if self.link.failed() {
            self.give_up(NEEDS_RESET);
            return self.outstanding != 0;
        }
        false
    }
}

impl Drop for VirtioBlk {
    fn drop(&mut self) {
        // The device must let go of rings and buffers before they are freed.
        if self.state == State::Working && self.link.transport.reset().is_err() {
            self.state = State::Stuck;
        }
        if self.state == State::Stuck {
            log::error!("virtio-blk: the device did not finish its reset; its memory is leaked");
            self.queue.memories_mut().for_each(RingMemory::leak);
            self.slots.leak();
            self.requests
                .iter_mut()
                .filter_map(Option::take)
                .filter_map(|request| request.buf)
                .for_each(DmaBuf::leak);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
const fn low(value: u64) -> u32 {
    value as u32
}
const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}
