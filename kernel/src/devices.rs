//! The devices that are here now. Drivers' glue puts them in and takes them out; services look them up.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use core::task::Poll;

use crate::block::Block;
use crate::net::Net;
use crate::sync::{IrqMutex, Notify};

static BLOCKS: IrqMutex<Vec<Arc<Block>>> = IrqMutex::new(Vec::new());
static NETS: IrqMutex<Vec<Arc<Net>>> = IrqMutex::new(Vec::new());

/// Counts changes, so that a waiter sees one that happened before it waited.
static CHANGES: AtomicU64 = AtomicU64::new(0);
static CHANGED: Notify = Notify::new();

fn note_change() {
    CHANGES.fetch_add(1, Ordering::Release);
    CHANGED.notify_all();
}

/// The disks, in the order in which they were found.
#[must_use]
pub fn blocks() -> Vec<Arc<Block>> {
    BLOCKS.lock().clone()
}

/// The disk of this name.
#[must_use]
pub fn block(name: &str) -> Option<Arc<Block>> {
    BLOCKS.lock().iter().find(|block| block.name() == name).cloned()
}

/// Registers a disk.
pub fn add_block(block: Arc<Block>) {
    BLOCKS.lock().push(block);
    note_change();
}

/// Takes a disk out and ends its requests; whoever still holds it gets errors from it.
pub fn remove_block(block: &Arc<Block>) {
    BLOCKS.lock().retain(|known| !Arc::ptr_eq(known, block));
    block.detach();
    note_change();
}

/// The network interfaces, in the order in which they were found.
#[must_use]
pub fn nets() -> Vec<Arc<Net>> {
    NETS.lock().clone()
}

/// The network interface of this name.
#[must_use]
pub fn net(name: &str) -> Option<Arc<Net>> {
    NETS.lock().iter().find(|net| net.name() == name).cloned()
}

/// Registers a network interface.
pub fn add_net(net: Arc<Net>) {
    NETS.lock().push(net);
    note_change();
}

/// Takes a network interface out and ends its sockets.
pub fn remove_net(net: &Arc<Net>) {
    NETS.lock().retain(|known| !Arc::ptr_eq(known, net));
    net.detach();
    note_change();
}

/// How many changes there have been.
#[must_use]
pub fn generation() -> u64 {
    CHANGES.load(Ordering::Acquire)
}

/// Searches for devices that are under way.
static SEARCHES: AtomicUsize = AtomicUsize::new(0);

/// A search for devices (a bus being enumerated, a handshake with a backend), over when this is dropped.
///
/// Start it before the executor runs the image's main function, and hold it until every device that was there at boot
/// is registered, or has failed: [`settled`] waits for it.
#[derive(Debug)]
pub struct Search(());

impl Search {
    /// Starts a search.
    #[must_use]
    pub fn start() -> Self {
        SEARCHES.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        SEARCHES.fetch_sub(1, Ordering::Release);
        note_change();
    }
}

/// Waits until the devices that were there at boot have been found.
pub async fn settled() {
    loop {
        let seen = generation();
        if SEARCHES.load(Ordering::Acquire) == 0 {
            return;
        }
        changed_since(seen).await;
    }
}

/// Waits until [`generation`] differs from `seen`.
pub async fn changed_since(seen: u64) {
    while generation() == seen {
        let mut signal = pin!(CHANGED.notified());
        poll_fn(|cx| {
            // First into the queue of waiters, then the look: a change on another CPU is not missed.
            let signalled = signal.as_mut().poll(cx);
            if generation() == seen { signalled } else { Poll::Ready(()) }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{block_on, spawn, yield_now};

    #[test]
    fn settled_waits_for_every_search() {
        let (first, second) = (Search::start(), Search::start());
        let waiting = spawn("waiting", settled());
        let order = block_on(async move {
            drop(first);
            yield_now().await;
            let early = waiting.is_finished();
            drop(second);
            waiting.await;
            early
        });
        assert!(!order, "one search was still under way");
    }
}
