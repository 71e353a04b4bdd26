//! Event channels in their 2-level form: Xen's interrupts.
//!
//! The bits and the rules for them are [`janus_proto::evtchn`]'s, over the page of
//! [`crate::xen::shared_info`]; ports come by [`crate::hypercall::event`]. Handlers are those of [`super::register`] for [`Source::Event`].

use core::sync::atomic::{Ordering, compiler_fence};

use janus_proto::abi::xen::{Errno, Virq};
use janus_proto::addr::{DomId, Port};

use super::{Handler, IrqError, Registration, Source};
use crate::hypercall::event;
use crate::xen::shared_info::{SHARED_INFO, boot_vcpu};

/// Why there is no event channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventError {
    /// Xen refused.
    Xen(Errno),
    /// The handler could not be installed.
    Irq(IrqError),
}

impl core::fmt::Display for EventError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Xen(error) => write!(f, "event channel: {error}"),
            Self::Irq(error) => error.fmt(f),
        }
    }
}

impl From<Errno> for EventError {
    fn from(error: Errno) -> Self {
        Self::Xen(error)
    }
}

impl From<IrqError> for EventError {
    fn from(error: IrqError) -> Self {
        Self::Irq(error)
    }
}

/// Masks every port: what nobody handles must not interrupt. Called once, before events are let in.
pub(crate) fn init() {
    SHARED_INFO.ports().mask_all();
}

/// Handles everything that is pending; called by the entry code with events masked.
pub fn upcall() {
    let vcpu = boot_vcpu();
    loop {
        SHARED_INFO.ports().drain(vcpu.bits(), |port| super::dispatch(Source::Event(port)));
        if vcpu.evtchn_upcall_pending.load(Ordering::Relaxed) == 0 {
            break;
        }
    }
}

/// Keeps a port from interrupting; what comes meanwhile stays pending.
pub fn mask(port: Port) {
    SHARED_INFO.ports().mask(port);
}

/// Lets a port interrupt, also for what came while it was masked.
pub fn unmask(port: Port) {
    if SHARED_INFO.ports().unmask(port)
        && let Err(error) = event::unmask(port)
    {
        log::warn!("event channel {port} cannot be unmasked: {error}");
    }
}

/// Notifies the other side of a port. Nobody there any more is not an error here: the state of the
/// device says so.
#[inline]
pub fn notify(port: Port) {
    // What was written to shared memory is written before the hypercall, as far as the compiler goes.
    compiler_fence(Ordering::SeqCst);
    let _ = event::send(port);
}

/// An open port with a handler; dropping it masks and closes the port.
#[derive(Debug)]
pub struct EventChannel {
    port: Port,
    /// Only ports that Xen gave us are ours to close; those of start_info stay.
    owned: bool,
    _registration: Registration,
}

impl EventChannel {
    fn new(
        port: Port,
        owned: bool,
        name: &'static str,
        handler: Handler,
    ) -> Result<Self, EventError> {
        match super::register(Source::Event(port), name, handler) {
            Ok(registration) => {
                unmask(port);
                Ok(Self { port, owned, _registration: registration })
            }
            Err(error) => {
                if owned {
                    let _ = event::close(port);
                }
                Err(error.into())
            }
        }
    }
    /// The port.
    #[must_use]
    pub fn port(&self) -> Port {
        self.port
    }
    /// Notifies the other side.
    #[inline]
    pub fn notify(&self) {
        notify(self.port);
    }
    /// Keeps the port open and the handler installed for good; answers the port.
    pub fn keep(self) -> Port {
        let port = self.port;
        core::mem::forget(self);
        port
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        mask(self.port);
        if self.owned {
            // Fails only if it is closed already.
            let _ = event::close(self.port);
        }
    }
}

/// A new port for `remote` to bind to: what a frontend advertises to its backend.
///
/// # Errors
/// See [`EventError`].
pub fn alloc_unbound(
    remote: DomId,
    name: &'static str,
    handler: Handler,
) -> Result<EventChannel, EventError> {
    EventChannel::new(event::alloc_unbound(remote)?, true, name, handler)
}

/// A port that the domain builder opened: console, xenstore.
///
/// # Errors
/// See [`EventError`].
pub fn attach(
    port: Port,
    name: &'static str,
    handler: Handler,
) -> Result<EventChannel, EventError> {
    EventChannel::new(port, false, name, handler)
}

/// A virtual interrupt of CPU `vcpu`.
///
/// # Errors
/// See [`EventError`].
pub fn bind_virq(
    virq: Virq,
    vcpu: u32,
    name: &'static str,
    handler: Handler,
) -> Result<EventChannel, EventError> {
    EventChannel::new(event::bind_virq(virq, vcpu)?, true, name, handler)
}

/// A port by which this domain's CPUs interrupt `vcpu`.
///
/// # Errors
/// See [`EventError`].
pub fn bind_ipi(
    vcpu: u32,
    name: &'static str,
    handler: Handler,
) -> Result<EventChannel, EventError> {
    EventChannel::new(event::bind_ipi(vcpu)?, true, name, handler)
}
