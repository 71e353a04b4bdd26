//! Interrupts and events: who handles which, how often each came, and the timer.
//!
//! A [`Source`] is a CPU vector (APIC, MSI, IOAPIC lines) or a Xen event channel port. Both have the
//! same life: [`register`] a handler, the entry code calls [`dispatch`], dropping the [`Registration`]
//! removes it. Handlers run with interrupts masked; they look at their device or call
//! `sync::Notify::notify`, and leave the work to tasks.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use janus_proto::addr::Port;

use crate::platform::lock::IrqLock;
use crate::{percpu, smp};

pub mod apic;
pub mod evtchn;
pub mod ioapic;
pub mod msi;
pub mod pic;

/// Where an interruption comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A vector of the CPU's interrupt table.
    Vector(u8),
    /// An event channel port.
    Event(Port),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vector(vector) => write!(f, "vector {vector:#x}"),
            Self::Event(port) => write!(f, "event {port}"),
        }
    }
}

/// Why a handler could not be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqError {
    /// All vectors are in use.
    NoVector,
    /// The source has a handler already.
    Taken,
    /// The port number is beyond what this kernel's tables hold.
    OutOfRange,
    /// No interrupt controller has this line.
    NoSuchLine,
    /// The platform has no interrupts of this kind.
    NotHere,
}

impl fmt::Display for IrqError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoVector => "no free interrupt vector",
            Self::Taken => "the interrupt has a handler already",
            Self::OutOfRange => "the event channel port is out of range",
            Self::NoSuchLine => "no interrupt controller has this line",
            Self::NotHere => "the platform has no interrupts of this kind",
        })
    }
}

/// What runs when an interrupt comes: with interrupts masked, so short and without waiting.
pub type Handler = Box<dyn Fn() + Send + Sync>;

struct Entry {
    name: &'static str,
    count: AtomicU64,
    handler: Handler,
}

/// Handlers by source.
struct Table {
    slots: IrqLock<Vec<Option<Arc<Entry>>>>,
}

/// Ports that the 2-level event channel ABI has (`xen.h`, `NR_EVENT_CHANNELS_2L` on 64 bits).
const MAX_PORTS: usize = 4096;
/// The first vector for devices; those below are the CPU's exceptions.
const FIRST_VECTOR: u8 = 0x20;
/// The vector of Xen's event upcall to PVH guests: delivered without the APIC, so without its end of interrupt.
pub(crate) const XEN_UPCALL_VECTOR: u8 = 0xf3;
/// One past the last vector for devices; those above are the APIC's own ([`apic`]) and Xen's upcall.
const LAST_VECTOR: u8 = 0xe0;

static VECTORS: Table = Table { slots: IrqLock::new(Vec::new()) };
static PORTS: Table = Table { slots: IrqLock::new(Vec::new()) };
/// Interrupts that nobody had asked for.
static STRAY: AtomicU64 = AtomicU64::new(0);

fn place(source: Source) -> Result<(&'static Table, usize), IrqError> {
    match source {
        Source::Vector(vector) => Ok((&VECTORS, usize::from(vector))),
        Source::Event(port) => {
            let index = usize::try_from(port.0).map_err(|_| IrqError::OutOfRange)?;
            if index < MAX_PORTS { Ok((&PORTS, index)) } else { Err(IrqError::OutOfRange) }
        }
    }
}

/// A handler that is installed; dropping it removes the handler (the source itself is its owner's to silence first).
#[derive(Debug)]
#[must_use = "dropping it removes the handler"]
pub struct Registration {
    source: Source,
}

impl Registration {
    /// What it handles.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }
    /// Keeps the handler for good.
    pub fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Ok((table, index)) = place(self.source) else { return };
        let old = table.slots.lock().get_mut(index).and_then(Option::take);
        // Freed here, after the lock: dropping a handler runs its captures' destructors.
        drop(old);
    }
}

/// Installs a handler for a source.
///
/// # Errors
/// See [`IrqError`].
pub fn register(
    source: Source,
    name: &'static str,
    handler: Handler,
) -> Result<Registration, IrqError> {
    let (table, index) = place(source)?;
    let entry = Arc::new(Entry { name, count: AtomicU64::new(0), handler });
    let mut slots = table.slots.lock();
    if slots.len() <= index {
        slots.resize(index + 1, None);
    }
    let slot = slots.get_mut(index).ok_or(IrqError::OutOfRange)?;
    if slot.is_some() {
        return Err(IrqError::Taken);
    }
    *slot = Some(entry);
    Ok(Registration { source })
}

/// Installs a handler for a free vector; [`Registration::source`] says which.
///
/// # Errors
/// See [`IrqError`].
pub fn register_vector(name: &'static str, handler: Handler) -> Result<Registration, IrqError> {
    let entry = Arc::new(Entry { name, count: AtomicU64::new(0), handler });
    let mut slots = VECTORS.slots.lock();
    if slots.len() < 256 {
        slots.resize(256, None);
    }
    for vector in FIRST_VECTOR..LAST_VECTOR {
        if let Some(slot @ None) = slots.get_mut(usize::from(vector)) {
            *slot = Some(entry);
            return Ok(Registration { source: Source::Vector(vector) });
        }
    }
    Err(IrqError::NoVector)
}

/// Runs the handler of a source; called by entry code with interrupts masked.
pub fn dispatch(source: Source) {
    let entry = place(source)
        .ok()
        .and_then(|(table, index)| table.slots.lock().get(index).cloned().flatten());
    match entry {
        Some(entry) => {
            entry.count.fetch_add(1, Ordering::Relaxed);
            (entry.handler)();
        }
        None => {
            STRAY.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A handler in the list that [`list`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What it handles.
    pub source: Source,
    /// What it was registered as.
    pub name: &'static str,
    /// How often it ran.
    pub count: u64,
}

/// All handlers, and how many interrupts nobody handled.
#[must_use]
pub fn list() -> (Vec<Listed>, u64) {
    let mut list = Vec::new();
    let mut add = |table: &Table, source: fn(usize) -> Source| {
        let slots = table.slots.lock().clone();
        for (index, entry) in slots.iter().enumerate() {
            if let Some(entry) = entry {
                let count = entry.count.load(Ordering::Relaxed);
                list.push(Listed { source: source(index), name: entry.name, count });
            }
        }
    };
    add(&VECTORS, |index| Source::Vector(u8::try_from(index).unwrap_or(u8::MAX)));
    add(&PORTS, |index| Source::Event(Port(u32::try_from(index).unwrap_or(u32::MAX))));
    (list, STRAY.load(Ordering::Relaxed))
}

/// A CPU vector has interrupted: called by the native entry code with interrupts masked.
pub(crate) fn interrupt(vector: u8) {
    let depth = &percpu::current().in_interrupt;
    depth.fetch_add(1, Ordering::Relaxed);
    match vector {
        apic::SPURIOUS_VECTOR => {}
        XEN_UPCALL_VECTOR => evtchn::upcall(),
        // These only end a wait.
        apic::TIMER_VECTOR | apic::WAKE_VECTOR => apic::end_of_interrupt(),
        apic::FLUSH_VECTOR => {
            smp::attend();
            apic::end_of_interrupt();
        }
        _ => {
            dispatch(Source::Vector(vector));
            apic::end_of_interrupt();
        }
    }
    depth.fetch_sub(1, Ordering::Relaxed);
}
