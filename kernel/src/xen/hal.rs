//! The kernel as Xen's drivers see it: [`XenHal`] over grants, event channels and page frames.
// UNSAFETY: implements the unsafe seam of the drivers.
#![expect(unsafe_code, reason = "implements the drivers' unsafe seam")]

use core::sync::atomic::{AtomicUsize, Ordering};

use janus_front::dma::FrameSource;
use janus_front::hal::{GrantAccess, HalError, StillInUse, XenHal};
use janus_proto::addr::{DomId, Gpa, GrantRef, Port};
use janus_proto::grant::{Access, EndError};

use super::grant::{self, GrantError};
use crate::hypercall::event;
use crate::irq::evtchn;
use crate::mm::frames::FRAMES;

/// The one implementation.
#[derive(Clone, Copy, Debug)]
pub struct KernelHal;

/// For drivers that want a reference for good.
pub static HAL: KernelHal = KernelHal;

/// Pages given up because a peer would not let go.
static LEAKED: AtomicUsize = AtomicUsize::new(0);

/// Pages given up so far because a peer would not let go of them.
#[must_use]
pub fn leaked_pages() -> usize {
    LEAKED.load(Ordering::Relaxed)
}

// SAFETY: `GrantTable::end` answers `Ok` only after the entry is cleared with no use bit set, from when on
// Xen lets nobody map or copy the page through it.
unsafe impl XenHal for KernelHal {
    fn frames(&self) -> &'static dyn FrameSource {
        &FRAMES
    }
    unsafe fn grant(
        &self,
        peer: DomId,
        page: Gpa,
        access: GrantAccess,
    ) -> Result<GrantRef, HalError> {
        let access = match access {
            GrantAccess::ReadOnly => Access::ReadOnly,
            GrantAccess::ReadWrite => Access::ReadWrite,
        };
        // SAFETY: the caller's promise is the same.
        unsafe { grant::grant(peer, page, access) }.map_err(|error| {
            if error != GrantError::Full {
                log::error!("{error}");
            }
            HalError::NoGrants
        })
    }
    fn end_grant(&self, reference: GrantRef) -> Result<(), StillInUse> {
        match grant::end(reference) {
            Ok(()) => Ok(()),
            Err(EndError::InUse) => Err(StillInUse),
            Err(EndError::NotGranted) => {
                log::error!("grant {reference} was ended twice");
                Ok(())
            }
        }
    }
    fn allocate_port(&self, peer: DomId) -> Result<Port, HalError> {
        event::alloc_unbound(peer).map_err(|error| {
            log::error!("no event channel to domain {peer}: {error}");
            HalError::NoPort
        })
    }
    fn notify(&self, port: Port) {
        evtchn::notify(port);
    }
    fn close_port(&self, port: Port) {
        evtchn::mask(port);
        if let Err(error) = event::close(port) {
            log::warn!("event channel {port} cannot be closed: {error}");
        }
    }
    fn report_leak(&self, peer: DomId, pages: usize) {
        LEAKED.fetch_add(pages, Ordering::Relaxed);
        log::warn!("{pages} pages stay out of use: domain {peer} does not let go of them");
    }
}
