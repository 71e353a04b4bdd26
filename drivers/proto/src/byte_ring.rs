//! Pages with two byte streams, one each way: the console (`xen/include/public/io/console.h`) and
//! xenstore (`xs_wire.h`), both ends.
//!
//! Indices run freely and wrap at 2^32; the place is the index modulo the stream's size. Each end
//! keeps its own two indices and only writes them to the page; those of the other end are read once
//! and checked. The protocol has no event index: notify the other end after every change.

use core::fmt;
use core::ops::Deref;

use crate::abi::xen_io::{console, xs_wire};
use crate::sync::{AtomicU32, Ordering, fence};

/// What can go wrong with a byte stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteRingError {
    /// The memory does not hold the page's layout.
    TooSmall,
    /// An index is further away than the stream is long.
    Index,
}

impl ByteRingError {
    /// A short text, for errors that carry one.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::TooSmall => "the memory is smaller than the page's layout",
            Self::Index => "an index of the byte stream is out of range",
        }
    }
}

impl fmt::Display for ByteRingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

/// Where one stream lies in its page, in bytes; all multiples of 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// First byte and size of the data; the size is a power of two.
    pub data: (usize, usize),
    /// The consumer's index.
    pub cons: usize,
    /// The producer's index.
    pub prod: usize,
}

/// The two streams of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// From the guest to the other end.
    pub to_back: Stream,
    /// From the other end to the guest.
    pub to_front: Stream,
}

/// The console page (`struct xencons_interface`).
pub const CONSOLE: PageLayout = PageLayout {
    to_back: Stream { data: console::OUT, cons: console::OUT_CONS, prod: console::OUT_PROD },
    to_front: Stream { data: console::IN, cons: console::IN_CONS, prod: console::IN_PROD },
};

/// The xenstore page (`struct xenstore_domain_interface`).
pub const XENSTORE: PageLayout = PageLayout {
    to_back: Stream { data: xs_wire::REQ, cons: xs_wire::REQ_CONS, prod: xs_wire::REQ_PROD },
    to_front: Stream { data: xs_wire::RSP, cons: xs_wire::RSP_CONS, prod: xs_wire::RSP_PROD },
};

impl PageLayout {
    /// The same layout, `bytes` (a multiple of 4) further on in the memory.
    #[must_use]
    pub const fn at(self, bytes: usize) -> Self {
        const fn moved(s: Stream, by: usize) -> Stream {
            Stream { data: (s.data.0 + by, s.data.1), cons: s.cons + by, prod: s.prod + by }
        }
        Self { to_back: moved(self.to_back, bytes), to_front: moved(self.to_front, bytes) }
    }
}

impl Stream {
    fn fits(&self, words: usize) -> bool {
        let aligned = (self.data.0 | self.data.1 | self.cons | self.prod).is_multiple_of(4);
        let sized = self.data.1.is_power_of_two() && self.data.1 <= 1 << 30;
        let end = self.data.0.saturating_add(self.data.1);
        aligned && sized && end.max(self.cons + 4).max(self.prod + 4) <= words.saturating_mul(4)
    }
}

/// One end of a page: writes one stream and reads the other.
///
/// The same type serves both ends; [`Self::front`] and [`Self::back`] choose.
#[derive(Debug)]
pub struct ByteRing<M> {
    memory: M,
    output: Stream,
    input: Stream,
    /// Our index in `output`.
    prod: u32,
    /// Our index in `input`.
    cons: u32,
}

impl<M: Deref<Target = [AtomicU32]>> ByteRing<M> {
    /// The guest's end, taking over the indices that the page holds.
    ///
    /// # Errors
    /// See [`ByteRingError`].
    pub fn front(memory: M, page: PageLayout) -> Result<Self, ByteRingError> {
        Self::attach(memory, page.to_back, page.to_front)
    }

    /// The other end, taking over the indices that the page holds.
    ///
    /// # Errors
    /// See [`ByteRingError`].
    pub fn back(memory: M, page: PageLayout) -> Result<Self, ByteRingError> {
        Self::attach(memory, page.to_front, page.to_back)
    }

    fn attach(memory: M, output: Stream, input: Stream) -> Result<Self, ByteRingError> {
        if !output.fits(memory.len()) || !input.fits(memory.len()) {
            return Err(ByteRingError::TooSmall);
        }
        let mut ring = Self { memory, output, input, prod: 0, cons: 0 };
        ring.prod = ring.word(output.prod).load(Ordering::Relaxed);
        ring.cons = ring.word(input.cons).load(Ordering::Relaxed);
        ring.writable()?;
        ring.readable()?;
        Ok(ring)
    }

    /// The word at a byte offset. `attach` checked that all offsets of the layout are inside.
    fn word(&self, byte: usize) -> &AtomicU32 {
        let Some(word) = self.memory.get(byte / 4) else { unreachable!("the layout was checked") };
        word
    }

    /// Bytes that [`Self::write`] would take now.
    ///
    /// # Errors
    /// [`ByteRingError::Index`].
    pub fn writable(&self) -> Result<usize, ByteRingError> {
        // Orders the other end's reads of the bytes it gave back before our writes over them; the
        // counterpart is the store in `read`.
        let cons = self.word(self.output.cons).load(Ordering::Acquire);
        let used = self.prod.wrapping_sub(cons) as usize;
        self.output.data.1.checked_sub(used).ok_or(ByteRingError::Index)
    }

    /// Bytes that [`Self::read`] would give now.
    ///
    /// # Errors
    /// [`ByteRingError::Index`].
    pub fn readable(&self) -> Result<usize, ByteRingError> {
        // Orders the index before the bytes it covers; the counterpart is the store in `write`.
        let prod = self.word(self.input.prod).load(Ordering::Acquire);
        let there = prod.wrapping_sub(self.cons) as usize;
        if there > self.input.data.1 { Err(ByteRingError::Index) } else { Ok(there) }
    }

    /// Appends as many bytes as fit; answers how many. Notify the other end if it is more than 0.
    ///
    /// # Errors
    /// [`ByteRingError::Index`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<usize, ByteRingError> {
        let bytes = bytes.get(..self.writable()?).unwrap_or(bytes);
        let (start, size) = self.output.data;
        let mut index = self.prod;
        let mut rest = bytes;
        while !rest.is_empty() {
            let place = start + (index as usize & (size - 1));
            let skip = place % 4;
            let (part, later) = rest.split_at(rest.len().min(4 - skip));
            let word = self.word(place);
            let mut value = [0; 4];
            if part.len() < 4 {
                // The rest of the word are bytes that we wrote: nobody else writes this stream.
                value = word.load(Ordering::Relaxed).to_ne_bytes();
            }
            for (to, from) in value.iter_mut().skip(skip).zip(part) {
                *to = *from;
            }
            word.store(u32::from_ne_bytes(value), Ordering::Relaxed);
            #[expect(clippy::cast_possible_truncation, reason = "at most 4")]
            {
                index = index.wrapping_add(part.len() as u32);
            }
            rest = later;
        }
        self.prod = index;
        // Orders the bytes before the index: who sees the index sees them.
        self.word(self.output.prod).store(index, Ordering::Release);
        Ok(bytes.len())
    }

    /// Takes as many bytes as there are and fit; answers how many. Notify the other end if it is
    /// more than 0: it may be waiting for room.
    ///
    /// # Errors
    /// [`ByteRingError::Index`].
    pub fn read(&mut self, buf: &mut [u8]) -> Result<usize, ByteRingError> {
        let there = self.readable()?.min(buf.len());
        let (start, size) = self.input.data;
        let mut index = self.cons;
        let mut rest = buf.get_mut(..there).unwrap_or_default();
        while !rest.is_empty() {
            let place = start + (index as usize & (size - 1));
            let skip = place % 4;
            let value = self.word(place).load(Ordering::Relaxed).to_ne_bytes();
            let count = rest.len().min(4 - skip);
            let (part, later) = rest.split_at_mut(count);
            for (to, from) in part.iter_mut().zip(value.iter().skip(skip)) {
                *to = *from;
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most 4")]
            {
                index = index.wrapping_add(count as u32);
            }
            rest = later;
        }
        self.cons = index;
        // Orders our reads of the bytes before the index that gives them back.
        self.word(self.input.cons).store(index, Ordering::Release);
        Ok(there)
    }

    /// Orders what we wrote before what we look at next: call it between [`Self::write`] (or
    /// [`Self::read`]) and the last look before sleeping, so that one of the two ends sees the other.
    pub fn barrier(&self) {
        fence(Ordering::SeqCst);
    }

    /// The page, for fields beside the streams.
    pub fn memory(&self) -> &[AtomicU32] {
        &self.memory
    }

    /// Gives the page back.
    pub fn into_memory(self) -> M {
        self.memory
    }
}

#[cfg(test)]
mod tests;
