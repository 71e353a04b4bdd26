//! Several CPUs: who is there, starting and stopping them, and what they ask of each other.
//!
//! The first CPU boots alone. When its services run (or somebody asks, [`start`]) it starts the others: under Xen by
//! `VCPUOP` calls (`xen.rs`), elsewhere by INIT and start-up interrupts (`startup.rs`). A CPU that came up runs the
//! executor and halts when it has nothing to do. `cpus=N` on the command line keeps it to the first N.
//!
//! A CPU asks two things of others: to forget translations ([`shootdown`]), and to stand still for good when the kernel
//! has failed ([`stop_others`]).

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;

use janus_proto::abi::xen::Errno;

use crate::command_line::value;
use crate::irq::evtchn::EventError;
use crate::percpu::{self, CpuId, MAX_CPUS, PerCpu};
use crate::platform::{self, Platform};
use crate::sync::{Mutex, Notify};
use crate::task::CpuStatistics;
use crate::{command_line, task, time};

pub(crate) mod shootdown;
#[cfg(target_os = "none")]
mod startup;
mod xen;

/// Bytes of the stack that a CPU other than the first runs on.
const STACK_BYTES: usize = 64 << 10;
/// How long the start of other CPUs leaves the start of services alone.
const AFTER_BOOT: Duration = Duration::from_millis(5);
/// How long a CPU may take to come up, or to go down.
const PATIENCE: Duration = Duration::from_secs(5);

/// A bit for each CPU that runs the executor.
static ONLINE: AtomicU64 = AtomicU64::new(1);
/// There was ever a second one.
static SEVERAL: AtomicBool = AtomicBool::new(false);
/// A CPU has come up or gone down.
static CHANGED: Notify = Notify::new();
/// Starting and stopping, one at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Why a CPU did not start, or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuError {
    /// Xen refused.
    Xen(Errno),
    /// Its event channels could not be had.
    Event(EventError),
    /// There is no memory for its stack.
    NoMemory,
    /// There is no memory below 1 MiB, where a CPU starts.
    NoLowMemory,
    /// It did not do so in time.
    TimedOut,
    /// There is no such CPU, or it is not in use.
    NoSuchCpu,
    /// It is the first one, the calling one, or one with tasks that cannot move.
    Busy,
    /// The platform has no way to.
    NotHere,
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xen(error) => write!(f, "Xen refuses: {error}"),
            Self::Event(error) => error.fmt(f),
            Self::NoMemory => f.write_str("no memory for its stack"),
            Self::NoLowMemory => f.write_str("no memory below 1 MiB for it to start from"),
            Self::TimedOut => write!(f, "no answer within {} s", PATIENCE.as_secs()),
            Self::NoSuchCpu => f.write_str("there is no such CPU in use"),
            Self::Busy => f.write_str("it is the first CPU, or has tasks that cannot move"),
            Self::NotHere => f.write_str("this platform has no way to stop a CPU"),
        }
    }
}

impl core::error::Error for CpuError {}

impl From<Errno> for CpuError {
    fn from(error: Errno) -> Self {
        Self::Xen(error)
    }
}

impl From<EventError> for CpuError {
    fn from(error: EventError) -> Self {
        Self::Event(error)
    }
}

/// Whether there is, or was, a CPU beside the first.
#[must_use]
#[inline]
pub fn several() -> bool {
    SEVERAL.load(Ordering::Relaxed)
}

/// How many CPUs are in use.
#[must_use]
pub fn online() -> usize {
    ONLINE.load(Ordering::Acquire).count_ones() as usize
}

/// The `n`th CPU in use, from 0; `None` behind the last.
#[must_use]
pub(crate) fn nth(n: usize) -> Option<&'static PerCpu> {
    all_in(ONLINE.load(Ordering::Acquire)).nth(n)
}

/// The CPUs of a set of bits.
fn all_in(mut set: u64) -> impl Iterator<Item = &'static PerCpu> {
    core::iter::from_fn(move || {
        let id = set.trailing_zeros();
        set &= set.wrapping_sub(1);
        percpu::get(CpuId(id))
    })
}

/// The CPUs in use other than this one.
fn others() -> impl Iterator<Item = &'static PerCpu> {
    all_in(ONLINE.load(Ordering::Acquire) & !percpu::current().bit())
}

/// What a CPU is doing, for people.
#[derive(Clone, Copy, Debug)]
pub struct CpuStatus {
    /// Which.
    pub id: CpuId,
    /// It runs tasks; else it was stopped.
    pub online: bool,
    /// What it has done.
    pub statistics: CpuStatistics,
}

/// The CPUs that were ever in use.
#[must_use]
pub fn list() -> Vec<CpuStatus> {
    let online = ONLINE.load(Ordering::Acquire);
    (0..u32::try_from(MAX_CPUS).unwrap_or(0))
        .filter_map(|id| percpu::get(CpuId(id)))
        .filter(|cpu| cpu.is_prepared())
        .map(|cpu| CpuStatus {
            id: cpu.id(),
            online: online & cpu.bit() != 0,
            statistics: task::executor::statistics_of(cpu.runtime()),
        })
        .collect()
}

/// Whether the machine has this CPU; the first it always has.
fn exists(CpuId(id): CpuId) -> bool {
    match platform::current() {
        Platform::XenPv | Platform::XenPvh => crate::hypercall::cpu::is_up(id).is_ok(),
        Platform::Kvm => {
            crate::firmware::tables().is_some_and(|tables| (id as usize) < tables.processors.len())
        }
        #[cfg(not(target_os = "none"))]
        Platform::Host => false,
    }
}

/// Has the other CPUs started a while after boot, if there are any.
pub(crate) fn init() {
    if exists(CpuId(1)) {
        drop(task::spawn("cpus", async {
            time::sleep(AFTER_BOOT).await;
            start().await;
        }));
    }
}

/// Starts all CPUs that the machine has and the command line allows; answers how many are in use then.
///
/// Boot does this by itself, a little later; who wants to use them at once may ask.
pub async fn start() -> usize {
    let _turn = TURN.lock().await;
    let limit = value(command_line(), "cpus")
        .and_then(|value| value.parse().ok())
        .unwrap_or(MAX_CPUS)
        .min(MAX_CPUS);
    for id in (1..limit).filter_map(|id| u32::try_from(id).ok()).map(CpuId) {
        if ONLINE.load(Ordering::Acquire) & 1 << id.0 != 0 {
            continue;
        }
        if !exists(id) {
            break;
        }
        if let Err(error) = start_one(id).await {
            log::warn!("CPU {} does not start: {error}", id.0);
            break;
        }
    }
    online()
}

/// Starts, or starts again, one CPU.
async fn start_one(id: CpuId) -> Result<(), CpuError> {
    let known = percpu::get(id).ok_or(CpuError::NoSuchCpu)?;
    if !SEVERAL.swap(true, Ordering::SeqCst) {
        xen::prepare_first(percpu::current())?;
    }
    if known.is_prepared() {
        xen::restart(known)?;
    } else {
        let stack = crate::mm::stack::allocate(STACK_BYTES).ok_or(CpuError::NoMemory)?;
        let top = stack.as_ptr().expose_provenance() + STACK_BYTES;
        let _ = percpu::prepare(id).ok_or(CpuError::NoSuchCpu)?;
        match platform::current() {
            Platform::XenPv => xen::start_pv(known, top)?,
            #[cfg(target_os = "none")]
            Platform::XenPvh => xen::start_pvh(known, top)?,
            #[cfg(target_os = "none")]
            Platform::Kvm => startup::start(known, top).await?,
            #[cfg(not(target_os = "none"))]
            _ => return Err(CpuError::NotHere),
        }
    }
    until(|| ONLINE.load(Ordering::Acquire) & known.bit() != 0).await
}

/// Waits for a change of the CPUs in use.
async fn until(done: impl Fn() -> bool) -> Result<(), CpuError> {
    let wait = async {
        while !done() {
            CHANGED.notified().await;
        }
    };
    time::timeout(PATIENCE, wait).await.map_err(|_| CpuError::TimedOut)
}

/// Stops a CPU; its tasks go on on the first one. [`start`] brings it back.
///
/// # Errors
/// See [`CpuError`].
pub async fn stop(id: CpuId) -> Result<(), CpuError> {
    let _turn = TURN.lock().await;
    let cpu = percpu::get(id).ok_or(CpuError::NoSuchCpu)?;
    if !cpu.is_prepared() || ONLINE.load(Ordering::Acquire) & cpu.bit() == 0 {
        return Err(CpuError::NoSuchCpu);
    }
    if !platform::current().is_xen() {
        return Err(CpuError::NotHere);
    }
    if core::ptr::eq(cpu, percpu::first())
        || core::ptr::eq(cpu, percpu::current())
        || !cpu.runtime().ask_to_stop()
    {
        return Err(CpuError::Busy);
    }
    until(|| ONLINE.load(Ordering::Acquire) & cpu.bit() == 0).await
}

/// What every CPU but the first does, once it is set up: runs tasks, for good.
pub(crate) fn run(cpu: &'static PerCpu) -> ! {
    loop {
        ONLINE.fetch_or(cpu.bit(), Ordering::SeqCst);
        shootdown::begin();
        CHANGED.notify();
        task::executor::run_until_stopped(|| {
            if !cpu.runtime().give_up(percpu::first().runtime()) {
                return;
            }
            ONLINE.fetch_and(!cpu.bit(), Ordering::SeqCst);
            CHANGED.notify();
            // Comes back when the CPU is started again.
            xen::go_down(cpu);
            cpu.runtime().take_up();
        });
    }
}

/// Does what another CPU has asked of this one: called where this one waits for another.
#[inline]
pub(crate) fn attend() {
    if several() {
        shootdown::attend();
    }
}

/// Has all other CPUs stand still for good: the kernel has failed, and this CPU reports.
pub(crate) fn stop_others() {
    if !several() {
        return;
    }
    match platform::current() {
        Platform::XenPv | Platform::XenPvh => {
            for cpu in others() {
                // A CPU that Xen does not stop now it stops with the domain.
                let _ = crate::hypercall::cpu::down(cpu.id().0);
            }
        }
        Platform::Kvm => crate::irq::apic::stop_others(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => {}
    }
}

/// This CPU stands still for good.
pub(crate) fn stand_still() -> ! {
    platform::disable_irqs();
    loop {
        match platform::current() {
            Platform::XenPv | Platform::XenPvh => xen::go_down(percpu::current()),
            Platform::Kvm => x86_64::instructions::hlt(),
            #[cfg(not(target_os = "none"))]
            Platform::Host => std::thread::park(),
        }
    }
}
