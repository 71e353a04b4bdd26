//! The shared request/response ring of Xen's devices, both ends (`xen/include/public/io/ring.h`).
//!
//! One memory, four indices: the front publishes requests and takes responses, the back takes
//! requests and publishes responses in the slots that requests freed. Indices run freely and wrap
//! at 2^32; the slot is the index modulo the ring's size. What a slot means is the device's business:
//! see `crate::abi::xen_io::{blkif, netif}`.
//!
//! The other end is never trusted: each index is read once and checked, each slot is copied once, and
//! what is ours (how far we produced and consumed) is kept here and never read back from the memory.
//!
//! Notifications: an end says in `*_event` at which index it wants the next one; the other end sends
//! one when it passes that index. [`Front::publish`] and [`Back::publish`] answer whether to send;
//! [`Front::final_check_for_responses`] and [`Back::final_check_for_requests`] must be called, and answer
//! `false`, before an end goes to sleep.

use core::fmt;
use core::ops::Deref;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::xen_io::ring::{HEADER_WORDS, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use crate::sync::{AtomicU32, Ordering, fence};

/// What can go wrong with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The memory does not hold one slot.
    TooSmall,
    /// The other end published more than there can be.
    Overrun,
    /// Front: no free slot. Back: no request is waiting for a response.
    Full,
}

impl RingError {
    /// A short text, for errors that carry one.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::TooSmall => "the memory of the ring does not hold one slot",
            Self::Overrun => "the ring's producer index is beyond what was possible",
            Self::Full => "the ring is full",
        }
    }
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

/// The number of slots of `slot_words` words in `words` words: a power of two, 0 if there is no room.
#[must_use]
pub const fn slots_in(words: usize, slot_words: usize) -> u32 {
    let Some(room) = words.checked_sub(HEADER_WORDS) else { return 0 };
    if slot_words == 0 || room < slot_words {
        return 0;
    }
    // Indices are 32 bits wide and must tell full from empty, so no ring is larger than 2^31 slots.
    let log2 = (room / slot_words).ilog2();
    1 << if log2 > 31 { 31 } else { log2 }
}

/// The memory of a ring with slots of `SLOT` words.
#[derive(Debug)]
struct Shared<M, const SLOT: usize> {
    memory: M,
    slots: u32,
}

impl<M: Deref<Target = [AtomicU32]>, const SLOT: usize> Shared<M, SLOT> {
    fn new(memory: M) -> Result<Self, RingError> {
        match slots_in(memory.len(), SLOT) {
            0 => Err(RingError::TooSmall),
            slots => Ok(Self { memory, slots }),
        }
    }

    /// A header word. `new` checked that the header is there.
    fn header(&self, word: usize) -> &AtomicU32 {
        let Some(word) = self.memory.get(word) else { unreachable!("the header was checked") };
        word
    }

    /// The words of the slot of an index, whatever the index.
    fn slot(&self, index: u32) -> &[AtomicU32] {
        let start = HEADER_WORDS + (index & (self.slots - 1)) as usize * SLOT;
        // Always there: `slots` was computed from the length.
        self.memory.get(start..start + SLOT).unwrap_or_default()
    }

    /// Writes a message into a slot, word by word.
    fn write<T: IntoBytes + Immutable>(&self, index: u32, message: &T) {
        const { assert!(size_of::<T>() <= SLOT * 4 && size_of::<T>().is_multiple_of(4)) }
        let (words, _) = message.as_bytes().as_chunks::<4>();
        for (shared, word) in self.slot(index).iter().zip(words) {
            shared.store(u32::from_ne_bytes(*word), Ordering::Relaxed);
        }
    }

    /// Copies a message out of a slot, once.
    fn read<T: FromBytes + IntoBytes>(&self, index: u32) -> T {
        const { assert!(size_of::<T>() <= SLOT * 4 && size_of::<T>().is_multiple_of(4)) }
        let mut message = T::new_zeroed();
        let (words, _) = message.as_mut_bytes().as_chunks_mut::<4>();
        for (word, shared) in words.iter_mut().zip(self.slot(index)) {
            *word = shared.load(Ordering::Relaxed).to_ne_bytes();
        }
        message
    }

    /// Publishes `new` in producer word `prod`; answers whether the other end's `event` was passed since `old`.
    fn publish(&self, prod: usize, event: usize, old: u32, new: u32) -> bool {
        // Orders the slots written above before the index: who sees the index sees them.
        self.header(prod).store(new, Ordering::Release);
        // Orders our index before our look at `event`. The other end writes `event`, then looks at the
        // index (`arm`): with a full barrier on both sides one of us sees the other's write.
        fence(Ordering::SeqCst);
        let event = self.header(event).load(Ordering::Relaxed);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks for a notification when `prod` reaches `at`; answers the value of `prod` after that.
    fn arm(&self, event: usize, prod: usize, at: u32) -> u32 {
        self.header(event).store(at, Ordering::Relaxed);
        // Orders `event` before our look at the index; the counterpart is in `publish`.
        fence(Ordering::SeqCst);
        self.header(prod).load(Ordering::Relaxed)
    }
}

/// The front end: the guest's driver.
///
/// Dropping it says nothing to the other end; end the grants first.
#[derive(Debug)]
pub struct Front<M, const SLOT: usize> {
    shared: Shared<M, SLOT>,
    /// Requests written, published or not.
    req_prod: u32,
    /// Requests published.
    req_published: u32,
    /// Responses taken.
    rsp_cons: u32,
    /// Responses known to be there, as last read and checked.
    rsp_seen: u32,
}

impl<M: Deref<Target = [AtomicU32]>, const SLOT: usize> Front<M, SLOT> {
    /// Initialises a ring that no back end is attached to yet.
    ///
    /// # Errors
    /// [`RingError::TooSmall`].
    pub fn new(memory: M) -> Result<Self, RingError> {
        Self::starting_at(memory, 0)
    }

    /// As [`Self::new`] with indices that start at `index` instead of 0, for tests of wrapping.
    ///
    /// # Errors
    /// [`RingError::TooSmall`].
    pub fn starting_at(memory: M, index: u32) -> Result<Self, RingError> {
        let shared = Shared::new(memory)?;
        for word in shared.memory.iter().take(HEADER_WORDS) {
            word.store(0, Ordering::Relaxed);
        }
        shared.header(REQ_PROD).store(index, Ordering::Relaxed);
        shared.header(RSP_PROD).store(index, Ordering::Relaxed);
        shared.header(REQ_EVENT).store(index.wrapping_add(1), Ordering::Relaxed);
        shared.header(RSP_EVENT).store(index.wrapping_add(1), Ordering::Relaxed);
        Ok(Self { shared, req_prod: index, req_published: index, rsp_cons: index, rsp_seen: index })
    }

    /// Slots of the ring.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.shared.slots
    }

    /// Requests that fit now.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.shared.slots - self.outstanding()
    }

    /// Requests without a taken response, published or not.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Writes a request, invisible to the back end before [`Self::publish`]; answers its ring index.
    ///
    /// # Errors
    /// [`RingError::Full`].
    pub fn push<T: IntoBytes + Immutable>(&mut self, request: &T) -> Result<u32, RingError> {
        if self.free() == 0 {
            return Err(RingError::Full);
        }
        let index = self.req_prod;
        self.shared.write(index, request);
        self.req_prod = index.wrapping_add(1);
        Ok(index)
    }

    /// Shows the back end all requests pushed; answers whether to notify it.
    #[must_use = "the back end sleeps until it is notified"]
    pub fn publish(&mut self) -> bool {
        if self.req_published == self.req_prod {
            return false;
        }
        let notify = self.shared.publish(REQ_PROD, REQ_EVENT, self.req_published, self.req_prod);
        self.req_published = self.req_prod;
        notify
    }

    /// Copies out the next response.
    ///
    /// # Errors
    /// [`RingError::Overrun`] when there are more responses than requests.
    pub fn pop<T: FromBytes + IntoBytes>(&mut self) -> Result<Option<T>, RingError> {
        if self.rsp_cons == self.rsp_seen {
            // Orders the index before the slots it covers; the counterpart is the store in `publish`.
            let rsp_prod = self.shared.header(RSP_PROD).load(Ordering::Acquire);
            let asked = self.req_published.wrapping_sub(self.rsp_cons);
            if rsp_prod.wrapping_sub(self.rsp_cons) > asked {
                return Err(RingError::Overrun);
            }
            self.rsp_seen = rsp_prod;
            if self.rsp_cons == rsp_prod {
                return Ok(None);
            }
        }
        let response = self.shared.read(self.rsp_cons);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(Some(response))
    }

    /// The ring index of the response that [`Self::pop`] takes next.
    #[must_use]
    pub fn next_response(&self) -> u32 {
        self.rsp_cons
    }

    /// Asks for a notification at the next response; `true`: one is already there (or the index
    /// lies), call [`Self::pop`] again instead of sleeping.
    #[must_use = "sleeping on a ring with responses loses them"]
    pub fn final_check_for_responses(&mut self) -> bool {
        self.final_check_after(1)
    }

    /// As [`Self::final_check_for_responses`], but asks only at the `count`th response from now (at
    /// least the next), for ends that need not hurry.
    #[must_use = "sleeping on a ring with responses loses them"]
    pub fn final_check_after(&mut self, count: u32) -> bool {
        let at = self.rsp_cons.wrapping_add(count.max(1));
        let rsp_prod = self.shared.arm(RSP_EVENT, RSP_PROD, at);
        rsp_prod.wrapping_sub(self.rsp_cons) >= count.max(1) || self.rsp_cons != self.rsp_seen
    }

    /// Gives the memory back.
    pub fn into_memory(self) -> M {
        self.shared.memory
    }
}

/// The back end: the device.
#[derive(Debug)]
pub struct Back<M, const SLOT: usize> {
    shared: Shared<M, SLOT>,
    /// Requests taken.
    req_cons: u32,
    /// Requests known to be there, as last read and checked.
    req_seen: u32,
    /// Responses written, published or not.
    rsp_prod: u32,
    /// Responses published.
    rsp_published: u32,
}

impl<M: Deref<Target = [AtomicU32]>, const SLOT: usize> Back<M, SLOT> {
    /// Attaches to a ring that a front end initialised, where the last back end left it.
    ///
    /// # Errors
    /// [`RingError::TooSmall`]; [`RingError::Overrun`] when the indices are nonsense.
    pub fn attach(memory: M) -> Result<Self, RingError> {
        let shared = Shared::<M, SLOT>::new(memory)?;
        let start = shared.header(RSP_PROD).load(Ordering::Relaxed);
        let req_prod = shared.header(REQ_PROD).load(Ordering::Relaxed);
        if req_prod.wrapping_sub(start) > shared.slots {
            return Err(RingError::Overrun);
        }
        Ok(Self { shared, req_cons: start, req_seen: start, rsp_prod: start, rsp_published: start })
    }

    /// Slots of the ring.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.shared.slots
    }

    /// Requests taken whose response is not written yet.
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Requests that can be taken now.
    ///
    /// # Errors
    /// [`RingError::Overrun`] when there are more requests than slots.
    pub fn waiting(&mut self) -> Result<u32, RingError> {
        // Orders the index before the slots it covers; the counterpart is the store in `publish`.
        let req_prod = self.shared.header(REQ_PROD).load(Ordering::Acquire);
        let waiting = req_prod.wrapping_sub(self.req_cons);
        // Requests taken but unanswered keep their slots; and the index never runs backwards.
        if waiting > self.shared.slots - self.outstanding()
            || waiting < self.req_seen.wrapping_sub(self.req_cons)
        {
            return Err(RingError::Overrun);
        }
        self.req_seen = req_prod;
        Ok(waiting)
    }

    /// Copies out the next request.
    ///
    /// # Errors
    /// [`RingError::Overrun`] when there are more requests than slots.
    pub fn pop<T: FromBytes + IntoBytes>(&mut self) -> Result<Option<T>, RingError> {
        if self.req_cons == self.req_seen && self.waiting()? == 0 {
            return Ok(None);
        }
        let request = self.shared.read(self.req_cons);
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(Some(request))
    }

    /// Writes a response, invisible to the front end before [`Self::publish`].
    ///
    /// # Errors
    /// [`RingError::Full`] when every request taken has its response.
    pub fn push<T: IntoBytes + Immutable>(&mut self, response: &T) -> Result<(), RingError> {
        if self.outstanding() == 0 {
            return Err(RingError::Full);
        }
        self.shared.write(self.rsp_prod, response);
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows the front end all responses pushed; answers whether to notify it.
    #[must_use = "the front end sleeps until it is notified"]
    pub fn publish(&mut self) -> bool {
        if self.rsp_published == self.rsp_prod {
            return false;
        }
        let notify = self.shared.publish(RSP_PROD, RSP_EVENT, self.rsp_published, self.rsp_prod);
        self.rsp_published = self.rsp_prod;
        notify
    }

    /// Asks for a notification at the next request; `true`: one is already there (or the index
    /// lies), call [`Self::pop`] again instead of sleeping.
    #[must_use = "sleeping on a ring with requests loses them"]
    pub fn final_check_for_requests(&mut self) -> bool {
        let req_prod = self.shared.arm(REQ_EVENT, REQ_PROD, self.req_cons.wrapping_add(1));
        req_prod != self.req_cons
    }

    /// Gives the memory back.
    pub fn into_memory(self) -> M {
        self.shared.memory
    }
}

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;
