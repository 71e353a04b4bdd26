//! The requests of one disk: what waits, what is in flight, what has ended.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::task::{Poll, Waker};

use janus_front::class::{BlockDevice, BlockOp, Completion, SubmitError};
use janus_front::dma::DmaBuf;

use super::{BlockCounters, BlockError, outcome};
use crate::dma_pool::DmaPool;

type Outcome = Result<Option<DmaBuf>, BlockError>;

enum Slot {
    /// The next free slot.
    Free(Option<u32>),
    /// The device (or `waiting`) has it; who waits for it.
    Pending(Option<Waker>),
    /// As `Pending`, but nobody wants the result.
    Abandoned,
    Done(Outcome),
}

struct Entry {
    slot: Slot,
    /// Counts uses of the slot, so that a stale id is told from a live one.
    generation: u32,
    /// Data bytes: for the counters.
    read: u32,
    written: u32,
}

/// See the module.
pub(super) struct Queue {
    /// `None` once detached.
    device: Option<Box<dyn BlockDevice>>,
    entries: Vec<Entry>,
    free: Option<u32>,
    /// Requests that the device has not taken yet, in order.
    waiting: VecDeque<(u64, BlockOp)>,
    in_flight: usize,
    /// Why nothing works any more.
    failure: Option<BlockError>,
    /// Something was submitted since the last kick.
    dirty: bool,
    pub(super) counters: BlockCounters,
}

fn index_of(id: u64) -> (usize, u32) {
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of an id")]
    let (index, generation) = (id as u32, (id >> 32) as u32);
    (index as usize, generation)
}

impl Queue {
    pub(super) fn new(device: Box<dyn BlockDevice>) -> Self {
        Self {
            device: Some(device),
            entries: Vec::new(),
            free: None,
            waiting: VecDeque::new(),
            in_flight: 0,
            failure: None,
            dirty: false,
            counters: BlockCounters::default(),
        }
    }

    pub(super) fn failure(&self) -> Option<BlockError> {
        self.failure
    }
    pub(super) fn is_detached(&self) -> bool {
        self.device.is_none()
    }
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn entry(&mut self, id: u64) -> Option<&mut Entry> {
        let (index, generation) = index_of(id);
        self.entries.get_mut(index).filter(|entry| entry.generation == generation)
    }

    fn allocate(&mut self) -> u64 {
        let index = self.free.unwrap_or_else(|| {
            self.entries.push(Entry { slot: Slot::Free(None), generation: 0, read: 0, written: 0 });
            u32::try_from(self.entries.len() - 1).expect("fewer requests than memory has bytes")
        });
        let Some(entry) = self.entries.get_mut(index as usize) else { return u64::MAX };
        if let Slot::Free(next) = entry.slot {
            self.free = next;
        }
        entry.slot = Slot::Pending(None);
        u64::from(index) | u64::from(entry.generation) << 32
    }

    fn release(&mut self, id: u64) {
        let free = self.free;
        let (index, _) = index_of(id);
        if let Some(entry) = self.entry(id) {
            entry.generation = entry.generation.wrapping_add(1);
            entry.slot = Slot::Free(free);
            self.free = u32::try_from(index).ok();
        }
    }

    /// Takes a request; it is visible to the device after the next [`Self::advance`].
    pub(super) fn submit(&mut self, op: BlockOp) -> u64 {
        let id = self.allocate();
        let bytes = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let (read, written) = match &op {
            BlockOp::Read { len, .. } => (bytes(*len), 0),
            BlockOp::Write { len, .. } => (0, bytes(*len)),
            _ => (0, 0),
        };
        if let Some(entry) = self.entry(id) {
            (entry.read, entry.written) = (read, written);
        }
        if let Some(error) = self.failure {
            self.end(id, Err(error));
        } else if !self.waiting.is_empty() {
            self.waiting.push_back((id, op));
        } else if let Some(op) = self.offer(id, op) {
            self.counters.queue_full += 1;
            self.waiting.push_back((id, op));
        }
        id
    }

    /// Offers a request to the device; gives it back when the device has no room.
    fn offer(&mut self, id: u64, op: BlockOp) -> Option<BlockOp> {
        let device = self.device.as_mut()?;
        match device.submit(id, op) {
            Ok(()) => {
                self.in_flight += 1;
                self.counters.requests += 1;
                self.dirty = true;
                None
            }
            Err(SubmitError::Busy(op)) => Some(op),
            Err(SubmitError::Invalid(_)) => {
                self.end(id, Err(BlockError::Unsupported));
                None
            }
            Err(SubmitError::Gone(_)) => {
                self.end(id, Err(BlockError::Gone));
                None
            }
        }
    }

    /// Stores a result and wakes who waits for it; answers a buffer that nobody waits for.
    fn end(&mut self, id: u64, result: Outcome) -> Option<DmaBuf> {
        let entry = self.entry(id)?;
        let (read, written) = (u64::from(entry.read), u64::from(entry.written));
        let mut unwanted = None;
        let failed = result.is_err();
        match core::mem::replace(&mut entry.slot, Slot::Abandoned) {
            Slot::Pending(waker) => {
                entry.slot = Slot::Done(result);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Slot::Abandoned => {
                self.release(id);
                unwanted = result.ok().flatten();
            }
            // Not outstanding: a completion too many. The slot stays as it was.
            other => {
                entry.slot = other;
                return result.ok().flatten();
            }
        }
        if failed {
            self.counters.errors += 1;
        } else {
            self.counters.bytes_read += read;
            self.counters.bytes_written += written;
        }
        unwanted
    }

    /// Whether a completion may carry this id: a request the device has.
    fn is_outstanding(&mut self, id: u64) -> bool {
        self.entry(id).is_some_and(|e| matches!(e.slot, Slot::Pending(_) | Slot::Abandoned))
    }

    /// Takes completions, offers what waits, kicks.
    pub(super) fn advance(&mut self, name: &str, pool: &DmaPool) {
        self.take_completions(name, pool);
        while let Some((id, op)) = self.waiting.pop_front() {
            if let Some(op) = self.offer(id, op) {
                self.waiting.push_front((id, op));
                break;
            }
        }
        if self.dirty
            && let Some(device) = self.device.as_mut()
        {
            device.kick();
            self.counters.kicks += 1;
            self.dirty = false;
        }
    }

    fn take_completions(&mut self, name: &str, pool: &DmaPool) {
        loop {
            let Some(device) = self.device.as_mut() else { return };
            match device.complete() {
                Ok(Some(Completion { id, status, buf })) => {
                    if !self.is_outstanding(id) {
                        log::error!(
                            "{name}: completion of request {id:#x}, which is not outstanding"
                        );
                        continue;
                    }
                    self.in_flight = self.in_flight.saturating_sub(1);
                    let result = match outcome(status) {
                        Ok(()) => Ok(buf),
                        Err(error) => {
                            if let Some(buf) = buf {
                                pool.put(buf);
                            }
                            Err(self.failure.unwrap_or(error))
                        }
                    };
                    if let Some(buf) = self.end(id, result) {
                        pool.put(buf);
                    }
                }
                Ok(None) => {
                    if self.failure.is_some() {
                        self.fail_all();
                    }
                    return;
                }
                Err(error) => {
                    // A device that keeps on complaining is not asked a third time.
                    let again = self.failure.is_none();
                    if again {
                        log::error!("{name}: {error}");
                        self.failure = Some(BlockError::Peer(error.0));
                    } else {
                        self.fail_all();
                        return;
                    }
                }
            }
        }
    }

    /// Ends everything that has not ended with the failure.
    fn fail_all(&mut self) {
        let error = self.failure.unwrap_or(BlockError::Gone);
        self.waiting.clear();
        self.in_flight = 0;
        let ids: Vec<u64> = (0_u64..)
            .zip(&self.entries)
            .filter(|(_, e)| matches!(e.slot, Slot::Pending(_) | Slot::Abandoned))
            .map(|(index, e)| index | u64::from(e.generation) << 32)
            .collect();
        for id in ids {
            self.end(id, Err(error));
        }
    }

    /// Ends everything and gives the device back, with what is in flight in it.
    pub(super) fn detach(&mut self, error: BlockError) -> Option<Box<dyn BlockDevice>> {
        self.failure.get_or_insert(error);
        let device = self.device.take();
        self.fail_all();
        device
    }

    /// Asks for the next event, if one is to come; `true`: advance again.
    pub(super) fn arm(&mut self) -> bool {
        if self.in_flight == 0 || self.failure.is_some() {
            return false;
        }
        self.device.as_mut().is_some_and(|device| device.arm())
    }

    /// The result of a request, if it has ended; its slot is free then.
    pub(super) fn poll(&mut self, id: u64, waker: &Waker) -> Poll<Outcome> {
        let Some(entry) = self.entry(id) else { return Poll::Ready(Err(BlockError::Gone)) };
        match &mut entry.slot {
            Slot::Pending(waiting) => {
                match waiting {
                    Some(known) if known.will_wake(waker) => {}
                    _ => *waiting = Some(waker.clone()),
                }
                Poll::Pending
            }
            slot @ Slot::Done(_) => {
                let Slot::Done(result) = core::mem::replace(slot, Slot::Abandoned) else {
                    return Poll::Ready(Err(BlockError::Gone));
                };
                self.release(id);
                Poll::Ready(result)
            }
            Slot::Free(_) | Slot::Abandoned => Poll::Ready(Err(BlockError::Gone)),
        }
    }

    /// Nobody waits for this request any more; answers its buffer if it has ended.
    pub(super) fn abandon(&mut self, id: u64) -> Option<DmaBuf> {
        let entry = self.entry(id)?;
        match core::mem::replace(&mut entry.slot, Slot::Abandoned) {
            Slot::Done(result) => {
                self.release(id);
                result.ok().flatten()
            }
            Slot::Pending(_) => {
                // Not given to the device yet: it need not be.
                if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
                    let (_, op) = self.waiting.remove(at)?;
                    self.release(id);
                    return match op {
                        BlockOp::Read { buf, .. } => Some(buf),
                        // A write that was asked for and not yet begun is simply not done.
                        BlockOp::Write { buf, .. } => Some(buf),
                        _ => None,
                    };
                }
                None
            }
            other => {
                entry.slot = other;
                None
            }
        }
    }
}
