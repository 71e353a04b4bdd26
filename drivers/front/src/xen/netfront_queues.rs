//! A Xen network card with several pairs of rings (`xen/include/public/io/netif.h`, "multi-queue"): one [`NetDevice`]
//! over a [`Netfront`] for each.
//!
//! A flow is sent on one queue, and the backend does the same towards us, so that it stays in order. A backend that breaks
//! one ring has broken the card.

use alloc::vec::Vec;

use janus_proto::addr::{DomId, Port};

use super::grants::Grave;
use super::netfront::Netfront;
use super::netfront_xs::{Offer, Ports};
use super::nodes::{Publication, publish_queues};
use crate::class::{NetDevice, NetProperties, PeerError, RxChecksum, RxPart, TX_HEADROOM, TxFrame};
use crate::dma::DmaBuf;
use crate::hal::{HalError, XenHal};

/// Where an IPv4 frame has both addresses and, without options, both ports.
const FLOW: core::ops::Range<usize> = TX_HEADROOM + 26..TX_HEADROOM + 38;

#[derive(Debug)]
struct Queue {
    card: Netfront,
    /// Pages that came out of it and did not come back yet.
    lent: usize,
}

/// The driver of a network card.
#[derive(Debug)]
pub struct NetfrontQueues {
    /// At least one.
    queues: Vec<Queue>,
    properties: NetProperties,
    /// Whose turn it is to be looked at first.
    turn: usize,
}

impl NetfrontQueues {
    /// Makes as many queues as `wanted` and offered, but at least one; see [`Netfront::new`].
    ///
    /// # Errors
    /// [`HalError`].
    pub fn new(
        hal: &'static dyn XenHal,
        peer: DomId,
        offer: Offer,
        wanted: u32,
        grave: &Grave,
    ) -> Result<Self, HalError> {
        let queue =
            |_| Ok(Queue { card: Netfront::new(hal, peer, offer, grave.clone())?, lent: 0 });
        let queues = (0..wanted.min(offer.queues).max(1)).map(queue);
        let Offer { mac, mtu, offloads, .. } = offer;
        let properties = NetProperties { mac, mtu, offloads };
        Ok(Self { queues: queues.collect::<Result<_, _>>()?, properties, turn: 0 })
    }

    /// The nodes to write.
    #[must_use]
    pub fn publication(&self) -> Publication {
        publish_queues(self.queues.iter().map(|queue| queue.card.publication()))
    }

    /// The ports of the card's events.
    #[must_use]
    pub fn ports(&self) -> Vec<Port> {
        let ports = self.queues.iter().flat_map(|queue| match queue.card.ports() {
            Ports::Shared(port) => [Some(port), None],
            Ports::Split { tx, rx } => [Some(tx), Some(rx)],
        });
        ports.flatten().collect()
    }

    fn next_turn(&mut self) -> usize {
        let turn = self.turn % self.queues.len().max(1);
        self.turn = turn + 1;
        turn
    }

    fn fail<T>(&mut self, error: PeerError) -> Result<T, PeerError> {
        self.queues.iter_mut().for_each(|queue| queue.card.give_up(error));
        Err(error)
    }
}

impl NetDevice for NetfrontQueues {
    fn properties(&self) -> NetProperties {
        self.properties
    }

    fn link_up(&self) -> bool {
        self.queues.iter().all(|queue| queue.card.link_up())
    }

    fn transmit(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        let flow = frame.buf.get(FLOW).filter(|_| self.queues.len() > 1).unwrap_or_default();
        let step = |hash: usize, byte: &u8| hash.wrapping_mul(31).wrapping_add(usize::from(*byte));
        let index = flow.iter().fold(0, step) % self.queues.len().max(1);
        match self.queues.get_mut(index) {
            Some(queue) => queue.card.transmit(frame),
            None => Err(frame),
        }
    }

    fn kick(&mut self) {
        self.queues.iter_mut().for_each(|queue| queue.card.kick());
    }

    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError> {
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues.get_mut(index) else { break };
            match queue.card.transmitted() {
                Ok(None) => {}
                Ok(done) => return Ok(done),
                Err(error) => return self.fail(error),
            }
        }
        Ok(None)
    }

    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        parts.clear();
        let start = self.next_turn();
        for step in 0..self.queues.len() {
            let index = (start + step) % self.queues.len();
            let Some(queue) = self.queues.get_mut(index) else { break };
            match queue.card.receive(parts) {
                Ok(None) => {}
                Ok(frame) => {
                    queue.lent += parts.len();
                    return Ok(frame);
                }
                Err(error) => return self.fail(error),
            }
        }
        Ok(None)
    }

    fn recycle(&mut self, buf: DmaBuf) {
        // Any page is as good as another, as long as each queue gets back as many as it gave.
        let count = self.queues.len();
        let owner = self.queues.iter().position(|queue| queue.lent > 0).filter(|_| count > 1);
        if let Some(queue) = self.queues.get_mut(owner.unwrap_or(0)) {
            queue.lent = queue.lent.saturating_sub(1);
            queue.card.recycle(buf);
        }
    }

    fn arm(&mut self) -> bool {
        // Each of them has to be armed.
        self.queues.iter_mut().fold(false, |more, queue| queue.card.arm() | more)
    }
}
