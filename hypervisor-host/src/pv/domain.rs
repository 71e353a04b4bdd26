//! A domain, as everybody around it sees it.
//!
//! The virtual CPUs' threads, the backends and the toolstack share it. A backend binds an event channel to a function
//! and maps grants; nothing here knows what a device is.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::sched::ShutdownReason;
use janus_proto::addr::{DomId, Mfn, Port};

use super::events::{Events, Handler};
use super::grant::{FrameTypes, GrantTable, Grants};
use super::report::{Cause, Report};
use super::vcpu_info::{LEGACY_MAX_VCPUS, VcpuShared};
use crate::engine::EngineError;
use crate::machine::ram::Ram;

/// What a domain is made of: the builder's result, and the toolstack's choices.
#[derive(Debug)]
pub struct Setup {
    /// Its number; not 0.
    pub id: DomId,
    /// Its UUID, which `XENVER_guest_handle` tells the guest.
    pub uuid: [u8; 16],
    /// How many virtual CPUs it has, 1 to 32.
    pub vcpus: usize,
    /// Its memory.
    pub ram: Arc<Ram>,
    /// The frame of the shared info page.
    pub shared_info: Mfn,
    /// The first of the frames for its grant table: [`super::grant::MAX_GRANT_FRAMES`], then
    /// [`super::grant::MAX_STATUS_FRAMES`].
    pub grant_frames: Mfn,
    /// The frame of the console ring, granted to domain 0 as reference 0.
    pub console: Mfn,
    /// The frame of the xenstore ring, granted to domain 0 as reference 1.
    pub store: Mfn,
}

/// How a domain ended.
#[derive(Debug)]
pub enum EndReason {
    /// The guest asked for it.
    Shutdown(ShutdownReason),
    /// The guest did what no domain survives.
    Crashed(Cause),
    /// The engine lost it.
    Engine(EngineError),
    /// [`Domain::destroy`] was called.
    Destroyed,
}

/// How a domain ended, and what it was doing.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub reason: EndReason,
    /// The virtual CPU that ended it; `None`: destroyed before or between.
    pub vcpu: Option<usize>,
    /// What every CPU was doing, unless the end was an orderly one.
    pub report: Option<Box<Report>>,
}

/// What the threads of the CPUs look at before they go back to the guest.
pub(crate) mod attention {
    /// Stop until unpaused.
    pub(crate) const PAUSE: u32 = 1;
    /// Leave for good.
    pub(crate) const END: u32 = 2;
}

#[derive(Debug, Default)]
struct Life {
    pauses: u32,
    /// Threads of CPUs that have not left.
    threads: usize,
    /// Of them, those that stand still because of a pause.
    standing: usize,
    end: Option<(EndReason, Option<usize>)>,
    ended: Option<Arc<Ended>>,
    report: Report,
}

/// A domain.
pub struct Domain {
    id: DomId,
    uuid: [u8; 16],
    ram: Arc<Ram>,
    shared_info: Mfn,
    pub(crate) vcpus: Arc<[VcpuShared]>,
    pub(crate) events: Events,
    grants: Arc<GrantTable>,
    pub(crate) attention: AtomicU32,
    life: Mutex<Life>,
    changed: Condvar,
    notifications: AtomicU64,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("id", &self.id)
            .field("vcpus", &self.vcpus.len())
            .field("events", &self.events)
            .field("grants", &self.grants)
            .finish_non_exhaustive()
    }
}

/// The host's end of an event channel. Dropping it lets go of the channel.
pub struct HostPort {
    domain: Arc<Domain>,
    port: Port,
    generation: u64,
}

impl fmt::Debug for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostPort(domain {}, port {})", self.domain.id, self.port)
    }
}

impl HostPort {
    /// Sends the guest an event. `false`: it has closed its port. May be called from any thread, also from a handler.
    pub fn notify(&self) -> bool {
        self.domain.notifications.fetch_add(1, Ordering::Relaxed);
        self.domain.events.notify(self.port, self.generation)
    }

    /// The guest's number for it.
    #[must_use]
    pub fn guest_port(&self) -> Port {
        self.port
    }
}

impl Drop for HostPort {
    fn drop(&mut self) {
        self.domain.events.unbind_host(self.port, self.generation);
    }
}

impl Domain {
    /// A domain that has not been started.
    ///
    /// # Errors
    /// `EINVAL`: a number of CPUs that cannot be, or domain 0.
    pub fn new(setup: &Setup, types: Arc<dyn FrameTypes>) -> Result<Arc<Self>, Errno> {
        if setup.id == DomId(0) || !(1..=LEGACY_MAX_VCPUS).contains(&setup.vcpus) {
            return Err(Errno::EINVAL);
        }
        let ram = &setup.ram;
        let vcpus: Arc<[VcpuShared]> = (0..setup.vcpus)
            .map(|index| VcpuShared::new(Arc::clone(ram), setup.shared_info, index))
            .collect();
        let events = Events::new(setup.id, Arc::clone(ram), setup.shared_info, Arc::clone(&vcpus));
        let grants = GrantTable::new(Arc::clone(ram), setup.grant_frames, types);
        grants.grant_rings(setup.console, setup.store);
        Ok(Arc::new(Self {
            id: setup.id,
            uuid: setup.uuid,
            ram: Arc::clone(ram),
            shared_info: setup.shared_info,
            vcpus,
            events,
            grants: Arc::new(grants),
            attention: AtomicU32::new(0),
            life: Mutex::new(Life::default()),
            changed: Condvar::new(),
            notifications: AtomicU64::new(0),
        }))
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.id
    }

    /// Its UUID.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Its memory. Backends use [`Self::grants`] instead.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The frame of the shared info page.
    #[must_use]
    pub fn shared_info(&self) -> Mfn {
        self.shared_info
    }

    /// Its event channels.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Makes a new port of the guest's whose other end is the host: for rings that are there before the guest is.
    /// The first two a domain gets have numbers 1 and 2. `handler` runs when the guest notifies, on the thread of the
    /// CPU that does; it may serve a ring and notify back, and must not wait.
    ///
    /// # Errors
    /// `ENOSPC`: no port left.
    pub fn bind(self: &Arc<Self>, handler: Handler) -> Result<HostPort, Errno> {
        let port = self.events.alloc_unbound(DomId(0))?;
        self.bind_interdomain(port, handler)
    }

    /// Makes the host the other end of a port that the guest has allocated for domain 0 and published.
    /// See [`Self::bind`] for `handler`.
    ///
    /// # Errors
    /// `EINVAL`: the guest has no such port, or it is not for the host, or bound already.
    pub fn bind_interdomain(
        self: &Arc<Self>,
        port: Port,
        handler: Handler,
    ) -> Result<HostPort, Errno> {
        let generation = self.events.bind_host(port, handler)?;
        Ok(HostPort { domain: Arc::clone(self), port, generation })
    }

    /// What the guest grants to domain 0.
    #[must_use]
    pub fn grants(&self) -> Grants {
        Grants::new(Arc::clone(&self.grants))
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the domain as it is. Returns at once; [`Self::wait`] says when it has ended.
    pub fn destroy(&self) {
        self.end(EndReason::Destroyed, None);
    }

    /// The domain ends for this reason, if it does not end already.
    pub(crate) fn end(&self, reason: EndReason, vcpu: Option<usize>) {
        let mut life = self.life();
        if life.end.is_some() || life.ended.is_some() {
            return;
        }
        life.end = Some((reason, vcpu));
        self.attention.fetch_or(attention::END, Ordering::SeqCst);
        self.finish_if_over(&mut life);
        drop(life);
        self.changed.notify_all();
        for (index, shared) in self.vcpus.iter().enumerate() {
            if Some(index) != vcpu {
                shared.wake();
            }
        }
    }

    /// Waits until all CPUs have stopped for good.
    #[must_use]
    pub fn wait(&self) -> Arc<Ended> {
        let mut life = self.life();
        loop {
            if let Some(ended) = &life.ended {
                return Arc::clone(ended);
            }
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Arc<Ended>> {
        self.life().ended.clone()
    }

    /// Stops all CPUs, and returns when they stand still. Each call wants its own [`Self::unpause`].
    /// Not to be called by a handler.
    pub fn pause(&self) {
        let mut life = self.life();
        life.pauses += 1;
        self.attention.fetch_or(attention::PAUSE, Ordering::SeqCst);
        for shared in self.vcpus.iter() {
            shared.wake();
        }
        while life.standing < life.threads && life.ended.is_none() {
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes one [`Self::pause`] back.
    pub fn unpause(&self) {
        let mut life = self.life();
        life.pauses = life.pauses.saturating_sub(1);
        if life.pauses == 0 {
            self.attention.fetch_and(!attention::PAUSE, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// A thread of a CPU stands still while the domain is paused.
    pub(crate) fn stand(&self) {
        let mut life = self.life();
        if life.pauses == 0 {
            return;
        }
        life.standing += 1;
        self.changed.notify_all();
        while life.pauses > 0 && life.end.is_none() {
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
        life.standing -= 1;
    }

    /// Threads of CPUs are about to run.
    pub(crate) fn enter(&self, threads: usize) {
        self.life().threads += threads;
    }

    /// The thread of a CPU leaves for good; `add` writes what it was doing.
    pub(crate) fn leave(&self, add: impl FnOnce(&mut Report)) {
        let mut life = self.life();
        life.threads = life.threads.saturating_sub(1);
        add(&mut life.report);
        self.finish_if_over(&mut life);
        drop(life);
        self.changed.notify_all();
    }

    fn finish_if_over(&self, life: &mut Life) {
        if life.threads > 0 {
            return;
        }
        let Some((reason, vcpu)) = life.end.take() else { return };
        let orderly = match &reason {
            EndReason::Shutdown(reason) => *reason != ShutdownReason::CRASH,
            EndReason::Destroyed => true,
            EndReason::Crashed(_) | EndReason::Engine(_) => false,
        };
        let mut report = std::mem::take(&mut life.report);
        report.cpus.sort_by_key(|cpu| cpu.vcpu);
        report.ports = self.events.ports();
        let report = (!orderly).then(|| Box::new(report));
        life.ended = Some(Arc::new(Ended { reason, vcpu, report }));
    }

    /// Events that the host has sent.
    #[must_use]
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
