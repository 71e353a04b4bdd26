//! A guest's connection over the page it shares with the daemon (`xs_wire.h`).

use std::ops::Deref;

use janus_proto::abi::xen_io::xs_wire::{self, RingError};
use janus_proto::byte_ring::{ByteRing, ByteRingError, XENSTORE};
use janus_proto::sync::{AtomicU32, Ordering};
use janus_proto::xenstore::Server;

use super::{ConnectionId, Xenstored};

/// Bytes queued for a guest that does not read; beyond this its requests wait.
const BACKLOG: usize = 64 * 1024;
/// Requests that are answered before others have their turn at the store.
const BUDGET: usize = 64;

/// Serves one guest's page.
#[derive(Debug)]
pub struct RingServer<M> {
    ring: ByteRing<M>,
    server: Server,
    connection: ConnectionId,
    broken: bool,
    /// There may be more, left for the next time.
    busy: bool,
}

impl<M: Deref<Target = [AtomicU32]>> RingServer<M> {
    /// Serves `connection` over `page`.
    ///
    /// # Errors
    /// The page is too small, or its indices are nonsense.
    pub fn new(page: M, connection: ConnectionId) -> Result<Self, ByteRingError> {
        let ring = ByteRing::back(page, XENSTORE)?;
        Ok(Self { ring, server: Server::default(), connection, broken: false, busy: false })
    }

    /// Whether the guest broke the protocol; the page's `error` word says how, and nothing is served any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether [`Self::serve`] left requests for the next time, so that a guest that asks without end keeps nobody else
    /// from the store.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Takes what the guest sent, answers, and sends what fits. `true`: notify the guest.
    pub fn serve(&mut self, store: &mut Xenstored) -> bool {
        if self.broken {
            return false;
        }
        match self.pump(store) {
            Ok(notify) => notify,
            Err(error) => {
                self.broken = true;
                if let Some(word) = self.ring.memory().get(xs_wire::ERROR / 4) {
                    word.store(error.0, Ordering::Relaxed);
                }
                true
            }
        }
    }

    fn pump(&mut self, store: &mut Xenstored) -> Result<bool, RingError> {
        let (mut notify, mut answered) = (false, 0);
        self.busy = false;
        loop {
            let mut moved = false;
            while let Some(event) = self.room().then(|| store.event(self.connection)).flatten() {
                // An event too long for a message is lost, as in the C daemon.
                let _ = self.server.changed(&event.path, &event.token);
            }
            let mut buf = [0; xs_wire::REQ.1];
            if self.room() {
                let count = self.ring.read(&mut buf).map_err(|_| RingError::RINGIDX)?;
                moved |= count > 0;
                self.server.received(buf.get(..count).unwrap_or_default());
            }
            while answered < BUDGET
                && let Some(message) = self.server.request().map_err(|_| RingError::PROTO)?
            {
                super::answer(store, self.connection, &mut self.server, &message);
                answered += 1;
            }
            while !self.server.outgoing().is_empty() {
                let count =
                    self.ring.write(self.server.outgoing()).map_err(|_| RingError::RINGIDX)?;
                if count == 0 {
                    break;
                }
                moved = true;
                self.server.sent(count);
            }
            notify |= moved;
            self.busy = answered >= BUDGET;
            if !moved || self.busy {
                return Ok(notify);
            }
        }
    }

    /// Whether the guest reads its answers.
    fn room(&self) -> bool {
        self.server.queued() < BACKLOG
    }
}
