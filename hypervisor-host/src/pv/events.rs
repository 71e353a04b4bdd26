//! Event channels of one domain (`xen/include/public/event_channel.h`): the ports, and how an event reaches a CPU.
//!
//! All ports are behind one lock, held for a few stores each time. Delivery is two-level until the guest asks for the
//! FIFO queues of [`fifo`]. A port whose other end is the host has a handler, which runs on the thread that sends:
//! the virtual CPU's own, with no lock of ours held.

mod fifo;
pub(crate) mod op;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use janus_proto::abi::xen::event_channel::{ChannelStatus, EVTCHN_2L_NR_CHANNELS};
use janus_proto::abi::xen::{Errno, Virq};
use janus_proto::addr::{DomId, Mfn, Port};
use janus_proto::evtchn::PortBits;
use std::sync::atomic::AtomicU64;

use self::fifo::Fifo;
use super::vcpu_info::{Mode, VcpuShared};
use crate::machine::ram::Ram;

/// Ports of a domain, as `xl` limits it by default (`max_event_channels`).
pub const MAX_PORTS: u32 = 1024;
/// Ports in a bucket of Xen's (`EVTCHNS_PER_BUCKET`).
const BUCKET: usize = 64;
/// Virtual interrupts (`NR_VIRQS`).
const NR_VIRQS: u32 = 24;
/// Words of each bitmap in the shared info page.
const BITMAP_WORDS: usize = EVTCHN_2L_NR_CHANNELS as usize / 64;
/// Where `evtchn_pending` and `evtchn_mask` begin in the shared info page, in words.
const PENDING_WORD: usize = 2048 / 8;
const MASK_WORD: usize = 2560 / 8;
/// Priority of a port until it is changed (`EVTCHN_FIFO_PRIORITY_DEFAULT`).
const PRIORITY_DEFAULT: u8 = 7;

/// What the host does when a guest notifies: called on the sending CPU's own thread.
pub type Handler = Arc<dyn Fn() + Send + Sync>;

/// The other end of a port.
#[derive(Clone)]
enum Binding {
    /// Not in use.
    Free,
    /// Waits for this domain to bind.
    Unbound(DomId),
    /// The host.
    Host(Handler),
    /// Another port of this domain.
    Own(Port),
    /// A virtual interrupt.
    Virq(Virq),
    /// A CPU of this domain.
    Ipi,
}

#[derive(Clone)]
struct Channel {
    binding: Binding,
    vcpu: usize,
    /// Grows each time the port is closed, so that a host's handle of an earlier binding has no effect.
    generation: u64,
    queue: fifo::Place,
}

impl Channel {
    fn new() -> Self {
        Self { binding: Binding::Free, vcpu: 0, generation: 0, queue: fifo::Place::default() }
    }
}

struct Table {
    channels: Vec<Channel>,
    fifo: Option<Fifo>,
}

/// What a port is, for `EVTCHNOP_status` and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortStatus {
    /// What it is bound to.
    pub status: ChannelStatus,
    /// The CPU it signals.
    pub vcpu: u32,
    /// The remote domain, or the virtual interrupt.
    pub remote: u32,
    /// The remote port.
    pub remote_port: u32,
}

/// The event channels of a domain.
pub struct Events {
    own: DomId,
    ram: Arc<Ram>,
    shared_info: Mfn,
    vcpus: Arc<[VcpuShared]>,
    table: Mutex<Table>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.lock();
        let used = table.channels.iter().filter(|c| !matches!(c.binding, Binding::Free)).count();
        write!(f, "Events({used} of {} ports)", table.channels.len())
    }
}

impl Events {
    pub(crate) fn new(
        own: DomId,
        ram: Arc<Ram>,
        shared_info: Mfn,
        vcpus: Arc<[VcpuShared]>,
    ) -> Self {
        let table = Mutex::new(Table { channels: Vec::new(), fifo: None });
        Self { own, ram, shared_info, vcpus, table }
    }

    /// A panic while the lock was held leaves at worst a port half bound: events go on.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bits in the shared info page.
    fn bits(&self) -> Option<PortBits<'_>> {
        let page: &[AtomicU64] = self.ram.frame(self.shared_info)?;
        Some(PortBits {
            pending: page.get(PENDING_WORD..PENDING_WORD + BITMAP_WORDS)?,
            mask: page.get(MASK_WORD..MASK_WORD + BITMAP_WORDS)?,
        })
    }

    /// Gives the lowest free port this binding.
    fn allocate(
        &self,
        table: &mut Table,
        binding: Binding,
        vcpu: usize,
    ) -> Result<(Port, u64), Errno> {
        // Port 0 is never given out.
        let used = |channel: &Channel| !matches!(channel.binding, Binding::Free);
        if table.channels.is_empty() {
            table.channels.push(Channel::new());
        }
        let free = table.channels.iter().skip(1).position(|channel| !used(channel));
        let index = free.map_or(table.channels.len(), |index| index + 1);
        if index >= MAX_PORTS as usize {
            return Err(Errno::ENOSPC);
        }
        if index == table.channels.len() {
            table.channels.push(Channel::new());
        }
        let channel = table.channels.get_mut(index).ok_or(Errno::ENOSPC)?;
        (channel.binding, channel.vcpu) = (binding, vcpu);
        channel.queue.reset();
        let generation = channel.generation;
        let port = Port(u32::try_from(index).map_err(|_| Errno::ENOSPC)?);
        self.clear_pending(table, port);
        Ok((port, generation))
    }

    /// A port that `remote` may bind to: [`Self::bind_host`] if that is domain 0.
    ///
    /// # Errors
    /// No port left.
    pub fn alloc_unbound(&self, remote: DomId) -> Result<Port, Errno> {
        let remote = if remote == DomId::SELF { self.own } else { remote };
        let mut table = self.lock();
        self.allocate(&mut table, Binding::Unbound(remote), 0).map(|(port, _)| port)
    }

    /// Makes the host the other end of a port that waits for domain 0; answers what [`Self::notify`] wants.
    ///
    /// # Errors
    /// `EINVAL`: no such port, or it does not wait for the host.
    ///
    /// Notifications from before are lost: whoever binds looks at its ring once.
    pub(crate) fn bind_host(&self, port: Port, handler: Handler) -> Result<u64, Errno> {
        let mut table = self.lock();
        let channel = table.channels.get_mut(port.0 as usize).ok_or(Errno::EINVAL)?;
        if !matches!(channel.binding, Binding::Unbound(DomId(0))) {
            return Err(Errno::EINVAL);
        }
        channel.binding = Binding::Host(handler);
        Ok(channel.generation)
    }

    /// Gives up the host's end: the port waits for domain 0 again.
    pub(crate) fn unbind_host(&self, port: Port, generation: u64) {
        let mut table = self.lock();
        if let Some(channel) = table.channels.get_mut(port.0 as usize)
            && channel.generation == generation
            && matches!(channel.binding, Binding::Host(_))
        {
            channel.binding = Binding::Unbound(DomId(0));
        }
    }

    /// The host notifies the guest. `false`: the guest has closed its port.
    pub(crate) fn notify(&self, port: Port, generation: u64) -> bool {
        let mut table = self.lock();
        let bound = table.channels.get(port.0 as usize).is_some_and(|channel| {
            channel.generation == generation && matches!(channel.binding, Binding::Host(_))
        });
        if !bound {
            return false;
        }
        let wake = self.set_pending(&mut table, port);
        drop(table);
        self.wake(wake);
        true
    }

    /// Connects two ports of this domain.
    fn bind_own(&self, remote_port: Port) -> Result<Port, Errno> {
        let mut table = self.lock();
        let channel = table.channels.get(remote_port.0 as usize).ok_or(Errno::EINVAL)?;
        if !matches!(channel.binding, Binding::Unbound(remote) if remote == self.own) {
            return Err(Errno::EINVAL);
        }
        let (local, _) = self.allocate(&mut table, Binding::Own(remote_port), 0)?;
        if let Some(remote) = table.channels.get_mut(remote_port.0 as usize) {
            remote.binding = Binding::Own(local);
        }
        // As Xen: an event at the binding end covers a race with a notification before.
        let wake = self.set_pending(&mut table, local);
        drop(table);
        self.wake(wake);
        Ok(local)
    }

    fn bind_virq(&self, virq: Virq, vcpu: u32) -> Result<Port, Errno> {
        if virq.0 >= NR_VIRQS || (is_global(virq) && vcpu != 0) {
            return Err(Errno::EINVAL);
        }
        let vcpu = self.vcpu(vcpu)?;
        let mut table = self.lock();
        let taken = |channel: &Channel| {
            matches!(channel.binding, Binding::Virq(bound) if bound == virq)
                && (channel.vcpu == vcpu || is_global(virq))
        };
        if table.channels.iter().any(taken) {
            return Err(Errno::EEXIST);
        }
        self.allocate(&mut table, Binding::Virq(virq), vcpu).map(|(port, _)| port)
    }

    fn bind_ipi(&self, vcpu: u32) -> Result<Port, Errno> {
        let vcpu = self.vcpu(vcpu)?;
        let mut table = self.lock();
        self.allocate(&mut table, Binding::Ipi, vcpu).map(|(port, _)| port)
    }

    fn vcpu(&self, vcpu: u32) -> Result<usize, Errno> {
        let index = vcpu as usize;
        if index < self.vcpus.len() { Ok(index) } else { Err(Errno::ENOENT) }
    }

    /// The guest closes a port.
    fn close(&self, port: Port) -> Result<(), Errno> {
        let mut table = self.lock();
        self.close_locked(&mut table, port)
    }

    fn close_locked(&self, table: &mut Table, port: Port) -> Result<(), Errno> {
        let channel = table.channels.get_mut(port.0 as usize).ok_or(Errno::EINVAL)?;
        let binding = std::mem::replace(&mut channel.binding, Binding::Free);
        channel.generation += 1;
        channel.vcpu = 0;
        match binding {
            Binding::Free => return Err(Errno::EINVAL),
            Binding::Own(other) => {
                let own = self.own;
                if let Some(other) = table.channels.get_mut(other.0 as usize)
                    && matches!(other.binding, Binding::Own(back) if back == port)
                {
                    other.binding = Binding::Unbound(own);
                }
            }
            Binding::Unbound(_) | Binding::Host(_) | Binding::Virq(_) | Binding::Ipi => {}
        }
        self.clear_pending(table, port);
        Ok(())
    }

    /// Closes everything, and goes back to two-level delivery; answers the frames that the queues had.
    fn reset(&self) -> Vec<Mfn> {
        let mut table = self.lock();
        for index in 0..table.channels.len() {
            if let Ok(port) = u32::try_from(index) {
                let _ = self.close_locked(&mut table, Port(port));
            }
        }
        table.fifo.take().map(Fifo::into_frames).unwrap_or_default()
    }

    /// The guest sends; answers whom to call once the lock is gone.
    fn send(&self, port: Port) -> Result<Option<Handler>, Errno> {
        let mut table = self.lock();
        let channel = table.channels.get(port.0 as usize).ok_or(Errno::EINVAL)?;
        let wake = match &channel.binding {
            Binding::Host(handler) => return Ok(Some(Arc::clone(handler))),
            // Nobody is there: dropped silently, as by Xen.
            Binding::Unbound(_) => return Ok(None),
            Binding::Own(other) => {
                let other = *other;
                self.set_pending(&mut table, other)
            }
            Binding::Ipi => self.set_pending(&mut table, port),
            Binding::Free | Binding::Virq(_) => return Err(Errno::EINVAL),
        };
        drop(table);
        self.wake(wake);
        Ok(None)
    }

    /// Raises a virtual interrupt of a CPU, if the guest wants it.
    pub(crate) fn raise_virq(&self, virq: Virq, vcpu: usize) {
        let mut table = self.lock();
        let bound = table.channels.iter().position(|channel| {
            matches!(channel.binding, Binding::Virq(bound) if bound == virq)
                && (is_global(virq) || channel.vcpu == vcpu)
        });
        let Some(port) = bound.and_then(|index| u32::try_from(index).ok()) else { return };
        let wake = self.set_pending(&mut table, Port(port));
        drop(table);
        self.wake(wake);
    }

    /// What a port is.
    ///
    /// # Errors
    /// `EINVAL`: no such port.
    pub fn status(&self, port: Port) -> Result<PortStatus, Errno> {
        let table = self.lock();
        // Xen makes room for ports by the bucket, and knows those of its buckets.
        let known = table.channels.len().max(1).next_multiple_of(BUCKET);
        if port.0 >= MAX_PORTS || port.0 as usize >= known {
            return Err(Errno::EINVAL);
        }
        let closed =
            PortStatus { status: ChannelStatus::CLOSED, vcpu: 0, remote: 0, remote_port: 0 };
        let Some(channel) = table.channels.get(port.0 as usize) else { return Ok(closed) };
        let vcpu = u32::try_from(channel.vcpu).unwrap_or(0);
        let of = |status, remote, remote_port| PortStatus { status, vcpu, remote, remote_port };
        Ok(match &channel.binding {
            Binding::Free => closed,
            Binding::Unbound(remote) => of(ChannelStatus::UNBOUND, remote.0.into(), 0),
            Binding::Host(_) => of(ChannelStatus::INTERDOMAIN, 0, port.0),
            Binding::Own(other) => of(ChannelStatus::INTERDOMAIN, self.own.0.into(), other.0),
            Binding::Virq(virq) => of(ChannelStatus::VIRQ, virq.0, 0),
            Binding::Ipi => of(ChannelStatus::IPI, 0, 0),
        })
    }

    /// The ports in use, for reports.
    #[must_use]
    pub fn ports(&self) -> Vec<(Port, PortStatus)> {
        let count = u32::try_from(self.lock().channels.len()).unwrap_or(0);
        let ports = (0..count).map(Port);
        let statuses = ports.filter_map(|port| Some((port, self.status(port).ok()?)));
        statuses.filter(|(_, status)| status.status != ChannelStatus::CLOSED).collect()
    }

    fn bind_vcpu(&self, port: Port, vcpu: u32) -> Result<(), Errno> {
        let vcpu = self.vcpu(vcpu)?;
        let mut table = self.lock();
        let channel = table.channels.get_mut(port.0 as usize).ok_or(Errno::EINVAL)?;
        match channel.binding {
            Binding::Virq(virq) if is_global(virq) => {}
            Binding::Unbound(_) | Binding::Host(_) | Binding::Own(_) => {}
            Binding::Free | Binding::Virq(_) | Binding::Ipi => return Err(Errno::EINVAL),
        }
        channel.vcpu = vcpu;
        Ok(())
    }

    /// Unmasks a port, and delivers what came meanwhile.
    fn unmask(&self, port: Port) -> Result<(), Errno> {
        let mut table = self.lock();
        let channel = table.channels.get(port.0 as usize).ok_or(Errno::EINVAL)?;
        // One that is not in use is none of the guest's to wonder about: its bit is cleared, and that is all.
        let vcpu = channel.vcpu;
        let wake = if table.fifo.is_some() {
            fifo::unmask(&mut table, &self.ram, &self.vcpus, port)
        } else {
            let delivered = self
                .bits()
                .zip(self.vcpus.get(vcpu).and_then(VcpuShared::selector))
                .is_some_and(|(bits, selector)| unmask_two_level(bits, selector, port));
            (delivered && self.vcpus.get(vcpu).is_some_and(VcpuShared::mark_pending))
                .then_some(vcpu)
        };
        drop(table);
        self.wake(Wake { vcpu: wake, pollers: false });
        Ok(())
    }

    /// Whether an event waits at a port, masked or not.
    pub(crate) fn is_pending(&self, port: Port) -> bool {
        let table = self.lock();
        match &table.fifo {
            Some(fifo) => fifo.is_pending(&self.ram, port),
            None => self.bits().is_some_and(|bits| bits.is_pending(port)),
        }
    }

    /// Whether a guest could poll this port.
    pub(crate) fn is_valid(&self, port: Port) -> bool {
        port.0 < MAX_PORTS
    }

    fn clear_pending(&self, table: &Table, port: Port) {
        match &table.fifo {
            Some(fifo) => fifo.clear_pending(&self.ram, port),
            None => {
                if let Some(bits) = self.bits() {
                    bits.clear(port);
                }
            }
        }
    }

    /// Marks an event; answers whom to wake once the lock is gone.
    fn set_pending(&self, table: &mut Table, port: Port) -> Wake {
        if table.fifo.is_some() {
            return fifo::set_pending(table, &self.ram, &self.vcpus, port);
        }
        let nobody = Wake { vcpu: None, pollers: false };
        let Some(vcpu) = table.channels.get(port.0 as usize).map(|c| c.vcpu) else { return nobody };
        let Some(shared) = self.vcpus.get(vcpu) else { return nobody };
        let (Some(bits), Some(selector)) = (self.bits(), shared.selector()) else { return nobody };
        let (index, bit) = ((port.0 / 64) as usize, 1_u64 << (port.0 % 64));
        let Some(word) = bits.pending.get(index) else { return nobody };
        if word.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            return nobody;
        }
        let due = !bits.is_masked(port)
            && selector.fetch_or(1 << index, Ordering::SeqCst) & (1 << index) == 0
            && shared.mark_pending();
        Wake { vcpu: due.then_some(vcpu), pollers: true }
    }

    fn wake(&self, wake: Wake) {
        if wake.pollers {
            for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.mode() == Mode::Polling) {
                vcpu.wake();
            }
        }
        if let Some(vcpu) = wake.vcpu.and_then(|vcpu| self.vcpus.get(vcpu)) {
            vcpu.wake_for_event();
        }
    }

    /// Copies the pending bits into the selector of a CPU whose `vcpu_info` moved: none may be lost
    /// (`map_vcpu_info` marks all words for the same reason).
    pub(crate) fn reselect(&self, vcpu: usize) {
        let Some(shared) = self.vcpus.get(vcpu) else { return };
        if let Some(selector) = shared.selector() {
            selector.store(u64::MAX, Ordering::SeqCst);
        }
        shared.mark_pending();
    }
}

/// Whom to wake after an event was marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wake {
    vcpu: Option<usize>,
    /// Those who poll may be waiting for this one.
    pollers: bool,
}

/// Unmasks; `true`: an event waits, and its word was not selected yet.
fn unmask_two_level(bits: PortBits<'_>, selector: &AtomicU64, port: Port) -> bool {
    let (index, bit) = ((port.0 / 64) as usize, 1_u64 << (port.0 % 64));
    let Some(mask) = bits.mask.get(index) else { return false };
    mask.fetch_and(!bit, Ordering::SeqCst) & bit != 0
        && bits.is_pending(port)
        && selector.fetch_or(1 << index, Ordering::SeqCst) & (1 << index) == 0
}

/// Whether a virtual interrupt exists once for a domain, not for each CPU (`virq_is_global`).
fn is_global(virq: Virq) -> bool {
    /// `VIRQ_XENOPROF`.
    const XENOPROF: Virq = Virq(7);
    !matches!(virq, Virq::TIMER | Virq::DEBUG | XENOPROF | Virq::XENPMU)
}

#[cfg(test)]
mod tests;
