//! A Xen disk with several rings (`xen/include/public/io/blkif.h`, "Multi-queue"): one [`BlockDevice`] over a
//! [`Blkfront`] for each.
//!
//! Any request may use any ring, and completions come in any order anyway; a flush is for what has completed, so one ring
//! is enough for it. A backend that breaks one ring has broken the disk.

use alloc::vec::Vec;

use janus_proto::addr::{DomId, Port};

use super::blkfront::{Blkfront, Setup};
use super::blkfront_xs::{Details, Offer};
use super::grants::Grave;
use super::nodes::{Publication, publish_queues};
use crate::class::{BlockDevice, BlockOp, Completion, Geometry, PeerError, SubmitError};
use crate::hal::{HalError, XenHal};

/// Rings that are published and wait for their backend.
#[derive(Debug)]
pub struct QueuesSetup {
    queues: Vec<Setup>,
}

impl QueuesSetup {
    /// Makes as many rings as `wanted` and offered, but at least one, for backend domain `peer`.
    ///
    /// # Errors
    /// [`HalError`]; nothing is published yet, so nothing is left behind.
    pub fn new(
        hal: &'static dyn XenHal,
        peer: DomId,
        offer: Offer,
        wanted: u32,
    ) -> Result<Self, HalError> {
        let count = wanted.min(offer.queues).max(1);
        let queues = (0..count).map(|_| Setup::new(hal, peer, offer)).collect::<Result<_, _>>()?;
        Ok(Self { queues })
    }

    /// The nodes to write.
    #[must_use]
    pub fn publication(&self) -> Publication {
        publish_queues(self.queues.iter().map(Setup::publication))
    }

    /// The ports on which completions are announced.
    #[must_use]
    pub fn ports(&self) -> Vec<Port> {
        self.queues.iter().map(Setup::port).collect()
    }

    /// Puts rings and channels aside, because the backend may still use them.
    pub fn bury(self, grave: &Grave) {
        self.queues.into_iter().for_each(|queue| queue.bury(grave));
    }

    /// The disk, when the backend is connected; see [`Setup::connect`].
    #[must_use]
    pub fn connect(self, details: Details, handle: u16, grave: &Grave) -> BlkfrontQueues {
        let connect = |queue: Setup| queue.connect(details, handle, grave.clone());
        let queues: Vec<_> = self.queues.into_iter().map(connect).collect();
        let mut geometry = details.geometry(0, 0);
        for queue in &queues {
            let own = queue.geometry();
            let queue_depth = geometry.queue_depth.saturating_add(own.queue_depth);
            geometry = Geometry { queue_depth, ..own };
        }
        BlkfrontQueues { queues, geometry, turn: 0 }
    }
}

/// The driver of a connected disk.
#[derive(Debug)]
pub struct BlkfrontQueues {
    /// At least one.
    queues: Vec<Blkfront>,
    geometry: Geometry,
    /// Whose turn it is to take a request, and to be looked at first.
    turn: usize,
}

impl BlkfrontQueues {
    /// Its rings' drivers.
    #[must_use]
    pub fn queues(&self) -> &[Blkfront] {
        &self.queues
    }

    fn next_turn(&mut self) -> usize {
        let turn = self.turn % self.queues.len().max(1);
        self.turn = turn + 1;
        turn
    }
}

impl BlockDevice for BlkfrontQueues {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        let start = self.next_turn();
        let mut op = op;
        for step in 0..self.queues.len() {
            let index = (start + step) % self.queues.len();
            let Some(queue) = self.queues.get_mut(index) else { break };
            match queue.submit(id, op) {
                Err(SubmitError::Busy(back)) => op = back,
                result => return result,
            }
        }
        Err(SubmitError::Busy(op))
    }

    fn kick(&mut self) {
        self.queues.iter_mut().for_each(BlockDevice::kick);
    }

    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        let start = self.next_turn();
        for step in 0..self.queues.len() {
            let index = (start + step) % self.queues.len();
            let Some(queue) = self.queues.get_mut(index) else { break };
            match queue.complete() {
                Ok(None) => {}
                Ok(done) => return Ok(done),
                Err(error) => {
                    self.queues.iter_mut().for_each(|queue| queue.give_up(error));
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    fn arm(&mut self) -> bool {
        // Each of them has to be armed.
        self.queues.iter_mut().fold(false, |more, queue| queue.arm() | more)
    }
}
