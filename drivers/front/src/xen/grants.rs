//! Memory that is granted to a peer, as values: what is granted cannot be freed or touched.
//!
//! A page whose grant cannot be ended is leaked on purpose, with its reference, and reported: the
//! peer may go on writing it (`xen/include/public/grant_table.h`, "Invalidating an entry").
// UNSAFETY: `XenHal::grant` asks for a promise about the page's life, which these types keep.
#![expect(unsafe_code, reason = "ties each grant to the ownership of its page")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;
use core::ops::Deref;

use janus_proto::addr::{DomId, Gpa, GrantRef, PAGE_SIZE, Port};
use janus_proto::sync::AtomicU32;

use crate::dma::{DmaBuf, SharedFrames};
use crate::hal::{GrantAccess, HalError, StillInUse, XenHal};

/// The references of consecutive pages; a single one costs no allocation.
enum Refs {
    One([GrantRef; 1]),
    Many(Vec<GrantRef>),
}

/// Not all pages could be granted.
struct Refused {
    error: HalError,
    /// The peer already uses some of them.
    stuck: bool,
}

impl Refs {
    /// Grants `pages` pages from `start` on.
    ///
    /// # Safety
    /// As of [`XenHal::grant`], for each page.
    unsafe fn new(
        hal: &'static dyn XenHal,
        peer: DomId,
        start: Gpa,
        pages: usize,
        access: GrantAccess,
    ) -> Result<Self, Refused> {
        if pages == 1 {
            // SAFETY: the caller's promise.
            return match unsafe { hal.grant(peer, start, access) } {
                Ok(grant) => Ok(Self::One([grant])),
                Err(error) => Err(Refused { error, stuck: false }),
            };
        }
        let mut many = Vec::with_capacity(pages);
        for index in 0..pages {
            let page = Gpa(start.0 + (index * PAGE_SIZE) as u64);
            // SAFETY: the caller's promise.
            match unsafe { hal.grant(peer, page, access) } {
                Ok(grant) => many.push(grant),
                Err(error) => {
                    // The peer was never told of these, but may have guessed.
                    let stuck = Self::Many(many).end(hal) != 0;
                    return Err(Refused { error, stuck });
                }
            }
        }
        Ok(Self::Many(many))
    }

    fn as_slice(&self) -> &[GrantRef] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }

    /// Ends every grant; answers how many the peer still uses.
    fn end(&self, hal: &'static dyn XenHal) -> usize {
        self.as_slice().iter().filter(|&&grant| hal.end_grant(grant) == Err(StillInUse)).count()
    }
}

/// A buffer that a peer may use; nobody here can see its bytes until it comes back.
pub struct GrantedBuf {
    /// Taken out exactly once: by `reclaim`, or by `drop`.
    buf: ManuallyDrop<DmaBuf>,
    refs: Refs,
    peer: DomId,
    hal: &'static dyn XenHal,
}

impl GrantedBuf {
    /// Grants the pages that hold `buf[..len]`.
    ///
    /// # Errors
    /// `len` is 0 or beyond the buffer, or the grant table is full. The buffer comes back, unless the
    /// peer managed to use some of it already.
    pub fn new(
        hal: &'static dyn XenHal,
        peer: DomId,
        buf: DmaBuf,
        len: usize,
        access: GrantAccess,
    ) -> Result<Self, (HalError, Option<DmaBuf>)> {
        let pages = len.div_ceil(PAGE_SIZE);
        if pages == 0 || pages > buf.pages() {
            return Err((HalError::NoMemory, Some(buf)));
        }
        // SAFETY: the buffer is owned by the new value, which hides its bytes and does not free it
        // before every grant has ended. After a partial failure it is leaked if some are stuck.
        match unsafe { Refs::new(hal, peer, buf.guest_address(), pages, access) } {
            Ok(refs) => Ok(Self { buf: ManuallyDrop::new(buf), refs, peer, hal }),
            Err(Refused { error, stuck: false }) => Err((error, Some(buf))),
            Err(Refused { error, stuck: true }) => {
                hal.report_leak(peer, buf.pages());
                buf.leak();
                Err((error, None))
            }
        }
    }

    /// The reference of each page.
    #[must_use]
    pub fn refs(&self) -> &[GrantRef] {
        self.refs.as_slice()
    }

    /// Ends the grants and gives the buffer back; `None` if the peer still uses it: then it is leaked.
    #[must_use]
    pub fn reclaim(self) -> Option<DmaBuf> {
        let mut this = ManuallyDrop::new(self);
        this.take_back()
    }

    fn take_back(&mut self) -> Option<DmaBuf> {
        // SAFETY: called once: by `reclaim`, which forgets `self`, or by `drop`.
        let buf = unsafe { ManuallyDrop::take(&mut self.buf) };
        let refs = core::mem::replace(&mut self.refs, Refs::Many(Vec::new()));
        if refs.end(self.hal) == 0 {
            return Some(buf);
        }
        self.hal.report_leak(self.peer, buf.pages());
        buf.leak();
        None
    }
}

impl Drop for GrantedBuf {
    fn drop(&mut self) {
        drop(self.take_back());
    }
}

impl fmt::Debug for GrantedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrantedBuf({:#x}, {:?})", self.buf.guest_address().0, self.refs())
    }
}

/// Pages that both ends use at any time: a ring, or a page that stays granted (persistent grants).
pub struct GrantedFrames {
    /// Taken out exactly once, by `drop`.
    frames: ManuallyDrop<SharedFrames>,
    refs: Refs,
    peer: DomId,
    hal: &'static dyn XenHal,
}

impl GrantedFrames {
    /// Allocates `pages` zeroed pages and grants them for reading and writing.
    ///
    /// # Errors
    /// Out of memory or of grants.
    pub fn new(hal: &'static dyn XenHal, peer: DomId, pages: usize) -> Result<Self, HalError> {
        let frames = SharedFrames::new(hal.frames(), pages).ok_or(HalError::NoMemory)?;
        // SAFETY: the pages are owned by the new value, are seen as atomics only, and are not freed
        // before every grant has ended (leaked if some are stuck).
        match unsafe { Refs::new(hal, peer, frames.guest_address(), pages, GrantAccess::ReadWrite) }
        {
            Ok(refs) => Ok(Self { frames: ManuallyDrop::new(frames), refs, peer, hal }),
            Err(Refused { error, stuck }) => {
                if stuck {
                    hal.report_leak(peer, frames.pages());
                    frames.leak();
                }
                Err(error)
            }
        }
    }

    /// The reference of each page.
    #[must_use]
    pub fn refs(&self) -> &[GrantRef] {
        self.refs.as_slice()
    }

    /// The pages.
    #[must_use]
    pub fn frames(&self) -> &SharedFrames {
        &self.frames
    }
}

impl Deref for GrantedFrames {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        &self.frames
    }
}

impl Drop for GrantedFrames {
    fn drop(&mut self) {
        // SAFETY: dropped once, and nobody else takes it.
        let frames = unsafe { ManuallyDrop::take(&mut self.frames) };
        if self.refs.end(self.hal) != 0 {
            self.hal.report_leak(self.peer, frames.pages());
            frames.leak();
        }
    }
}

impl fmt::Debug for GrantedFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrantedFrames({:?}, {:?})", *self.frames, self.refs())
    }
}

/// An event channel to a peer; closed when dropped.
pub struct EventChannel {
    hal: &'static dyn XenHal,
    port: Port,
}

impl EventChannel {
    /// Allocates a port that `peer` may bind.
    ///
    /// # Errors
    /// [`HalError::NoPort`].
    pub fn new(hal: &'static dyn XenHal, peer: DomId) -> Result<Self, HalError> {
        Ok(Self { hal, port: hal.allocate_port(peer)? })
    }
    /// Its number, for xenstore and for the kernel's handlers.
    #[must_use]
    pub fn port(&self) -> Port {
        self.port
    }
    /// Sends an event.
    pub fn notify(&self) {
        self.hal.notify(self.port);
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        self.hal.close_port(self.port);
    }
}

impl fmt::Debug for EventChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EventChannel({})", self.port)
    }
}

/// What a driver left behind that its backend may still use: buffers, rings, ports.
///
/// A driver that is dropped puts its memory here; [`Self::empty`], called when the backend has let go, ends the
/// grants. Ended any sooner they would be found in use, and leak.
#[derive(Clone, Default)]
pub struct Grave(Arc<spin::Mutex<Vec<Box<dyn Send>>>>);

impl Grave {
    /// Keeps `remains` until the grave is emptied.
    pub fn put(&self, remains: impl Send + 'static) {
        self.0.lock().push(Box::new(remains));
    }
    /// Ends the grants of everything in it; what the peer still uses is leaked, and reported.
    pub fn empty(&self) {
        let remains = core::mem::take(&mut *self.0.lock());
        drop(remains);
    }
}

impl fmt::Debug for Grave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grave")
    }
}
