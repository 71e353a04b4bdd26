//! A machine of KVM: memory, interrupt controllers, devices, and its end.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use janus_proto::abi::xen::sched::ShutdownReason;
use kvm_ioctls::VmFd;
use vmm_sys_util::signal::Killable as _;

use super::ports::Ports;
use super::stats::Exits;
use super::vcpu;
use super::xen::Xen;
use crate::machine::ram::Ram;
use crate::pv::domain::EndReason;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// It wrote this to the exit device.
    Exit(u8),
    /// It told pvpanic that it has panicked.
    Panicked,
    /// An exception that could not be delivered, at about this address.
    TripleFault(u64),
    /// KVM, or this program, cannot go on with it.
    Lost(String),
    /// It was ended from outside.
    Destroyed,
    /// As a domain of Xen's it ended in this way.
    Xen(DomainEnd),
}

/// How a domain of Xen's ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainEnd {
    /// It asked for it, for this reason.
    Shutdown(ShutdownReason),
    /// Otherwise.
    Other(String),
}

impl From<EndReason> for DomainEnd {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Shutdown(reason) => Self::Shutdown(reason),
            EndReason::Crashed(cause) => Self::Other(cause.to_string()),
            EndReason::Engine(error) => Self::Other(error.to_string()),
            EndReason::Destroyed => Self::Other("it was ended".into()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("it powered off"),
            Self::Reset => f.write_str("it asked for a reset"),
            Self::Exit(value) => write!(f, "it wrote {value:#x} to the exit device"),
            Self::Panicked => f.write_str("it panicked"),
            Self::TripleFault(rip) => {
                write!(f, "an exception that could not be delivered, at {rip:#x} (a triple fault)")
            }
            Self::Lost(what) => f.write_str(what),
            Self::Destroyed => f.write_str("it was ended"),
            Self::Xen(DomainEnd::Shutdown(reason)) => write!(f, "it shut down ({reason:?})"),
            Self::Xen(DomainEnd::Other(what)) => f.write_str(what),
        }
    }
}

/// A device whose registers are in memory.
pub(crate) trait Registers: Send + Sync {
    /// The guest reads.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&self, offset: u64, data: &[u8]);
}

#[derive(Debug, Default)]
struct Life {
    end: Option<(End, Option<usize>)>,
    threads: Vec<JoinHandle<()>>,
}

/// The machine.
pub(crate) struct Machine {
    /// Both outlive every virtual CPU.
    _vm: Arc<VmFd>,
    _ram: Arc<Ram>,
    pub(crate) ports: Ports,
    pub(crate) stats: Exits,
    /// What makes it a domain of Xen's, if it is one.
    pub(crate) xen: Option<Arc<Xen>>,
    devices: Vec<(Range<u64>, Arc<dyn Registers>)>,
    over: AtomicBool,
    life: Mutex<Life>,
    changed: Condvar,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("stats", &self.stats)
            .field("ports", &self.ports)
            .field("devices", &self.devices.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    pub(crate) fn new(
        vm: Arc<VmFd>,
        ram: Arc<Ram>,
        ports: Ports,
        devices: Vec<(Range<u64>, Arc<dyn Registers>)>,
        xen: Option<Arc<Xen>>,
    ) -> Self {
        Self {
            _vm: vm,
            _ram: ram,
            ports,
            stats: Exits::default(),
            xen,
            devices,
            over: AtomicBool::new(false),
            life: Mutex::new(Life::default()),
            changed: Condvar::new(),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The threads of its virtual CPUs.
    pub(crate) fn adopt(&self, thread: JoinHandle<()>) {
        self.life().threads.push(thread);
    }

    /// Whether it has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// It ends in this way, unless it has ended already.
    pub(crate) fn end(&self, end: End, vcpu: Option<usize>) {
        let mut life = self.life();
        life.end.get_or_insert((end, vcpu));
        // Whoever is kicked looks at this next.
        self.over.store(true, Ordering::SeqCst);
        for thread in &life.threads {
            // One that has gone by itself needs no signal.
            let _ = thread.kill(vcpu::signal());
        }
        drop(life);
        if let Some(xen) = &self.xen {
            xen.end();
        }
        self.changed.notify_all();
    }

    /// Waits for its end, and for all its threads.
    pub(crate) fn wait(&self) -> End {
        let mut life = self.life();
        let end = loop {
            if let Some((end, _)) = &life.end {
                break end.clone();
            }
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        };
        let threads = std::mem::take(&mut life.threads);
        drop(life);
        for thread in threads {
            // A thread that panicked has told so.
            let _ = thread.join();
        }
        self.ports.close();
        end
    }

    fn device(&self, address: u64) -> Option<(&Arc<dyn Registers>, u64)> {
        let (range, device) = self.devices.iter().find(|(range, _)| range.contains(&address))?;
        Some((device, address - range.start))
    }

    pub(crate) fn read_mmio(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn write_mmio(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }
}
