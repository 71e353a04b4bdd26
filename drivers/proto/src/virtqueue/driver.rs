//! The driver half of the split virtqueue: adds buffers, publishes them in batches, takes them back.

use alloc::boxed::Box;
use alloc::vec;

use super::{DESC_BYTES, DESC_WORDS, Layout, QueueError, Segment, SharedWords, need_event};
use crate::abi::virtio::{
    VIRTQ_AVAIL_F_NO_INTERRUPT, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY, feature,
};
use crate::addr::Gpa;
use crate::sync::{Ordering, fence};

/// What the driver knows of a descriptor; the device cannot reach it.
#[derive(Clone, Copy, Debug)]
struct Shadow {
    /// The next free descriptor, or the next of the chain.
    next: u16,
    /// Descriptors of the chain that starts here; 0: no chain in flight starts here.
    chain: u16,
    /// Position in the available ring of the chain that starts here.
    position: u16,
    /// Bytes that the device may write into the chain that starts here.
    room: u32,
}

/// A chain that the device has finished with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`DriverQueue::add`] answered.
    pub head: u16,
    /// Bytes written, at most the room of the chain.
    pub len: u32,
}

/// Memory for indirect tables: one for every descriptor of the ring, so that adding never allocates.
#[derive(Debug)]
pub struct IndirectMemory<M> {
    /// The tables, one behind the other.
    pub memory: M,
    /// Where the device finds them.
    pub address: Gpa,
    /// Descriptors in each.
    pub entries: u16,
}

impl<M> IndirectMemory<M> {
    /// Bytes needed for a queue of `size` entries with tables of `entries`.
    #[must_use]
    pub const fn bytes(size: u16, entries: u16) -> usize {
        size as usize * entries as usize * DESC_BYTES
    }
}

/// What a queue has done, for the shell and the bench.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Chains added.
    pub added: u64,
    /// Times that chains were published.
    pub published: u64,
    /// Times that the device had to be notified.
    pub kicks: u64,
    /// Chains taken back.
    pub used: u64,
}

/// The driver half. `M` is the memory of the rings ([`Layout::bytes`], zeroed).
#[derive(Debug)]
pub struct DriverQueue<M> {
    memory: M,
    layout: Layout,
    event_index: bool,
    indirect: Option<IndirectMemory<M>>,
    shadow: Box<[Shadow]>,
    /// Entries of the available ring as written, to write two at a time.
    entries: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// Chains added and not yet taken back, unpublished ones included.
    in_flight: u16,
    /// Next position of the available ring.
    available: u16,
    /// Position up to which the device knows it.
    published: u16,
    /// Next position of the used ring.
    used: u16,
    /// Position up to which it is known to be filled.
    used_seen: u16,
    /// `flags` of the available ring.
    flags: u16,
    broken: bool,
    stats: QueueStats,
}

impl<M: SharedWords> DriverQueue<M> {
    /// Makes a queue of `size` entries over zeroed memory; `features` are the negotiated ones.
    ///
    /// Indirect tables are used for every chain of two or more buffers that fits, if there are any and the
    /// feature was negotiated.
    ///
    /// # Errors
    /// [`QueueError::BadSize`].
    pub fn new(
        size: u16,
        memory: M,
        indirect: Option<IndirectMemory<M>>,
        features: u64,
    ) -> Result<Self, QueueError> {
        let layout = Layout::new(size).ok_or(QueueError::BadSize)?;
        if memory.len() * 4 < layout.bytes() {
            return Err(QueueError::BadSize);
        }
        let indirect = indirect.filter(|_| features & feature::RING_INDIRECT_DESC != 0);
        if indirect.as_ref().is_some_and(|tables| {
            tables.memory.len() * 4 < IndirectMemory::<M>::bytes(size, tables.entries)
        }) {
            return Err(QueueError::BadSize);
        }
        let mut shadow =
            vec![Shadow { next: 0, chain: 0, position: 0, room: 0 }; usize::from(size)]
                .into_boxed_slice();
        for (next, entry) in (1..).zip(shadow.iter_mut()) {
            entry.next = next;
        }
        Ok(Self {
            memory,
            layout,
            event_index: features & feature::RING_EVENT_IDX != 0,
            indirect,
            shadow,
            entries: vec![0; usize::from(size)].into_boxed_slice(),
            free_head: 0,
            free: size,
            in_flight: 0,
            available: 0,
            published: 0,
            used: 0,
            used_seen: 0,
            flags: 0,
            broken: false,
            stats: QueueStats::default(),
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.layout.size()
    }
    /// Where the parts lie.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }
    /// The memory of the rings.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.memory
    }
    /// The memory of the rings, and of the indirect tables if there are any.
    pub fn memories_mut(&mut self) -> impl Iterator<Item = &mut M> {
        core::iter::once(&mut self.memory)
            .chain(self.indirect.iter_mut().map(|tables| &mut tables.memory))
    }
    /// Descriptors free at the moment: at least so many single buffers can be added.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }
    /// The head that the next [`Self::add`] will answer, so that a caller can use tables by head.
    #[must_use]
    pub fn next_head(&self) -> u16 {
        self.free_head
    }
    /// Chains added and not yet taken back.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }
    /// Counters.
    #[must_use]
    pub fn stats(&self) -> QueueStats {
        self.stats
    }

    /// Puts a chain into the queue, to be published later; answers its head, which comes back in [`Used`].
    ///
    /// Buffers that the device reads stand before those it writes (virtio 1.2, 2.7.4.2).
    ///
    /// # Errors
    /// [`QueueError::Full`] (take used chains back first), [`QueueError::BadLength`],
    /// [`QueueError::Order`], [`QueueError::Overflow`], [`QueueError::Broken`].
    pub fn add(&mut self, chain: &[Segment]) -> Result<u16, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        let room = chain_room(chain)?;
        let head = self.free_head;
        let taken = match &self.indirect {
            Some(tables) if chain.len() > 1 && chain.len() <= usize::from(tables.entries) => {
                if self.free == 0 {
                    return Err(QueueError::Full);
                }
                self.add_indirect(head, chain);
                1
            }
            _ => {
                let count = u16::try_from(chain.len()).map_err(|_| QueueError::BadLength)?;
                if count > self.layout.size() {
                    return Err(QueueError::BadLength);
                }
                if count > self.free {
                    return Err(QueueError::Full);
                }
                self.add_direct(chain);
                count
            }
        };
        self.free -= taken;
        self.in_flight += 1;
        let position = self.available;
        if let Some(first) = self.shadow.get_mut(usize::from(head)) {
            first.chain = taken;
            first.position = position;
            first.room = room;
        }
        self.write_available(position, head);
        self.available = position.wrapping_add(1);
        self.stats.added += 1;
        Ok(head)
    }

    /// Shows the device everything added since the last call; `true`: it wants to be notified.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.available);
        if old == new || self.broken {
            return false;
        }
        // Release: the descriptors and ring entries are there before the index says so.
        self.store_available_head(new, Ordering::Release);
        self.published = new;
        self.stats.published += 1;
        // The index must be visible before we look whether the device sleeps: a store followed by a load
        // of something else, which only a full fence orders (virtio 1.2, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let used = self.layout.used() / 4;
        let kick = if self.event_index {
            let event =
                low(self.load(used + 1 + 2 * usize::from(self.layout.size()), Ordering::Relaxed));
            need_event(event, new, old)
        } else {
            low(self.load(used, Ordering::Relaxed)) & VIRTQ_USED_F_NO_NOTIFY == 0
        };
        self.stats.kicks += u64::from(kick);
        kick
    }

    /// Takes back one chain that the device has finished with.
    ///
    /// # Errors
    /// The device lied; the queue is broken from then on.
    pub fn pop(&mut self) -> Result<Option<Used>, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        if self.used == self.used_seen && !self.look()? {
            return Ok(None);
        }
        let slot = usize::from(self.used & (self.layout.size() - 1));
        let word = self.layout.used() / 4 + 1 + 2 * slot;
        // One copy each; only the copies are looked at from here on.
        let id = self.load(word, Ordering::Relaxed);
        let len = self.load(word + 1, Ordering::Relaxed);
        match self.release(id, len) {
            Ok(used) => {
                self.used = self.used.wrapping_add(1);
                self.stats.used += 1;
                Ok(Some(used))
            }
            Err(error) => {
                self.broken = true;
                Err(error)
            }
        }
    }

    /// Asks for an interrupt as soon as a further chain is used; `true`: one is already there, pop again.
    pub fn arm(&mut self) -> bool {
        self.arm_after(0)
    }

    /// Asks for an interrupt when `more` further chains than one are used, where the device can count
    /// (event index); `true`: so many are already there.
    pub fn arm_after(&mut self, more: u16) -> bool {
        if self.broken {
            return true;
        }
        let more = more.min(self.in_flight.saturating_sub(1));
        let event = self.used.wrapping_add(more);
        if self.event_index {
            let word = self.layout.available() / 4 + 1 + usize::from(self.layout.size()) / 2;
            self.store(word, u32::from(event), Ordering::Relaxed);
        } else {
            self.flags = 0;
            self.store_available_head(self.published, Ordering::Relaxed);
        }
        // The request must be visible before the used index is looked at, or both sides can miss each
        // other: we see no new entry, the device no request.
        fence(Ordering::SeqCst);
        let index = high(self.load(self.layout.used() / 4, Ordering::Acquire));
        let ready = index.wrapping_sub(self.used);
        ready > if self.event_index { more } else { 0 }
    }

    /// Asks for no interrupts until the next [`Self::arm`].
    ///
    /// With event index nothing needs to be done: an event position that was passed stays silent.
    pub fn disarm(&mut self) {
        if !self.event_index && self.flags == 0 {
            self.flags = VIRTQ_AVAIL_F_NO_INTERRUPT;
            self.store_available_head(self.published, Ordering::Relaxed);
        }
    }

    /// Reads the used index; `true` if there is something to take.
    fn look(&mut self) -> Result<bool, QueueError> {
        // Acquire: elements and the buffers' contents are read after the index.
        let index = high(self.load(self.layout.used() / 4, Ordering::Acquire));
        let ready = index.wrapping_sub(self.used);
        let unpublished = self.available.wrapping_sub(self.published);
        if ready > self.in_flight - unpublished {
            self.broken = true;
            return Err(QueueError::UsedIndex);
        }
        self.used_seen = index;
        Ok(ready != 0)
    }

    /// Checks a used element and returns its chain's descriptors to the free list.
    fn release(&mut self, id: u32, len: u32) -> Result<Used, QueueError> {
        let head = u16::try_from(id).map_err(|_| QueueError::UsedId)?;
        let first = *self.shadow.get(usize::from(head)).ok_or(QueueError::UsedId)?;
        let unpublished = self.available.wrapping_sub(self.published);
        if first.chain == 0 || first.position.wrapping_sub(self.published) < unpublished {
            return Err(QueueError::UsedId);
        }
        if len > first.room {
            return Err(QueueError::UsedLength);
        }
        let mut last = head;
        for _ in 1..first.chain {
            last = self.shadow.get(usize::from(last)).map_or(last, |entry| entry.next);
        }
        if let Some(entry) = self.shadow.get_mut(usize::from(last)) {
            entry.next = self.free_head;
        }
        if let Some(entry) = self.shadow.get_mut(usize::from(head)) {
            entry.chain = 0;
        }
        self.free_head = head;
        self.free += first.chain;
        self.in_flight -= 1;
        Ok(Used { head, len })
    }

    fn add_direct(&mut self, chain: &[Segment]) {
        let mut index = self.free_head;
        for (n, segment) in chain.iter().enumerate() {
            let next = self.shadow.get(usize::from(index)).map_or(0, |entry| entry.next);
            let more = n + 1 < chain.len();
            let words = desc_words(*segment, if more { Some(next) } else { None });
            write_desc(&self.memory, usize::from(index) * DESC_WORDS, words);
            index = next;
        }
        self.free_head = index;
    }

    fn add_indirect(&mut self, head: u16, chain: &[Segment]) {
        let Some(tables) = &self.indirect else { return };
        let first = usize::from(head) * usize::from(tables.entries);
        for (n, (next, segment)) in (1..).zip(chain).enumerate() {
            let more = n + 1 < chain.len();
            let words = desc_words(*segment, if more { Some(next) } else { None });
            write_desc(&tables.memory, (first + n) * DESC_WORDS, words);
        }
        let table = tables.address.0 + (first * DESC_BYTES) as u64;
        #[expect(clippy::cast_possible_truncation, reason = "at most `entries`, a u16, times 16")]
        let len = (chain.len() * DESC_BYTES) as u32;
        let words = [word_low(table), word_high(table), len, u32::from(VIRTQ_DESC_F_INDIRECT)];
        write_desc(&self.memory, usize::from(head) * DESC_WORDS, words);
        self.free_head = self.shadow.get(usize::from(head)).map_or(0, |entry| entry.next);
    }

    /// Writes the entry at `position`, together with its neighbour in the same word.
    fn write_available(&mut self, position: u16, head: u16) {
        let slot = usize::from(position & (self.layout.size() - 1));
        if let Some(entry) = self.entries.get_mut(slot) {
            *entry = head;
        }
        let pair = slot & !1;
        let [first, second] = [pair, pair + 1].map(|n| self.entries.get(n).copied().unwrap_or(0));
        let word = u32::from(first) | u32::from(second) << 16;
        self.store(self.layout.available() / 4 + 1 + slot / 2, word, Ordering::Relaxed);
    }

    fn store_available_head(&self, index: u16, order: Ordering) {
        let word = u32::from(self.flags) | u32::from(index) << 16;
        self.store(self.layout.available() / 4, word, order);
    }

    // `new` has checked that the memory holds the whole layout, so `get` never fails below.
    fn load(&self, word: usize, order: Ordering) -> u32 {
        self.memory.get(word).map_or(0, |atomic| atomic.load(order))
    }
    fn store(&self, word: usize, value: u32, order: Ordering) {
        if let Some(atomic) = self.memory.get(word) {
            atomic.store(value, order);
        }
    }
}

/// Checks the order of a chain and sums up what the device may write.
fn chain_room(chain: &[Segment]) -> Result<u32, QueueError> {
    if chain.is_empty() {
        return Err(QueueError::BadLength);
    }
    let mut room = 0u32;
    let mut writable = false;
    for segment in chain {
        if segment.writable {
            writable = true;
            room = room.checked_add(segment.len).ok_or(QueueError::Overflow)?;
        } else if writable {
            return Err(QueueError::Order);
        }
    }
    Ok(room)
}

fn desc_words(segment: Segment, next: Option<u16>) -> [u32; DESC_WORDS] {
    let write = if segment.writable { VIRTQ_DESC_F_WRITE } else { 0 };
    let flags = write | if next.is_some() { VIRTQ_DESC_F_NEXT } else { 0 };
    [
        word_low(segment.address.0),
        word_high(segment.address.0),
        segment.len,
        u32::from(flags) | u32::from(next.unwrap_or(0)) << 16,
    ]
}

fn write_desc<M: SharedWords>(memory: &M, first: usize, words: [u32; DESC_WORDS]) {
    if let Some(slots) = memory.get(first..first + DESC_WORDS) {
        for (slot, word) in slots.iter().zip(words) {
            // Relaxed: `publish` releases them all at once.
            slot.store(word, Ordering::Relaxed);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
const fn low(word: u32) -> u16 {
    word as u16
}
const fn high(word: u32) -> u16 {
    (word >> 16) as u16
}
#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
const fn word_low(value: u64) -> u32 {
    value as u32
}
const fn word_high(value: u64) -> u32 {
    (value >> 32) as u32
}
