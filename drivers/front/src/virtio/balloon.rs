//! virtio traditional memory balloon (virtio 1.2, 5.5): gives pages to the host and takes them back.

use alloc::boxed::Box;
use alloc::vec::Vec;

use janus_proto::abi::virtio::balloon::{
    Config, F_MUST_TELL_HOST, PFN_SHIFT, QUEUE_DEFLATE, QUEUE_INFLATE,
};
use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::sync::Ordering;
use janus_proto::virtqueue::Segment;

use super::{
    COMMON_FEATURES, InitError, Link, NEEDS_RESET, Queue, RingMemory, Transport, make_queue,
};
use crate::class::{BalloonDevice, PeerError};
use crate::dma::{DmaBuf, FrameSource};

/// Page numbers in one request: a page of them.
const BATCH: usize = PAGE_SIZE / 4;
/// Entries of each queue; one request is under way at a time.
const QUEUE_SIZE: u16 = 2;

/// What is under way.
#[derive(Debug)]
enum Request {
    None,
    /// These pages are being given up.
    Inflate(Vec<DmaBuf>),
    /// These pages are ours again once the host has heard of it.
    Deflate(Vec<DmaBuf>),
}

/// A virtio balloon.
#[derive(Debug)]
pub struct VirtioBalloon {
    link: Link,
    frames: &'static dyn FrameSource,
    inflate: Queue,
    deflate: Queue,
    /// The page numbers of the request under way.
    numbers: RingMemory,
    held: Vec<DmaBuf>,
    request: Request,
    dead: Option<PeerError>,
    /// [`page_number`]; tests have memory beyond its reach.
    pub(super) number: fn(Gpa) -> Option<u32>,
}

/// The balloon's number of a page; none beyond 16 TiB, where 32 bits end.
fn page_number(page: Gpa) -> Option<u32> {
    u32::try_from(page.0 >> PFN_SHIFT).ok()
}

impl VirtioBalloon {
    /// Sets the device up.
    ///
    /// # Errors
    /// See [`InitError`].
    pub fn new(
        mut transport: Box<dyn Transport>,
        frames: &'static dyn FrameSource,
    ) -> Result<Self, InitError> {
        let features = transport.negotiate(COMMON_FEATURES | F_MUST_TELL_HOST)?;
        let mut queue =
            |index| make_queue(transport.as_mut(), frames, index, QUEUE_SIZE, 0, features);
        let (mut inflate, mut deflate) = (queue(QUEUE_INFLATE)?, queue(QUEUE_DEFLATE)?);
        let numbers = RingMemory::new(frames, PAGE_SIZE)?;
        transport.start();
        inflate.arm();
        deflate.arm();
        Ok(Self {
            link: Link::new(transport),
            frames,
            inflate,
            deflate,
            numbers,
            held: Vec::new(),
            request: Request::None,
            dead: None,
            number: page_number,
        })
    }

    /// Whether a request is under way; its end comes with an interrupt.
    #[must_use]
    pub fn busy(&self) -> bool {
        !matches!(self.request, Request::None)
    }

    fn give_up(&mut self, error: PeerError) -> PeerError {
        if self.dead.is_none() {
            log::error!("virtio-balloon: {error}");
            // Pages in the balloon stay there: nobody knows what the host believes of them.
            if self.link.transport.reset().is_err() {
                log::error!("virtio-balloon: the device did not finish its reset");
            }
            self.dead = Some(error);
        }
        error
    }

    /// Ends the request under way if the host has answered; answers whether none is under way any more.
    fn reap(&mut self) -> Result<bool, PeerError> {
        let queue = match self.request {
            Request::None => return Ok(true),
            Request::Inflate(_) => &mut self.inflate,
            Request::Deflate(_) => &mut self.deflate,
        };
        match queue.pop() {
            Ok(None) if !queue.arm() => return Ok(false),
            Ok(None) => return self.reap(),
            Ok(Some(_)) => {}
            Err(error) => return Err(self.give_up(PeerError(error.message()))),
        }
        queue.arm();
        match core::mem::replace(&mut self.request, Request::None) {
            Request::Inflate(mut pages) => self.held.append(&mut pages),
            Request::Deflate(pages) => drop(pages),
            Request::None => {}
        }
        let actual = u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        self.link.transport.config_write32(core::mem::offset_of!(Config, actual), actual);
        Ok(true)
    }

    /// Tells the host of `pages` through the queue of `index`.
    fn tell(&mut self, index: u16, pages: &[DmaBuf]) -> Result<(), PeerError> {
        for (slot, page) in self.numbers.iter().zip(pages) {
            // Only pages that have a number were taken.
            let Some(number) = (self.number)(page.guest_address()) else { continue };
            slot.store(number, Ordering::Relaxed);
        }
        let len = u32::try_from(pages.len().min(BATCH) * 4).unwrap_or(0);
        let segment = Segment { address: self.numbers.guest_address(), len, writable: false };
        let queue = if index == QUEUE_INFLATE { &mut self.inflate } else { &mut self.deflate };
        match queue.add(&[segment]) {
            Ok(_) => {
                if queue.publish() {
                    self.link.transport.notify(index);
                }
                Ok(())
            }
            Err(error) => Err(self.give_up(PeerError(error.message()))),
        }
    }
}

impl BalloonDevice for VirtioBalloon {
    fn target_pages(&mut self) -> u64 {
        if self.dead.is_some() {
            return self.held_pages();
        }
        u64::from(self.link.transport.config_read32(core::mem::offset_of!(Config, num_pages)))
    }

    fn held_pages(&self) -> u64 {
        let moving = if let Request::Inflate(pages) = &self.request { pages.len() } else { 0 };
        (self.held.len() + moving) as u64
    }

    fn step(&mut self, limit: usize) -> Result<usize, PeerError> {
        if let Some(error) = self.dead {
            return Err(error);
        }
        if self.link.take_config_changed() && self.link.failed() {
            return Err(self.give_up(NEEDS_RESET));
        }
        if !self.reap()? {
            return Ok(0);
        }
        let (target, held) = (self.target_pages(), self.held_pages());
        let limit = usize::try_from(target.abs_diff(held)).unwrap_or(limit).min(limit).min(BATCH);
        if limit == 0 {
            return Ok(0);
        }
        if target > held {
            let mut pages = Vec::with_capacity(limit);
            while pages.len() < limit
                && let Some(page) = DmaBuf::new(self.frames, PAGE_SIZE)
                && (self.number)(page.guest_address()).is_some()
            {
                pages.push(page);
            }
            if pages.is_empty() {
                return Ok(0);
            }
            self.tell(QUEUE_INFLATE, &pages)?;
            let moved = pages.len();
            self.request = Request::Inflate(pages);
            Ok(moved)
        } else {
            let pages = self.held.split_off(self.held.len() - limit.min(self.held.len()));
            self.tell(QUEUE_DEFLATE, &pages)?;
            let moved = pages.len();
            self.request = Request::Deflate(pages);
            Ok(moved)
        }
    }
}

impl Drop for VirtioBalloon {
    fn drop(&mut self) {
        if self.dead.is_none() && self.link.transport.reset().is_err() {
            log::error!(
                "virtio-balloon: the device did not finish its reset; its memory is leaked"
            );
            self.inflate
                .memories_mut()
                .chain(self.deflate.memories_mut())
                .for_each(RingMemory::leak);
            self.numbers.leak();
        }
        // A reset ends the balloon (virtio 1.2, 5.5.6.1): the pages are the guest's again. If the device
        // was given up before, they stay with the host.
        if self.dead.is_some() {
            self.held.drain(..).for_each(DmaBuf::leak);
        }
    }
}
