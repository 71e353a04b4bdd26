//! Event channels in their 2-level form: Xen's interrupts.
//!
//! The bits and the rules for them are [`janus_proto::evtchn`]'s, over the page of
//! [`crate::xen::shared_info`]; ports come by [`crate::hypercall::event`]. Handlers are those of [`super::register`] for [`Source::Event`].

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use janus_proto::abi::xen::{Errno, Virq};
use janus_proto::addr::{DomId, Port};

use super::{Handler, IrqError, Registration, Source};
use crate::hypercall::event;
use crate::percpu::{self, CpuId, PerCpu};
use crate::xen::shared_info::{EVENT_WORDS, SHARED_INFO};

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

/// Ports that interrupt another CPU than the first one. All ports share the pending bits, so each CPU must leave those
/// of others alone: it would take the interrupt from them.
static ELSEWHERE: [AtomicU64; EVENT_WORDS] = [const { AtomicU64::new(0) }; EVENT_WORDS];

/// Word and bit of a port in the bitmaps.
fn place(port: Port) -> (usize, u64) {
    let index = usize::try_from(port.0 / u64::BITS).unwrap_or(usize::MAX);
    (index, 1 << (port.0 % u64::BITS))
}

/// The ports of word `index` that interrupt `cpu`.
fn mine(cpu: &PerCpu, index: usize) -> u64 {
    if cpu.id() == CpuId(0) {
        return ELSEWHERE.get(index).map_or(0, |word| !word.load(Ordering::Relaxed));
    }
    let ports = cpu.ports.iter().map(|port| Port(port.load(Ordering::Relaxed)));
    ports
        .filter(|port| port.0 != 0)
        .map(place)
        .filter(|(word, _)| *word == index)
        .fold(0, |bits, (_, bit)| bits | bit)
}

/// Handles everything that is pending for this CPU; called by the entry code with events masked.
pub fn upcall() {
    let (cpu, vcpu) = (percpu::current(), percpu::vcpu());
    loop {
        let handle = |port| super::dispatch(Source::Event(port));
        SHARED_INFO.ports().drain_some(vcpu.bits(), |index| mine(cpu, index), handle);
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

/// Which of a CPU's own event channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Own {
    /// Its timer's.
    Timer = 0,
    /// The one by which others interrupt it.
    Wake = 1,
}

/// Opens one of the event channels that every CPU has; both only end waits. They stay open for good.
///
/// # Errors
/// See [`EventError`].
pub(crate) fn open_own(cpu: &PerCpu, own: Own) -> Result<(), EventError> {
    let CpuId(vcpu) = cpu.id();
    let (port, name) = match own {
        Own::Timer => (event::bind_virq(Virq::TIMER, vcpu)?, "timer"),
        Own::Wake => (event::bind_ipi(vcpu)?, "wake-up"),
    };
    if let Some(slot) = cpu.ports.get(own as usize) {
        slot.store(port.0, Ordering::Relaxed);
    }
    let (word, bit) = place(port);
    if vcpu != 0
        && let Some(word) = ELSEWHERE.get(word)
    {
        word.fetch_or(bit, Ordering::Relaxed);
    }
    EventChannel::new(port, true, name, Box::new(|| {})).map(|channel| {
        channel.keep();
    })
}

/// Interrupts a CPU that has [`Own::Wake`].
pub(crate) fn wake(cpu: &PerCpu) {
    let port = cpu.ports.get(Own::Wake as usize).map_or(0, |port| port.load(Ordering::Relaxed));
    if port != 0 {
        notify(Port(port));
    }
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
