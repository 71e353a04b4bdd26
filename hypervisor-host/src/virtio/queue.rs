//! A queue that a driver has set up, and the chains that come out of it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use janus_proto::addr::Gpa;
use janus_proto::grant::Access;
use janus_proto::virtqueue::{DeviceQueue, GuestWords, QueueError, Rings, Segment};

use super::memory::{self, GuestMemory, Pinned};

/// Chains answered at most before the driver is shown them.
const BATCH: u32 = 32;

/// A part of a queue, in memory that stays.
struct Part {
    start: Gpa,
    words: Pinned,
}

impl Part {
    fn new(memory: &dyn GuestMemory, start: Gpa, bytes: u64) -> Option<Self> {
        // The available ring need only be aligned to 2, and all is words here.
        let aligned = Gpa(start.0 & !3);
        let bytes = (start.0 - aligned.0 + bytes).next_multiple_of(4);
        Some(Self {
            start: aligned,
            words: memory.pin(aligned, usize::try_from(bytes).ok()?, Access::ReadWrite)?,
        })
    }

    fn word(&self, address: Gpa) -> Option<&AtomicU32> {
        let offset = address.0.checked_sub(self.start.0)?;
        self.words.deref().get(usize::try_from(offset / 4).ok()?)
    }
}

/// The parts of a queue, and the memory that its descriptors are about.
struct Memory {
    parts: [Part; 3],
    /// Bytes of the descriptor table.
    table: u64,
    guest: Arc<dyn GuestMemory>,
}

impl GuestWords for Memory {
    fn word(&self, address: Gpa) -> Option<&AtomicU32> {
        self.parts.iter().find_map(|part| part.word(address))
    }

    fn copy(&self, address: Gpa, words: &mut [u32]) -> Option<()> {
        let [table, ..] = &self.parts;
        let offset = address.0.checked_sub(table.start.0).filter(|offset| *offset < self.table);
        if let Some(first) = offset.and_then(|offset| usize::try_from(offset / 4).ok()) {
            let shared = table.words.get(first..first.checked_add(words.len())?)?;
            for (word, shared) in words.iter_mut().zip(shared) {
                *word = shared.load(std::sync::atomic::Ordering::Relaxed);
            }
            return Some(());
        }
        memory::read(&*self.guest, address, zerocopy::IntoBytes::as_mut_bytes(words))
    }
}

/// A queue in use.
pub struct Queue {
    half: DeviceQueue,
    memory: Memory,
    segments: Vec<Segment>,
    /// Pushed and not yet shown.
    hidden: u32,
    /// The driver wants to be interrupted.
    interrupt: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Queue").field(&self.half).finish()
    }
}

impl Queue {
    /// Takes up a queue of `size` entries; `features` are the negotiated ones.
    pub(super) fn new(
        guest: Arc<dyn GuestMemory>,
        size: u16,
        rings: Rings,
        features: u64,
    ) -> Result<Self, QueueError> {
        let half = DeviceQueue::new(size, rings, features)?;
        let entries = u64::from(size);
        let part = |start, bytes| Part::new(&*guest, start, bytes).ok_or(QueueError::Address);
        let table = 16 * entries;
        let parts = [
            part(rings.descriptors, table)?,
            part(rings.available, 6 + 2 * entries)?,
            part(rings.used, 6 + 8 * entries)?,
        ];
        let memory = Memory { parts, table, guest };
        // In fresh rings the driver notifies from the first chain on.
        Ok(Self { half, memory, segments: Vec::new(), hidden: 0, interrupt: false })
    }

    /// Takes the next chain. It must come back through [`Self::push`].
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let mut segments = std::mem::take(&mut self.segments);
        match self.half.pop(&self.memory, &mut segments)? {
            Some(head) => {
                let readable = segments.iter().take_while(|segment| !segment.writable).count();
                Ok(Some(Chain { head, segments, readable, guest: Arc::clone(&self.memory.guest) }))
            }
            None => {
                self.segments = segments;
                Ok(None)
            }
        }
    }

    /// Gives a chain back, of which `written` bytes were written.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn push(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        self.half.push(&self.memory, chain.head, written)?;
        self.segments = chain.segments;
        self.hidden += 1;
        if self.hidden >= BATCH { self.publish() } else { Ok(()) }
    }

    /// Shows the driver what was pushed, at the latest when the queue is left.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        self.hidden = 0;
        self.interrupt |= self.half.publish(&self.memory)?;
        Ok(())
    }

    /// Asks to be notified of the next chain; `true`: there is one already.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn arm(&mut self) -> Result<bool, QueueError> {
        self.half.arm(&self.memory)
    }

    /// Does something with every chain there is; it answers how many bytes it wrote.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn each(&mut self, mut each: impl FnMut(&mut Chain) -> u32) -> Result<(), QueueError> {
        loop {
            self.half.disarm(&self.memory)?;
            while let Some(mut chain) = self.pop()? {
                let written = each(&mut chain);
                self.push(chain, written)?;
            }
            self.publish()?;
            if !self.arm()? {
                return Ok(());
            }
        }
    }

    /// Whether to interrupt the driver, once.
    pub(super) fn take_interrupt(&mut self) -> bool {
        std::mem::take(&mut self.interrupt)
    }
}

/// Buffers of a driver: first those to read, then those to write. Offsets count through all buffers of a kind.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    guest: Arc<dyn GuestMemory>,
}

/// A part of a chain is not there, or is not memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBuffer;

impl Chain {
    fn half(&self, writable: bool) -> &[Segment] {
        let (readable, write) = self.segments.split_at(self.readable.min(self.segments.len()));
        if writable { write } else { readable }
    }

    /// Bytes to read.
    #[must_use]
    pub fn readable(&self) -> u32 {
        // The queue has checked that the sum fits.
        self.half(false).iter().map(|segment| segment.len).sum()
    }

    /// Bytes to write.
    #[must_use]
    pub fn writable(&self) -> u32 {
        self.half(true).iter().map(|segment| segment.len).sum()
    }

    /// Calls `with` for the parts of `len` bytes at `offset`, in order: their address, and where in the `len` bytes.
    fn parts(
        &self,
        writable: bool,
        offset: u32,
        len: usize,
        mut with: impl FnMut(Gpa, std::ops::Range<usize>) -> Option<()>,
    ) -> Result<(), BadBuffer> {
        let mut skip = u64::from(offset);
        let mut done = 0;
        for segment in self.half(writable) {
            if done == len {
                break;
            }
            let there = u64::from(segment.len);
            if skip >= there {
                skip -= there;
                continue;
            }
            let address = segment.address.0.checked_add(skip).ok_or(BadBuffer)?;
            let count = usize::try_from(there - skip).map_err(|_| BadBuffer)?.min(len - done);
            with(Gpa(address), done..done + count).ok_or(BadBuffer)?;
            (skip, done) = (0, done + count);
        }
        if done == len { Ok(()) } else { Err(BadBuffer) }
    }

    /// Holds `len` bytes at `offset` of the writable or the readable buffers, part by part.
    ///
    /// # Errors
    /// They are shorter, or not all of them are memory.
    pub fn pin(&self, access: Access, offset: u32, len: usize) -> Result<Vec<Pinned>, BadBuffer> {
        let mut pinned = Vec::new();
        self.parts(access == Access::ReadWrite, offset, len, |address, range| {
            pinned.push(self.guest.pin(address, range.len(), access)?);
            Some(())
        })?;
        Ok(pinned)
    }

    /// Gives the whole pages of a range back to the host; they read as zeroes from here on. How many; `None`: they
    /// are not the guest's to give, or the host cannot take them.
    pub fn discard(&self, address: Gpa, len: usize) -> Option<u64> {
        self.guest.discard(address, len)
    }

    /// As [`Self::discard`], for all the writable buffers.
    pub fn discard_writable(&self) -> Option<u64> {
        let discard = |segment: &Segment| self.discard(segment.address, segment.len as usize);
        Some(self.half(true).iter().filter_map(discard).sum())
    }

    /// Copies from the readable buffers.
    ///
    /// # Errors
    /// They are shorter, or not all of them are memory.
    pub fn read(&self, offset: u32, buf: &mut [u8]) -> Result<(), BadBuffer> {
        self.parts(false, offset, buf.len(), |address, range| {
            memory::read(&*self.guest, address, buf.get_mut(range)?)
        })
    }

    /// Copies to the writable buffers.
    ///
    /// # Errors
    /// They are shorter, or not all of them are memory; some may have been written.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), BadBuffer> {
        self.parts(true, offset, bytes.len(), |address, range| {
            memory::write(&*self.guest, address, bytes.get(range)?)
        })
    }

    /// Copies a structure from the readable buffers.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_object<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        offset: u32,
    ) -> Result<T, BadBuffer> {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes())?;
        Ok(value)
    }
}
