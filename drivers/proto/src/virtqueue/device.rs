//! The device half of the split virtqueue: takes chains from a driver that is not trusted, gives them back.

use alloc::vec::Vec;

use super::{DESC_BYTES, DESC_WORDS, Layout, QueueError, need_event};
use crate::abi::virtio::{
    VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY, feature,
};
use crate::addr::Gpa;
use crate::sync::{AtomicU32, Ordering, fence};

/// Bytes in a descriptor, as lengths on the wire are.
const DESC_LEN: u32 = 16;

/// A guest's memory, as the host sees it: any word may change at any time.
pub trait GuestWords {
    /// The aligned word at `address` (a multiple of 4), which is in one of the rings; `None` outside memory.
    fn word(&self, address: Gpa) -> Option<&AtomicU32>;
    /// Copies words, each once, from `address` (a multiple of 4) on; `None`: not all of them are in memory.
    ///
    /// Descriptors are read through it. Indirect tables may lie anywhere, so that a host that has to do something to
    /// reach a page does it once for several.
    fn copy(&self, address: Gpa, words: &mut [u32]) -> Option<()> {
        for (offset, word) in (0u64..).step_by(4).zip(words) {
            let address = address.0.checked_add(offset)?;
            *word = self.word(Gpa(address))?.load(Ordering::Relaxed);
        }
        Some(())
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: Gpa,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it (otherwise it reads it).
    pub writable: bool,
}

/// Where the driver has put the three parts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Descriptor table, 16-byte aligned.
    pub descriptors: Gpa,
    /// Available ring, 2-byte aligned.
    pub available: Gpa,
    /// Used ring, 4-byte aligned.
    pub used: Gpa,
}

impl Rings {
    /// The parts of a queue whose memory of `layout` starts at `start`.
    #[must_use]
    pub const fn of(layout: Layout, start: Gpa) -> Self {
        Self {
            descriptors: start,
            available: Gpa(start.0 + layout.available() as u64),
            used: Gpa(start.0 + layout.used() as u64),
        }
    }
}

/// The device half.
#[derive(Debug)]
pub struct DeviceQueue {
    rings: Rings,
    size: u16,
    event_index: bool,
    indirect: bool,
    /// Next position of the available ring.
    available: u16,
    /// Position up to which it is known to be filled.
    available_seen: u16,
    /// Next position of the used ring.
    used: u16,
    /// Position up to which the driver knows it.
    published: u16,
    flags: u16,
    broken: bool,
}

impl DeviceQueue {
    /// Takes up a queue of `size` entries; `features` are the negotiated ones.
    ///
    /// # Errors
    /// [`QueueError::BadSize`]; [`QueueError::Address`] if a part is misaligned or wraps around.
    pub fn new(size: u16, rings: Rings, features: u64) -> Result<Self, QueueError> {
        Layout::new(size).ok_or(QueueError::BadSize)?;
        let aligned = rings.descriptors.0.is_multiple_of(16)
            && rings.available.0.is_multiple_of(2)
            && rings.used.0.is_multiple_of(4);
        let far = 1 << 20; // more than the longest ring
        let wraps = [rings.descriptors, rings.available, rings.used]
            .iter()
            .any(|part| part.0.checked_add(far).is_none());
        if !aligned || wraps {
            return Err(QueueError::Address);
        }
        Ok(Self {
            rings,
            size,
            event_index: features & feature::RING_EVENT_IDX != 0,
            indirect: features & feature::RING_INDIRECT_DESC != 0,
            available: 0,
            available_seen: 0,
            used: 0,
            published: 0,
            flags: 0,
            broken: false,
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Takes the next chain: its head is answered, its buffers replace the contents of `chain`.
    ///
    /// # Errors
    /// The driver broke the protocol; the queue is broken from then on.
    pub fn pop(
        &mut self,
        memory: &impl GuestWords,
        chain: &mut Vec<Segment>,
    ) -> Result<Option<u16>, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        self.try_pop(memory, chain).inspect_err(|_| self.broken = true)
    }

    fn try_pop(
        &mut self,
        memory: &impl GuestWords,
        chain: &mut Vec<Segment>,
    ) -> Result<Option<u16>, QueueError> {
        if self.available == self.available_seen {
            self.available_seen = self.available_index(memory)?;
            if self.available == self.available_seen {
                return Ok(None);
            }
        }
        let slot = u64::from(self.available & (self.size - 1));
        let head = read16(memory, Gpa(self.rings.available.0 + 4 + 2 * slot), Ordering::Relaxed)?;
        self.walk(memory, head, chain)?;
        self.available = self.available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Puts a chain into the used ring, to be published later, with the number of bytes written.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn push(
        &mut self,
        memory: &impl GuestWords,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        let slot = u64::from(self.used & (self.size - 1));
        let element = self.rings.used.0 + 4 + 8 * slot;
        write32(memory, Gpa(element), u32::from(head), Ordering::Relaxed)?;
        write32(memory, Gpa(element + 4), len, Ordering::Relaxed)?;
        self.used = self.used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver everything pushed since the last call; `true`: it wants an interrupt.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn publish(&mut self, memory: &impl GuestWords) -> Result<bool, QueueError> {
        let (old, new) = (self.published, self.used);
        if old == new {
            return Ok(false);
        }
        // Release: elements and buffers are written before the index says so.
        self.store_used_head(memory, Ordering::Release)?;
        self.published = new;
        // As on the driver's side: first the index, then the look whether anybody waits for it.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = Gpa(self.rings.available.0 + 4 + 2 * u64::from(self.size));
            Ok(need_event(read16(memory, event, Ordering::Relaxed)?, new, old))
        } else {
            let flags = read16(memory, self.rings.available, Ordering::Relaxed)?;
            Ok(flags & VIRTQ_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks for a notification of the next chain; `true`: one is already there, pop again.
    ///
    /// # Errors
    /// [`QueueError::Address`], [`QueueError::AvailableIndex`].
    pub fn arm(&mut self, memory: &impl GuestWords) -> Result<bool, QueueError> {
        if self.event_index {
            let event = Gpa(self.rings.used.0 + 4 + 8 * u64::from(self.size));
            write32(memory, event, u32::from(self.available), Ordering::Relaxed)?;
        } else {
            self.flags = 0;
            self.store_used_head(memory, Ordering::Relaxed)?;
        }
        // The request must be visible before the available index is looked at.
        fence(Ordering::SeqCst);
        Ok(self.available_index(memory)? != self.available)
    }

    /// Asks for no notifications until the next [`Self::arm`]; with event index nothing needs to be done.
    ///
    /// # Errors
    /// [`QueueError::Address`].
    pub fn disarm(&mut self, memory: &impl GuestWords) -> Result<(), QueueError> {
        if self.event_index {
            return Ok(());
        }
        self.flags = VIRTQ_USED_F_NO_NOTIFY;
        self.store_used_head(memory, Ordering::Relaxed)
    }

    fn store_used_head(&self, memory: &impl GuestWords, order: Ordering) -> Result<(), QueueError> {
        write32(memory, self.rings.used, u32::from(self.flags) | u32::from(self.used) << 16, order)
    }

    fn available_index(&self, memory: &impl GuestWords) -> Result<u16, QueueError> {
        let index = read16(memory, Gpa(self.rings.available.0 + 2), Ordering::Acquire)?;
        if index.wrapping_sub(self.available) > self.size {
            return Err(QueueError::AvailableIndex);
        }
        Ok(index)
    }

    /// Follows a chain from `head`; every descriptor is copied once, and only the copy is looked at.
    fn walk(
        &self,
        memory: &impl GuestWords,
        head: u16,
        chain: &mut Vec<Segment>,
    ) -> Result<(), QueueError> {
        chain.clear();
        let mut table = self.rings.descriptors;
        let mut entries = u32::from(self.size);
        let mut inside = false;
        let mut index = head;
        let mut steps = 0u32;
        let mut bytes = 0u32;
        let mut ahead =
            ReadAhead { words: [0; READ_AHEAD as usize * DESC_WORDS], first: 0, count: 0 };
        loop {
            if u32::from(index) >= entries {
                return Err(QueueError::DescriptorIndex);
            }
            if steps == entries {
                return Err(QueueError::DescriptorLoop);
            }
            steps += 1;
            // Chains in the queue's own table jump about; those in a table of their own rarely do.
            let most = if inside { entries } else { u32::from(index) + 1 };
            let desc = ahead.read(memory, table, index, most)?;
            if desc.flags & VIRTQ_DESC_F_INDIRECT != 0 {
                let whole = desc.len != 0 && desc.len.is_multiple_of(DESC_LEN);
                let ends = desc.flags & VIRTQ_DESC_F_NEXT == 0;
                if !self.indirect || inside || !whole || !ends || !desc.address.0.is_multiple_of(4)
                {
                    return Err(QueueError::Indirect);
                }
                // No longer than the largest queue, so that no table makes us walk for minutes.
                (table, entries) = (desc.address, (desc.len / DESC_LEN).min(1 << 15));
                (inside, index, steps) = (true, 0, 0);
                ahead.count = 0;
                continue;
            }
            let writable = desc.flags & VIRTQ_DESC_F_WRITE != 0;
            if !writable && chain.last().is_some_and(|last| last.writable) {
                return Err(QueueError::Order);
            }
            bytes = bytes.checked_add(desc.len).ok_or(QueueError::Overflow)?;
            chain.push(Segment { address: desc.address, len: desc.len, writable });
            if desc.flags & VIRTQ_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }
}

struct Desc {
    address: Gpa,
    len: u32,
    flags: u16,
    next: u16,
}

/// Descriptors of an indirect table that are read at once.
const READ_AHEAD: u32 = 8;

/// Descriptors that were copied and not looked at yet.
struct ReadAhead {
    words: [u32; READ_AHEAD as usize * DESC_WORDS],
    first: u32,
    count: u32,
}

impl ReadAhead {
    /// The descriptor at `index` of a table, which ends before `end`. Its copy is looked at once: a chain that comes
    /// back to it, which no honest one does, may see another.
    fn read(
        &mut self,
        memory: &impl GuestWords,
        table: Gpa,
        index: u16,
        end: u32,
    ) -> Result<Desc, QueueError> {
        let index = u32::from(index);
        if !(self.first..self.first + self.count).contains(&index) {
            let at = table.0.checked_add(u64::from(index) * DESC_BYTES as u64);
            let count = end.saturating_sub(index).min(READ_AHEAD);
            let words = self.words.get_mut(..count as usize * DESC_WORDS).unwrap_or_default();
            at.and_then(|at| memory.copy(Gpa(at), words)).ok_or(QueueError::Address)?;
            (self.first, self.count) = (index, count);
        }
        let at = (index - self.first) as usize * DESC_WORDS;
        let words = self.words.get(at..at + DESC_WORDS).and_then(|words| words.first_chunk());
        let [low, high, len, last] = *words.ok_or(QueueError::Address)?;
        Ok(Desc {
            address: Gpa(u64::from(low) | u64::from(high) << 32),
            len,
            flags: half(last, 0),
            next: half(last, 1),
        })
    }
}

/// Reads the 16-bit field at `address` out of the word that holds it.
fn read16(memory: &impl GuestWords, address: Gpa, order: Ordering) -> Result<u16, QueueError> {
    let word = memory.word(Gpa(address.0 & !3)).ok_or(QueueError::Address)?.load(order);
    Ok(half(word, (address.0 >> 1) & 1))
}

fn write32(
    memory: &impl GuestWords,
    address: Gpa,
    value: u32,
    order: Ordering,
) -> Result<(), QueueError> {
    memory.word(address).ok_or(QueueError::Address)?.store(value, order);
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "one half of the word is meant")]
const fn half(word: u32, which: u64) -> u16 {
    (word >> (16 * which)) as u16
}
