//! What a Xen driver needs from the kernel: pages shared by grant, and event channels.
//!
//! Small on purpose: the grant table's layout and the hypercalls stay with the kernel. The safe way to use
//! grants is [`crate::xen::grants`]; a fake that punishes is [`crate::fake`].
// UNSAFETY: declares a trait that others implement and call unsafely; contains no unsafe block.
#![expect(unsafe_code, reason = "the contract between drivers and kernel about shared pages")]

use core::fmt;

use janus_proto::addr::{DomId, Gpa, GrantRef, Port};

use crate::dma::FrameSource;

/// What the peer may do with a granted page (`grant_table.h`, `GTF_readonly`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantAccess {
    /// Read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

/// The peer still has a granted page mapped, or is copying from or to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StillInUse;

/// Why the platform could not provide something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalError {
    /// The grant table is full and cannot grow.
    NoGrants,
    /// No event channel is free, or the peer does not exist.
    NoPort,
    /// No page frame is free.
    NoMemory,
}

impl fmt::Display for HalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoGrants => "the grant table is full",
            Self::NoPort => "no event channel to the peer",
            Self::NoMemory => "out of memory for shared pages",
        })
    }
}

impl core::error::Error for HalError {}

/// The kernel, as Xen drivers see it.
///
/// # Implementation safety
/// After [`Self::end_grant`] answered `Ok`, the peer can reach the page no more.
pub unsafe trait XenHal: Send + Sync {
    /// Where pages to share come from.
    fn frames(&self) -> &'static dyn FrameSource;
    /// Lets `peer` use the page at `page` (page-aligned) until [`Self::end_grant`].
    ///
    /// # Errors
    /// [`HalError::NoGrants`].
    ///
    /// # Safety
    /// Until `end_grant` answers `Ok`, the page is not freed, and with [`GrantAccess::ReadWrite`] no
    /// reference to its bytes exists other than as atomics.
    unsafe fn grant(
        &self,
        peer: DomId,
        page: Gpa,
        access: GrantAccess,
    ) -> Result<GrantRef, HalError>;
    /// Takes the page back from the peer and frees the reference.
    ///
    /// # Errors
    /// The peer is using it; nothing changed, and the reference stays taken.
    fn end_grant(&self, grant: GrantRef) -> Result<(), StillInUse>;
    /// Allocates a port that `peer` may bind (`EVTCHNOP_alloc_unbound`).
    ///
    /// # Errors
    /// [`HalError::NoPort`].
    fn allocate_port(&self, peer: DomId) -> Result<Port, HalError>;
    /// Sends an event (`EVTCHNOP_send`); nothing happens if the peer has not bound the port.
    fn notify(&self, port: Port);
    /// Closes a port (`EVTCHNOP_close`).
    fn close_port(&self, port: Port);
    /// Learns that pages are given up for good, because `peer` would not let go of them.
    fn report_leak(&self, peer: DomId, pages: usize);
}
