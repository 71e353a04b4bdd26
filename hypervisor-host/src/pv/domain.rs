//! A domain, as everybody around it sees it.
//!
//! The virtual CPUs' threads, the backends and the toolstack share it. A backend binds an event channel to a function
//! and maps grants; nothing here knows what a device is.

mod pausing;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use janus_proto::abi::xen::sched::ShutdownReason;
use janus_proto::abi::xen::{Errno, VmAssist};
use janus_proto::addr::{DomId, Mfn, Port};
use janus_proto::pvclock;

use self::pausing::{Standing, bit};
use super::cpu::Cpu;
use super::debug::Debugger;
use super::events::{Events, Handler};
use super::grant::{GrantTable, Grants};
use super::io::{Devices, Registers as DeviceRegisters};
use super::report::{Cause, Report};
use super::run;
use super::sched::WATCHDOGS;
use super::space::Space;
use super::stats::{CallStats, Stats};
use super::timers::{self, Clock, NEVER};
use super::vcpu_info::{LEGACY_MAX_VCPUS, VcpuShared};
use crate::engine::{EngineError, Registers, Vcpu};
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
    /// Stop the CPUs that [`Domain::hold`](super::Domain::hold) names.
    pub(crate) const HOLD: u32 = 4;
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
    /// The CPUs that stand still; changes of their registers are taken over when they go on.
    registers: Vec<Standing>,
    on_end: Vec<OnEnd>,
}

/// Hears of the end, or of a time.
struct OnEnd(Box<dyn FnOnce() + Send>);

impl fmt::Debug for OnEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnEnd")
    }
}

/// Who gets what the guest writes to the hypervisor's own console.
pub type DebugOutput = Box<dyn FnMut(&[u8]) + Send>;

/// A domain.
pub struct Domain {
    id: DomId,
    uuid: [u8; 16],
    ram: Arc<Ram>,
    shared_info: Mfn,
    pub(crate) vcpus: Arc<[VcpuShared]>,
    pub(crate) events: Events,
    pub(crate) grants: Arc<GrantTable>,
    pub(crate) space: Arc<dyn Space>,
    pub(crate) devices: Devices,
    pub(crate) clock: Clock,
    attention: AtomicU32,
    later: Mutex<Option<OnEnd>>,
    later_at: AtomicU64,
    /// Bits of CPUs that stand still while others run.
    held: AtomicU32,
    /// Bits of CPUs that run one instruction.
    stepping: AtomicU32,
    assists: AtomicU32,
    shutdown_code: Mutex<Option<ShutdownReason>>,
    watchdogs: Mutex<[u64; WATCHDOGS]>,
    debugger: Mutex<Option<Debugger>>,
    debug_output: Mutex<Option<DebugOutput>>,
    debug_input: Mutex<VecDeque<u8>>,
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

/// The first CPU of a domain that was started, and waits for a thread. Dropping it ends the domain.
pub struct FirstCpu {
    domain: Arc<Domain>,
    start: Option<(Box<dyn Vcpu>, Registers)>,
}

impl fmt::Debug for FirstCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FirstCpu(domain {})", self.domain.id)
    }
}

impl FirstCpu {
    /// Serves it on this thread, until the domain ends.
    pub fn run(mut self) {
        if let Some((engine, registers)) = self.start.take() {
            let mut cpu = Cpu::new(Arc::clone(&self.domain), 0, engine);
            cpu.state.registers = registers;
            run::serve(cpu);
        }
    }
}

impl Drop for FirstCpu {
    fn drop(&mut self) {
        if self.start.take().is_some() {
            self.domain.end(EndReason::Destroyed, None);
            self.domain.leave(|_| ());
        }
    }
}

/// What becomes the thread of a CPU.
fn thread_of(index: usize) -> std::thread::Builder {
    std::thread::Builder::new().name(format!("vcpu{index}"))
}

impl Domain {
    /// A domain that has not been started.
    ///
    /// # Errors
    /// `EINVAL`: a number of CPUs that cannot be, or domain 0.
    pub fn new(setup: &Setup, space: Arc<dyn Space>) -> Result<Arc<Self>, Errno> {
        if setup.id == DomId(0) || !(1..=LEGACY_MAX_VCPUS).contains(&setup.vcpus) {
            return Err(Errno::EINVAL);
        }
        let ram = &setup.ram;
        let vcpus: Arc<[VcpuShared]> = (0..setup.vcpus)
            .map(|index| VcpuShared::new(Arc::clone(ram), setup.shared_info, index))
            .collect();
        let events = Events::new(setup.id, Arc::clone(ram), setup.shared_info, Arc::clone(&vcpus));
        let grants = GrantTable::new(Arc::clone(ram), setup.grant_frames, space.clone());
        grants.grant_rings(setup.console, setup.store);
        Ok(Arc::new(Self {
            id: setup.id,
            uuid: setup.uuid,
            ram: Arc::clone(ram),
            shared_info: setup.shared_info,
            vcpus,
            events,
            grants: Arc::new(grants),
            space,
            clock: Clock::new(setup.vcpus > 1),
            devices: Devices::default(),
            attention: AtomicU32::new(0),
            later: Mutex::new(None),
            later_at: AtomicU64::new(NEVER),
            held: AtomicU32::new(0),
            stepping: AtomicU32::new(0),
            assists: AtomicU32::new(0),
            shutdown_code: Mutex::new(None),
            watchdogs: Mutex::new([NEVER; WATCHDOGS]),
            debugger: Mutex::new(None),
            debug_output: Mutex::new(None),
            debug_input: Mutex::new(VecDeque::new()),
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

    /// Puts a device's registers into a frame that the guest may map; `None`: there are as many as can be.
    pub fn add_registers(&self, registers: Arc<dyn DeviceRegisters>) -> Option<Mfn> {
        let frame = self.devices.add(registers)?;
        self.space.permit(frame);
        Some(frame)
    }

    /// Takes them away: what the guest reads there from now on is ones.
    pub fn remove_registers(&self, frame: Mfn) {
        self.devices.remove(frame);
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the domain as it is. Returns at once; [`Self::wait`] says when it has ended.
    pub fn destroy(&self) {
        self.end(EndReason::Destroyed, None);
        self.vcpus.iter().for_each(VcpuShared::kill);
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
        let heard =
            if life.ended.is_some() { std::mem::take(&mut life.on_end) } else { Vec::new() };
        drop(life);
        self.changed.notify_all();
        heard.into_iter().for_each(|OnEnd(hears)| hears());
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

    /// Calls `action` on the first CPU's thread once so much time has passed, if the domain still runs then: for what a
    /// guest that ends at once shall not pay for. The last call counts.
    pub fn at_later(&self, delay: Duration, action: Box<dyn FnOnce() + Send>) {
        let delay = u64::try_from(delay.as_nanos()).unwrap_or(NEVER);
        *self.later.lock().unwrap_or_else(PoisonError::into_inner) = Some(OnEnd(action));
        self.later_at.store(timers::now().saturating_add(delay), Ordering::SeqCst);
        self.vcpu(0).wake();
    }

    /// When that is.
    pub(crate) fn later(&self) -> u64 {
        self.later_at.load(Ordering::Relaxed)
    }

    /// It is time.
    pub(crate) fn run_later(&self) {
        self.later_at.store(NEVER, Ordering::SeqCst);
        let action = self.later.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(OnEnd(action)) = action {
            action();
        }
    }

    /// Calls `hears` once all CPUs have stopped for good, at once if they have; from any thread, with no lock held.
    pub fn on_end(&self, hears: Box<dyn FnOnce() + Send>) {
        let mut life = self.life();
        if life.ended.is_none() {
            life.on_end.push(OnEnd(hears));
        } else {
            drop(life);
            hears();
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Arc<Ended>> {
        self.life().ended.clone()
    }

    /// Whether the guest has started this CPU.
    #[must_use]
    pub fn is_up(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(VcpuShared::is_up)
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
        let heard =
            if life.ended.is_some() { std::mem::take(&mut life.on_end) } else { Vec::new() };
        drop(life);
        self.changed.notify_all();
        heard.into_iter().for_each(|OnEnd(hears)| hears());
    }

    fn finish_if_over(&self, life: &mut Life) {
        if life.threads > 0 {
            return;
        }
        let Some((reason, vcpu)) = life.end.take() else { return };
        let orderly = is_orderly(&reason);
        let mut report = std::mem::take(&mut life.report);
        report.cpus.sort_by_key(|cpu| cpu.vcpu);
        report.ports = self.events.ports();
        let report = (!orderly).then(|| Box::new(report));
        life.ended = Some(Arc::new(Ended { reason, vcpu, report }));
    }

    /// Starts it: CPU 0 on the first engine with these registers, the others when the guest starts them. There are
    /// as many engines as CPUs. Called once.
    ///
    /// # Errors
    /// The host has no threads left; the domain has ended then.
    pub fn start(
        self: &Arc<Self>,
        engines: Vec<Box<dyn Vcpu>>,
        registers: Registers,
    ) -> io::Result<()> {
        let first = self.start_here(engines, registers)?;
        // Should there be no thread, the CPU is dropped, which ends the domain.
        thread_of(0).spawn(move || first.run()).map(drop)
    }

    /// As [`Self::start`], but CPU 0 gets no thread of its own: it runs on the caller's, in [`FirstCpu::run`].
    ///
    /// # Errors
    /// As there.
    pub fn start_here(
        self: &Arc<Self>,
        engines: Vec<Box<dyn Vcpu>>,
        registers: Registers,
    ) -> io::Result<FirstCpu> {
        timers::begin();
        self.write_wall_clock();
        self.enter(engines.len());
        let count = engines.len();
        let mut first = FirstCpu { domain: Arc::clone(self), start: None };
        for (index, engine) in engines.into_iter().enumerate() {
            if index == 0 {
                first.start = Some((engine, registers));
                continue;
            }
            let domain = Arc::clone(self);
            let spawned =
                thread_of(index).spawn(move || run::serve(Cpu::new(domain, index, engine)));
            if let Err(error) = spawned {
                self.end(EndReason::Destroyed, None);
                (index..count).for_each(|_| self.leave(|_| ()));
                return Err(error);
            }
        }
        Ok(first)
    }

    /// The shared side of a CPU.
    pub(crate) fn vcpu(&self, index: usize) -> &VcpuShared {
        let (first, others) = self.vcpus.split_first().unwrap_or_else(|| {
            // `new` refuses a domain without CPUs.
            unreachable!("a domain has a CPU")
        });
        index.checked_sub(1).and_then(|index| others.get(index)).unwrap_or(first)
    }

    /// How many CPUs it has.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Something wants the thread of this CPU: see [`attention`].
    pub(crate) fn attention_of(&self, vcpu: usize) -> u32 {
        let attention = self.attention.load(Ordering::SeqCst);
        let held =
            attention & attention::HOLD != 0 && self.held.load(Ordering::SeqCst) & bit(vcpu) != 0;
        if held { attention } else { attention & !attention::HOLD }
    }

    /// Whether it ends in a way that is to be explained.
    pub(crate) fn wants_report(&self) -> bool {
        self.life().end.as_ref().is_some_and(|(reason, _)| !is_orderly(reason))
    }

    /// Whether it is ending: whoever works for it may stop.
    pub(crate) fn is_ending(&self) -> bool {
        self.attention.load(Ordering::SeqCst) & attention::END != 0
    }

    /// Whether the guest has this assist on.
    pub(crate) fn assists(&self, kind: VmAssist) -> bool {
        self.assists.load(Ordering::Relaxed) & 1_u32.checked_shl(kind.0).unwrap_or(0) != 0
    }

    /// Turns one on or off. Those beyond the word change nothing here, and are always as they are.
    pub(crate) fn set_assist(&self, kind: VmAssist, on: bool) {
        let bit = 1_u32.checked_shl(kind.0).unwrap_or(0);
        if on {
            self.assists.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.assists.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    pub(crate) fn set_shutdown_code(&self, reason: ShutdownReason) {
        *self.shutdown_code.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    /// The reason that the guest has fixed for its next shutdown.
    pub(crate) fn shutdown_code(&self) -> Option<ShutdownReason> {
        *self.shutdown_code.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms a watchdog for a system time, or destroys it when `timeout` is 0; answers its number.
    pub(crate) fn set_watchdog(&self, id: u32, timeout: u32, at: u64) -> Result<u64, Errno> {
        let mut watchdogs = self.watchdogs.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match (id, timeout) {
            (0, 0) => return Err(Errno::EINVAL),
            (0, _) => watchdogs.iter().position(|at| *at == NEVER).ok_or(Errno::ENOSPC)?,
            (id, _) => id as usize - 1,
        };
        let place = watchdogs.get_mut(index).ok_or(Errno::EINVAL)?;
        if id != 0 && *place == NEVER {
            return Err(Errno::EINVAL);
        }
        *place = if timeout == 0 { NEVER } else { at };
        Ok(if id == 0 { index as u64 + 1 } else { 0 })
    }

    /// The guest's watchdog has expired.
    pub(crate) fn end_by_watchdog(&self) {
        self.end(EndReason::Crashed(Cause::Watchdog), None);
    }

    /// When the first watchdog expires.
    pub(crate) fn watchdog(&self) -> u64 {
        let watchdogs = self.watchdogs.lock().unwrap_or_else(PoisonError::into_inner);
        watchdogs.iter().copied().min().unwrap_or(NEVER)
    }

    /// Sends what the guest writes to the hypervisor's console there.
    pub fn set_debug_output(&self, output: DebugOutput) {
        *self.debug_output.lock().unwrap_or_else(PoisonError::into_inner) = Some(output);
    }

    /// Types something on the hypervisor's console.
    pub fn type_debug_input(&self, bytes: &[u8]) {
        self.debug_input.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
    }

    /// Takes at most `count` bytes of what was typed.
    pub(crate) fn debug_input(&self, count: usize) -> Vec<u8> {
        let mut input = self.debug_input.lock().unwrap_or_else(PoisonError::into_inner);
        let count = count.min(input.len());
        input.drain(..count).collect()
    }

    pub(crate) fn debug_console(&self, bytes: &[u8]) {
        let mut output = self.debug_output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(output) = output.as_mut() {
            output(bytes);
        }
    }

    pub(crate) fn write_wall_clock(&self) {
        const WALL_CLOCK: std::ops::Range<usize> = 3072 / 4..3088 / 4;
        let page = self.ram.words(self.shared_info, 1);
        if let Some(words) = page.and_then(|words| words.get(WALL_CLOCK)) {
            pvclock::write_wall_clock(words, timers::wall_clock_base());
        }
    }

    /// TSC ticks as nanoseconds.
    #[must_use]
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        let info = self.clock.info();
        pvclock::scale(ticks, info.tsc_to_system_mul, info.tsc_shift)
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            notifications: self.notifications.load(Ordering::Relaxed),
            register_accesses: self.devices.accesses(),
            grants_in_use: self.grants.in_use(),
            ..Stats::default()
        };
        for vcpu in self.vcpus.iter() {
            stats.unknown_calls += vcpu.counters.unknown();
            for (number, calls, ticks) in vcpu.counters.used() {
                stats.add_call(CallStats { number, calls, ticks });
            }
        }
        stats
    }
}

fn is_orderly(reason: &EndReason) -> bool {
    match reason {
        EndReason::Shutdown(reason) => *reason != ShutdownReason::CRASH,
        EndReason::Destroyed => true,
        EndReason::Crashed(_) | EndReason::Engine(_) => false,
    }
}

#[cfg(test)]
mod tests;
