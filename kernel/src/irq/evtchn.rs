//! Event channels in their 2-level form: Xen's interrupts.
//!
//! A pending bit for each port, a summary word for each CPU, a mask bit for each port
//! ([`crate::xen::shared_info`]). The upcall takes the summary, clears each pending bit before its
//! handler runs (an event that comes during the handler is then seen again) and looks again until
//! nothing is left. Handlers are those of [`super::register`] for [`Source::Event`].

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
    for word in &SHARED_INFO.evtchn_mask {
        word.store(u64::MAX, Ordering::Relaxed);
    }
}

/// Handles everything that is pending; called by the entry code with events masked.
pub fn upcall() {
    let vcpu = boot_vcpu();
    loop {
        vcpu.evtchn_upcall_pending.store(0, Ordering::Relaxed);
        // A full barrier on x86: the flag is clear before the summary is taken, so an event after that
        // sets it again.
        let mut summary = vcpu.evtchn_pending_sel.swap(0, Ordering::SeqCst);
        if summary == 0 {
            break;
        }
        while summary != 0 {
            let word = summary.trailing_zeros();
            summary &= summary - 1;
            scan(word);
        }
    }
}

/// Handles the ports of one word of the bitmap.
fn scan(word: u32) {
    let index = word as usize;
    let (Some(pending), Some(mask)) =
        (SHARED_INFO.evtchn_pending.get(index), SHARED_INFO.evtchn_mask.get(index))
    else {
        return;
    };
    loop {
        let ready = pending.load(Ordering::Acquire) & !mask.load(Ordering::Relaxed);
        if ready == 0 {
            return;
        }
        let bit = ready.trailing_zeros();
        pending.fetch_and(!(1 << bit), Ordering::SeqCst);
        super::dispatch(Source::Event(Port(word * u64::BITS + bit)));
    }
}

fn word_of(port: Port) -> Option<(usize, u64)> {
    let index = usize::try_from(port.0 / u64::BITS).ok()?;
    (index < SHARED_INFO.evtchn_mask.len()).then_some((index, 1 << (port.0 % u64::BITS)))
}

/// Keeps a port from interrupting; what comes meanwhile stays pending.
pub fn mask(port: Port) {
    if let Some((index, bit)) = word_of(port)
        && let Some(word) = SHARED_INFO.evtchn_mask.get(index)
    {
        word.fetch_or(bit, Ordering::SeqCst);
    }
}

/// Lets a port interrupt, also for what came while it was masked.
pub fn unmask(port: Port) {
    // By hypercall: Xen clears the mask bit and raises what is pending in one step.
    if let Err(error) = event::unmask(port) {
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
    fn new(port: Port, owned: bool, name: &'static str, handler: Handler) -> Result<Self, EventError> {
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
pub fn alloc_unbound(remote: DomId, name: &'static str, handler: Handler) -> Result<EventChannel, EventError> {
    EventChannel::new(event::alloc_unbound(remote)?, true, name, handler)
}

/// A port that the domain builder opened: console, xenstore.
///
/// # Errors
/// See [`EventError`].
pub fn attach(port: Port, name: &'static str, handler: Handler) -> Result<EventChannel, EventError> {
    EventChannel::new(port, false, name, handler)
}

/// A virtual interrupt of CPU `vcpu`.
///
/// # Errors
/// See [`EventError`].
pub fn bind_virq(virq: Virq, vcpu: u32, name: &'static str, handler: Handler) -> Result<EventChannel, EventError> {
    EventChannel::new(event::bind_virq(virq, vcpu)?, true, name, handler)
}

/// A port by which this domain's CPUs interrupt `vcpu`.
///
/// # Errors
/// See [`EventError`].
pub fn bind_ipi(vcpu: u32, name: &'static str, handler: Handler) -> Result<EventChannel, EventError> {
    EventChannel::new(event::bind_ipi(vcpu)?, true, name, handler)
}
