//! Disks for tasks: futures over a [`BlockDevice`].
//!
//! One task per disk feeds the device, takes its completions, and sleeps until the device's event
//! ([`Block::interrupt`]). Any number of requests may wait; as many as the device takes are in flight.
//! A request whose future is dropped runs on, and its buffer comes back to the pool when the device has done with it.
//!
//! [`Reader`] keeps several requests ahead of a sequential reader, [`cache::Cached`] serves small reads from large chunks.

pub mod cache;
mod queue;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of the test's own")]
mod tests;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Context, Poll};

use janus_front::class::{BlockDevice, BlockFeatures, BlockOp, BlockStatus, Geometry, SECTOR_SIZE};
use janus_front::dma::{DmaBuf, FrameSource};

use crate::dma_pool::{DmaPool, PooledBuf};
use crate::sync::{Notify, PlatformRelax};
use crate::task;
use queue::Queue;

/// Unused pages that a disk keeps for its next requests.
const POOL_PAGES: usize = 4096;

/// Why a disk did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// The medium failed.
    Io,
    /// The device does not know this operation.
    Unsupported,
    /// The range is not on the disk.
    OutOfRange,
    /// Offset or length is not a multiple of the disk's block size.
    Misaligned,
    /// One buffer was asked to hold more than [`Geometry::max_request`].
    TooLong,
    /// The disk accepts no writes.
    ReadOnly,
    /// No memory for a buffer.
    NoMemory,
    /// The disk was detached.
    Gone,
    /// The other side broke the protocol: the rule.
    Peer(&'static str),
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O error",
            Self::Unsupported => "the disk does not know this operation",
            Self::OutOfRange => "outside the disk",
            Self::Misaligned => "not a multiple of the disk's block size",
            Self::TooLong => "longer than the disk's longest request",
            Self::ReadOnly => "the disk is read-only",
            Self::NoMemory => "no memory for a buffer",
            Self::Gone => "the disk has been detached",
            Self::Peer(rule) => {
                return write!(f, "the disk's other side broke the protocol: {rule}");
            }
        })
    }
}

impl core::error::Error for BlockError {}

/// Counts of a disk, since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounters {
    /// Requests given to the device.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Events (interrupts) of the device.
    pub events: u64,
    /// Kicks: each made any number of requests visible.
    pub kicks: u64,
    /// Times a request had to wait for room in the device's queue.
    pub queue_full: u64,
}

/// A disk.
pub struct Block {
    name: String,
    geometry: Geometry,
    pool: Arc<DmaPool>,
    queue: spin::mutex::SpinMutex<Queue, PlatformRelax>,
    /// There is work for the disk's task: an event, a request, the end.
    work: Notify,
    events: AtomicU64,
    /// Starts and ends of requests that change the contents.
    changes: AtomicU64,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({})", self.name)
    }
}

impl Block {
    /// Takes a connected device over and starts the task that serves it.
    pub fn start(
        name: String,
        device: Box<dyn BlockDevice>,
        frames: &'static dyn FrameSource,
    ) -> Arc<Self> {
        let block = Arc::new(Self {
            name,
            geometry: device.geometry(),
            pool: DmaPool::new(frames, POOL_PAGES),
            queue: spin::mutex::SpinMutex::new(Queue::new(device)),
            work: Notify::new(),
            events: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        });
        drop(task::spawn("block", Arc::clone(&block).serve()));
        block
    }

    /// To be called on the device's interrupt or event, from interrupt context.
    pub fn interrupt(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
        self.work.notify();
    }

    /// The device is going away: every request that is waiting fails with [`BlockError::Gone`], and so do later
    /// ones. The driver is dropped, with the buffers that are in flight in it.
    pub fn detach(&self) {
        let device = self.queue.lock().detach(BlockError::Gone);
        self.work.notify();
        drop(device);
    }

    /// Whether requests can succeed: not detached, protocol not broken.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.queue.lock().failure().is_none()
    }

    async fn serve(self: Arc<Self>) {
        loop {
            self.work.notified().await;
            loop {
                let more = {
                    let mut queue = self.queue.lock();
                    queue.advance(&self.name, &self.pool);
                    if queue.is_detached() {
                        return;
                    }
                    queue.arm()
                };
                if !more {
                    break;
                }
                task::yield_now().await;
            }
        }
    }

    /// The name it was registered under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The fixed facts.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
    /// Capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.geometry.sectors.saturating_mul(SECTOR_SIZE as u64)
    }
    /// The counts.
    #[must_use]
    pub fn counters(&self) -> BlockCounters {
        let events = self.events.load(Ordering::Relaxed);
        BlockCounters { events, ..self.queue.lock().counters }
    }
    /// Requests that the device has now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.queue.lock().in_flight()
    }
    /// A number that differs once the contents have been changed through this disk: what was read before may be out of
    /// date then.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
    /// A buffer for [`Self::write`], with any contents.
    ///
    /// # Errors
    /// [`BlockError::NoMemory`].
    pub fn buffer(&self, len: usize) -> Result<PooledBuf, BlockError> {
        PooledBuf::new(&self.pool, len).ok_or(BlockError::NoMemory)
    }

    fn block_size(&self) -> u64 {
        u64::from(self.geometry.block_size).max(SECTOR_SIZE as u64)
    }

    /// The longest request, in bytes: a multiple of the block size, at least one block.
    #[must_use]
    pub fn max_request(&self) -> usize {
        let block = usize::try_from(self.block_size()).unwrap_or(SECTOR_SIZE);
        let max = usize::try_from(self.geometry.max_request).unwrap_or(usize::MAX);
        (max / block * block).max(block)
    }

    /// Checks a range and answers its first sector.
    fn check(&self, offset: u64, len: u64) -> Result<u64, BlockError> {
        let end = offset.checked_add(len).ok_or(BlockError::OutOfRange)?;
        if end > self.capacity() {
            return Err(BlockError::OutOfRange);
        }
        if !offset.is_multiple_of(self.block_size()) || !len.is_multiple_of(self.block_size()) {
            return Err(BlockError::Misaligned);
        }
        Ok(offset / SECTOR_SIZE as u64)
    }

    fn require(&self, feature: BlockFeatures, error: BlockError) -> Result<(), BlockError> {
        if self.geometry.features.contains(feature) { Ok(()) } else { Err(error) }
    }

    /// Queues a request at once; the future waits for its end.
    fn submit(&self, op: BlockOp) -> Request<'_> {
        let id = self.queue.lock().submit(op);
        self.work.notify();
        Request { block: self, id: Some(id) }
    }

    /// Starts a read of one buffer, at once; await it any time later. Offset and length count bytes and are
    /// multiples of the block size; the length is at most [`Self::max_request`].
    ///
    /// # Errors
    /// What is wrong with the range, or [`BlockError::NoMemory`]; the rest comes from the future.
    pub fn start_read(&self, offset: u64, len: usize) -> Result<ReadRequest<'_>, BlockError> {
        let sector = self.check(offset, len as u64)?;
        if len > self.max_request() {
            return Err(BlockError::TooLong);
        }
        let buf = self.pool.take(len).ok_or(BlockError::NoMemory)?;
        Ok(ReadRequest { request: self.submit(BlockOp::Read { sector, len, buf }), len })
    }

    /// Reads one buffer: see [`Self::start_read`].
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn read(&self, offset: u64, len: usize) -> Result<PooledBuf, BlockError> {
        self.start_read(offset, len)?.await
    }

    /// Reads any range of bytes, in as many requests as it takes, several at a time.
    ///
    /// # Errors
    /// [`BlockError`]; `target` may then be partly filled.
    pub async fn read_into(&self, offset: u64, target: &mut [u8]) -> Result<(), BlockError> {
        let end = offset.checked_add(target.len() as u64).ok_or(BlockError::OutOfRange)?;
        let mut reader = Reader::new(self, offset, end, self.max_request(), READ_AHEAD)?;
        let mut rest = target;
        while let Some(piece) = reader.next().await {
            let piece = piece?;
            let Some((head, tail)) = rest.split_at_mut_checked(piece.len()) else { break };
            head.copy_from_slice(&piece);
            rest = tail;
        }
        Ok(())
    }

    /// Writes one buffer, whose length is a multiple of the block size and at most [`Self::max_request`].
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn write(&self, offset: u64, data: PooledBuf) -> Result<(), BlockError> {
        let _change = Change::new(self);
        self.require(BlockFeatures::WRITE, BlockError::ReadOnly)?;
        let len = data.len();
        let sector = self.check(offset, len as u64)?;
        if len > self.max_request() {
            return Err(BlockError::TooLong);
        }
        let buf = data.into_dma().ok_or(BlockError::NoMemory)?;
        if let Some(buf) = self.submit(BlockOp::Write { sector, len, buf }).await? {
            self.pool.put(buf);
        }
        Ok(())
    }

    /// Writes any length that is a multiple of the block size, in as many requests as it takes.
    ///
    /// # Errors
    /// [`BlockError`]; a part may have been written then.
    pub async fn write_from(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let _change = Change::new(self);
        self.require(BlockFeatures::WRITE, BlockError::ReadOnly)?;
        self.check(offset, data.len() as u64)?;
        let mut at = offset;
        let mut in_flight = VecDeque::new();
        for piece in data.chunks(self.max_request()) {
            let mut buf = self.buffer(piece.len())?;
            buf.copy_from_slice(piece);
            let sector = self.check(at, piece.len() as u64)?;
            let buf = buf.into_dma().ok_or(BlockError::NoMemory)?;
            in_flight.push_back(self.submit(BlockOp::Write { sector, len: piece.len(), buf }));
            at += piece.len() as u64;
            if in_flight.len() >= READ_AHEAD
                && let Some(oldest) = in_flight.pop_front()
                && let Some(buf) = oldest.await?
            {
                self.pool.put(buf);
            }
        }
        for request in in_flight {
            if let Some(buf) = request.await? {
                self.pool.put(buf);
            }
        }
        Ok(())
    }

    /// Makes completed writes stable. Does nothing where every completed write is.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn flush(&self) -> Result<(), BlockError> {
        // A disk that nobody writes has nothing to make stable, and Linux's backend calls it an error.
        if self.geometry.features.contains(BlockFeatures::WRITE | BlockFeatures::FLUSH) {
            self.submit(BlockOp::Flush).await?;
        }
        Ok(())
    }

    /// Gives back the contents of a range, which may read as anything afterwards.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.require(BlockFeatures::DISCARD, BlockError::Unsupported)?;
        let sector = self.check(offset, len)?;
        let _change = Change::new(self);
        self.submit(BlockOp::Discard { sector, sectors: len / SECTOR_SIZE as u64 }).await?;
        Ok(())
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// [`BlockError`].
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.require(BlockFeatures::WRITE_ZEROES, BlockError::Unsupported)?;
        let sector = self.check(offset, len)?;
        let _change = Change::new(self);
        self.submit(BlockOp::WriteZeroes { sector, sectors: len / SECTOR_SIZE as u64 }).await?;
        Ok(())
    }
}

/// Requests that sequential transfers keep under way.
const READ_AHEAD: usize = 8;

/// A change of a disk's contents under way: counted when it starts, and when it ends.
struct Change<'a>(&'a AtomicU64);

impl<'a> Change<'a> {
    fn new(block: &'a Block) -> Self {
        block.changes.fetch_add(1, Ordering::Relaxed);
        Self(&block.changes)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request that was queued: ends with the device's answer and the buffer.
struct Request<'a> {
    block: &'a Block,
    /// `None` once it has ended.
    id: Option<u64>,
}

impl Future for Request<'_> {
    type Output = Result<Option<DmaBuf>, BlockError>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(id) = self.id else { return Poll::Ready(Err(BlockError::Gone)) };
        let result = self.block.queue.lock().poll(id, cx.waker());
        if result.is_ready() {
            self.id = None;
        }
        result
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let left = self.block.queue.lock().abandon(id);
            if let Some(buf) = left {
                self.block.pool.put(buf);
            }
        }
    }
}

/// A read under way: see [`Block::start_read`].
pub struct ReadRequest<'a> {
    request: Request<'a>,
    len: usize,
}

impl fmt::Debug for ReadRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadRequest({} bytes)", self.len)
    }
}

impl Future for ReadRequest<'_> {
    type Output = Result<PooledBuf, BlockError>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let len = self.len;
        let pool = &self.request.block.pool;
        let pool = Arc::clone(pool);
        Pin::new(&mut self.request).poll(cx).map(|result| {
            // No buffer: the peer kept it, which the driver has reported.
            let buf = result?.ok_or(BlockError::Io)?;
            Ok(PooledBuf::from_dma(&pool, buf, len))
        })
    }
}

/// Reads a range in order, with several requests ahead of the reader.
#[derive(Debug)]
pub struct Reader<'a> {
    block: &'a Block,
    /// Where the next request starts, aligned.
    next: u64,
    /// Where the last request ends, aligned.
    end: u64,
    /// Bytes to leave out at the start of the first piece, and where the wanted range ends.
    skip: usize,
    wanted_end: u64,
    chunk: usize,
    depth: usize,
    in_flight: VecDeque<(u64, ReadRequest<'a>)>,
}

impl<'a> Reader<'a> {
    /// A reader of the bytes from `start` to `end`, `chunk` bytes a request (cut to what the disk can),
    /// `depth` requests ahead.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`].
    pub fn new(
        block: &'a Block,
        start: u64,
        end: u64,
        chunk: usize,
        depth: usize,
    ) -> Result<Self, BlockError> {
        if start > end || end > block.capacity() {
            return Err(BlockError::OutOfRange);
        }
        let size = block.block_size();
        let next = start / size * size;
        let skip = usize::try_from(start - next).unwrap_or(0);
        let unit = usize::try_from(size).unwrap_or(SECTOR_SIZE);
        let chunk = (chunk.min(block.max_request()) / unit * unit).max(unit);
        let aligned_end = end.next_multiple_of(size).min(block.capacity());
        let aligned_end = if start == end { next } else { aligned_end };
        Ok(Self {
            block,
            next,
            end: aligned_end,
            skip,
            wanted_end: end,
            chunk,
            depth: depth.max(1),
            in_flight: VecDeque::with_capacity(depth.max(1)),
        })
    }

    fn fill(&mut self) -> Result<(), BlockError> {
        while self.in_flight.len() < self.depth && self.next < self.end {
            let left = usize::try_from(self.end - self.next).unwrap_or(usize::MAX);
            let len = self.chunk.min(left);
            match self.block.start_read(self.next, len) {
                Ok(request) => self.in_flight.push_back((self.next, request)),
                // Short of memory: fewer requests ahead will do.
                Err(BlockError::NoMemory) if !self.in_flight.is_empty() => break,
                Err(error) => return Err(error),
            }
            self.next += len as u64;
        }
        Ok(())
    }

    /// The next piece; `None` at the end. After an error the reader is at its end.
    pub async fn next(&mut self) -> Option<Result<ReadPiece, BlockError>> {
        if let Err(error) = self.fill() {
            self.stop();
            return Some(Err(error));
        }
        let (at, request) = self.in_flight.pop_front()?;
        match request.await {
            Ok(buf) => {
                let skip = core::mem::take(&mut self.skip);
                let wanted = usize::try_from(self.wanted_end - at).unwrap_or(usize::MAX);
                let end = buf.len().min(wanted);
                // The next request goes out before the caller works on this piece.
                if let Err(error) = self.fill() {
                    self.stop();
                    return Some(Err(error));
                }
                Some(Ok(ReadPiece { buf, start: skip.min(end), end }))
            }
            Err(error) => {
                self.stop();
                Some(Err(error))
            }
        }
    }

    fn stop(&mut self) {
        self.in_flight.clear();
        self.next = self.end;
    }
}

/// A piece of what a [`Reader`] reads.
#[derive(Debug)]
pub struct ReadPiece {
    buf: PooledBuf,
    start: usize,
    end: usize,
}

impl core::ops::Deref for ReadPiece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buf.get(self.start..self.end).unwrap_or_default()
    }
}

/// How a device's status reads here.
fn outcome(status: BlockStatus) -> Result<(), BlockError> {
    match status {
        BlockStatus::Ok => Ok(()),
        BlockStatus::IoError => Err(BlockError::Io),
        BlockStatus::Unsupported => Err(BlockError::Unsupported),
    }
}
