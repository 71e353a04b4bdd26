//! The changes to an address space that a guest's process makes before the guest goes on.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use super::layout::{BOTTOM, Mailbox, OPS, TOP, UNMAP};

/// One change: a run of pages put in or taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) address: u64,
    pub(super) length: u64,
    /// `PROT_*`, or [`UNMAP`].
    pub(super) protection: u64,
    /// Where in the guest's memory.
    pub(super) offset: u64,
}

/// Everything out.
pub(super) const EVERYTHING: Change =
    Change { address: BOTTOM, length: TOP - BOTTOM, protection: UNMAP, offset: 0 };

/// Changes that wait for one process at most; then everything goes, and comes back when it is needed. It bounds what a
/// CPU that does not run can be made to remember.
const LONGEST: usize = 1024;

/// The changes to come, in order.
#[derive(Debug, Default)]
pub(super) struct Queue(VecDeque<Change>);

impl Queue {
    /// Adds a change, to the last one where the two are neighbours.
    pub(super) fn push(&mut self, change: Change) {
        if change == EVERYTHING {
            self.forget();
        }
        if let Some(last) = self.0.back_mut()
            && last.protection == change.protection
            && last.address + last.length == change.address
            && (change.protection == UNMAP || last.offset + last.length == change.offset)
        {
            last.length += change.length;
            return;
        }
        if self.0.len() >= LONGEST {
            self.forget();
            self.0.push_back(EVERYTHING);
        }
        self.0.push_back(change);
    }

    /// Drops all changes of the guest's addresses; those of the stub's own stay.
    fn forget(&mut self) {
        self.0.retain(|change| change.address >= TOP);
    }

    /// Puts a change before all others.
    pub(super) fn push_first(&mut self, change: Change) {
        self.0.push_front(change);
    }

    /// Writes as many as there is room for into the mailbox; answers those, and whether that was all.
    pub(super) fn take(&mut self, mailbox: &Mailbox) -> (Vec<Change>, bool) {
        let count = self.0.len().min(OPS);
        if count == 0 {
            return (Vec::new(), true);
        }
        let taken: Vec<_> = self.0.drain(..count).collect();
        for (op, change) in mailbox.op.iter().zip(&taken) {
            op.address.store(change.address, Relaxed);
            op.length.store(change.length, Relaxed);
            op.protection.store(change.protection, Relaxed);
            op.offset.store(change.offset, Relaxed);
        }
        mailbox.ops.store(u32::try_from(taken.len()).unwrap_or(0), Relaxed);
        (taken, self.0.is_empty())
    }
}
