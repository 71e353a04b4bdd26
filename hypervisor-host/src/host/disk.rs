//! Disks of a running guest: one blkback for each queue, served where the guest's event arrives.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::guest::{Guest, Notify as _};
use crate::blkback::{self, Blkback, BlkbackFeatures};
use crate::storage::{BlockBackend, SharedDisk};
use crate::xenbus::{Driver, Figures, NodeList};
use janus_proto::xenbus::Handshake;

/// How a disk is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// What is offered.
    pub features: BlkbackFeatures,
    /// Serves requests on a thread of the queue's own: for images that are slow (direct I/O).
    pub worker: bool,
}

struct Queue<G: Guest> {
    back: Mutex<Blkback<G::Grants, SharedDisk>>,
    port: OnceLock<G::Port>,
}

impl<G: Guest> Queue<G> {
    fn serve(&self) {
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        // A frontend that broke its ring is not served any more; it gets the ring back when it closes.
        let notify = back.serve().unwrap_or(false);
        drop(back);
        if notify && let Some(port) = self.port.get() {
            port.notify();
        }
    }
}

/// The disk's part of a device.
pub(super) struct DiskDriver<G: Guest> {
    guest: G,
    image: SharedDisk,
    options: DiskOptions,
    queues: Vec<Arc<Queue<G>>>,
    /// What went through queues that are gone.
    past: Figures,
}

impl<G: Guest> DiskDriver<G> {
    pub(super) fn new(guest: G, image: Box<dyn BlockBackend + Send>, options: DiskOptions) -> Self {
        let (queues, past) = (Vec::new(), Figures::default());
        Self { guest, image: SharedDisk::new(image), options, queues, past }
    }

    fn open(&self, frontend: &blkback::Frontend) -> Result<Arc<Queue<G>>, String> {
        let (grants, image) = (self.guest.grants(), self.image.clone());
        let back = Blkback::connect(grants, image, self.options.features, frontend)
            .map_err(|(error, _)| error.to_string())?;
        let queue = Arc::new(Queue { back: Mutex::new(back), port: OnceLock::new() });
        let weak = Arc::downgrade(&queue);
        let serve = move || {
            if let Some(queue) = weak.upgrade() {
                queue.serve();
            }
        };
        let handler: crate::pv::events::Handler = if self.options.worker {
            let wake = worker(serve).map_err(|error| error.to_string())?;
            // Full: it will look at the ring anyway.
            Arc::new(move || match wake.try_send(()) {
                Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
            })
        } else {
            Arc::new(serve)
        };
        let port = self.guest.bind_interdomain(frontend.port, Arc::clone(&handler));
        let port = port.map_err(|error| format!("event channel {}: {error:?}", frontend.port))?;
        let _ = queue.port.set(port);
        // What the guest sent before the port was bound was not heard.
        handler();
        Ok(queue)
    }
}

/// A thread that runs `serve` whenever it is sent something, and ends with the sender.
fn worker(serve: impl Fn() + Send + 'static) -> std::io::Result<SyncSender<()>> {
    let (sender, receiver) = sync_channel(1);
    std::thread::Builder::new().name("disk".into()).spawn(move || {
        while receiver.recv().is_ok() {
            serve();
        }
    })?;
    Ok(sender)
}

impl<G: Guest> Driver for DiskDriver<G> {
    const KIND: &'static str = "vbd";
    const HANDSHAKE: Handshake = Handshake::Initialised;
    fn offer(&self) -> NodeList {
        blkback::offer_nodes(self.options.features)
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        self.queues.clear();
        let queues = blkback::Frontend::read_all(read, self.options.features);
        for frontend in queues.map_err(|error| error.to_string())? {
            match self.open(&frontend) {
                Ok(queue) => self.queues.push(queue),
                Err(error) => {
                    self.queues.clear();
                    return Err(error);
                }
            }
        }
        Ok(blkback::detail_nodes(self.options.features, &self.image))
    }
    fn release(&mut self) {
        self.past = self.figures();
        self.queues.clear();
    }
    fn figures(&self) -> Figures {
        let mut sum = self.past;
        for queue in &self.queues {
            let counters = queue.back.lock().unwrap_or_else(PoisonError::into_inner).counters();
            sum += Figures {
                requests: counters.requests,
                errors: counters.errors,
                bytes_out: counters.bytes_written,
                bytes_in: counters.bytes_read,
                received: 0,
            };
        }
        sum
    }
}
