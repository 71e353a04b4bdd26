//! The I/O APICs: lines of devices that have no messages of their own.
//!
//! Ref: Intel 82093AA. Which line is whose comes from [`crate::firmware`], a device's own description
//! or the command line.
// UNSAFETY: device registers.
#![expect(unsafe_code, reason = "device registers")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use janus_proto::addr::Gpa;

use super::{Handler, IrqError, Registration, Source, register_vector};
use crate::firmware::{self, IoApicInfo, Polarity, Trigger};
use crate::mm::paging::{self, MapError};
use crate::percpu;
use crate::platform::lock::IrqLock;

/// Index and data registers, by offset.
const INDEX: usize = 0;
const WINDOW: usize = 0x10;
/// Bytes of registers.
const LENGTH: usize = 0x20;
const VERSION: u32 = 1;
/// The first of the pins' two-word entries.
const REDIRECTION: u32 = 0x10;

/// What is read where no device is.
const NOTHING: u32 = u32::MAX;

/// Where the first I/O APIC of a PC is, unless tables say otherwise (Intel 82093AA, 3.0).
pub(crate) const USUAL_ADDRESS: Gpa = Gpa(0xfec0_0000);

const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;

struct IoApic {
    registers: NonNull<u8>,
    gsi_base: u32,
    pins: u32,
}

// SAFETY: device registers, mapped for good; the lock around the list serialises their users.
unsafe impl Send for IoApic {}

impl IoApic {
    fn read(&mut self, register: u32) -> u32 {
        self.select(register);
        // SAFETY: the data register, mapped uncached by `init`.
        unsafe { self.registers.add(WINDOW).cast::<u32>().read_volatile() }
    }
    fn write(&mut self, register: u32, value: u32) {
        self.select(register);
        // SAFETY: as above.
        unsafe { self.registers.add(WINDOW).cast::<u32>().write_volatile(value) }
    }
    fn select(&mut self, register: u32) {
        // SAFETY: the index register, mapped uncached by `init`.
        unsafe { self.registers.add(INDEX).cast::<u32>().write_volatile(register) }
    }
}

static IO_APICS: IrqLock<Vec<IoApic>> = IrqLock::new(Vec::new());

/// Maps the I/O APICs and masks all their pins; leaves out what is not there.
///
/// # Errors
/// The registers of one could not be mapped.
pub(crate) fn init(list: &[IoApicInfo]) -> Result<(), MapError> {
    for info in list {
        let registers = paging::map_mmio(info.address, LENGTH)?;
        let mut io_apic = IoApic { registers, gsi_base: info.gsi_base, pins: 0 };
        let version = io_apic.read(VERSION);
        if version == NOTHING {
            continue;
        }
        io_apic.pins = (version >> 16 & 0xff) + 1;
        for pin in 0..io_apic.pins {
            io_apic.write(REDIRECTION + 2 * pin, MASKED);
        }
        IO_APICS.lock().push(io_apic);
    }
    Ok(())
}

/// Handlers with their lines' numbers.
type Handlers = IrqLock<Vec<(u64, Arc<Handler>)>>;

/// The handlers of one pin. A level line may have several, whose devices all look whether it was theirs.
struct Pin {
    gsi: u32,
    /// As it was programmed: who joins must agree.
    low: u32,
    handlers: Arc<Handlers>,
    /// The vector, dropped after the pin is masked.
    _registration: Registration,
}

static PINS: IrqLock<Vec<Pin>> = IrqLock::new(Vec::new());
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A line that is handled; dropping it removes the handler, and masks the line if it was the last.
#[derive(Debug)]
#[must_use = "dropping it removes the handler"]
pub struct Line {
    gsi: u32,
    id: u64,
}

impl Line {
    /// The global system interrupt.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
    /// Keeps the handler for good.
    pub fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut pins = PINS.lock();
        let Some(index) = pins.iter().position(|pin| pin.gsi == self.gsi) else { return };
        let Some(pin) = pins.get(index) else { return };
        let mut handlers = pin.handlers.lock();
        let mine = handlers.iter().position(|(id, _)| *id == self.id);
        let gone = mine.map(|mine| handlers.swap_remove(mine));
        let last = handlers.is_empty();
        drop(handlers);
        let unused = last.then(|| {
            with_pin(self.gsi, |io_apic, pin| io_apic.write(REDIRECTION + 2 * pin, MASKED));
            pins.swap_remove(index)
        });
        // What the handlers hold is freed without a lock.
        drop(pins);
        drop((gone, unused));
    }
}

fn with_pin<T>(gsi: u32, work: impl FnOnce(&mut IoApic, u32) -> T) -> Option<T> {
    let mut list = IO_APICS.lock();
    let io_apic =
        list.iter_mut().find(|a| gsi.checked_sub(a.gsi_base).is_some_and(|pin| pin < a.pins))?;
    let pin = gsi - io_apic.gsi_base;
    Some(work(io_apic, pin))
}

/// Handles a global system interrupt on the first CPU, which always runs. Level lines can be shared.
///
/// # Errors
/// No I/O APIC has the line, no vector is left, or the line is taken: edges are lost when shared, and a line has one
/// trigger and polarity.
pub fn register_gsi(
    gsi: u32,
    trigger: Trigger,
    polarity: Polarity,
    name: &'static str,
    handler: Handler,
) -> Result<Line, IrqError> {
    with_pin(gsi, |_, _| ()).ok_or(IrqError::NoSuchLine)?;
    let mut low = 0;
    if trigger == Trigger::Level {
        low |= LEVEL;
    }
    if polarity == Polarity::Low {
        low |= ACTIVE_LOW;
    }
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let handler = Arc::new(handler);
    let mut pins = PINS.lock();
    if let Some(pin) = pins.iter().find(|pin| pin.gsi == gsi) {
        if trigger != Trigger::Level || pin.low != low {
            return Err(IrqError::Taken);
        }
        pin.handlers.lock().push((id, handler));
        return Ok(Line { gsi, id });
    }
    let handlers = Arc::new(IrqLock::new(alloc::vec![(id, handler)]));
    let shared = Arc::clone(&handlers);
    let registration = register_vector(name, Box::new(move || run_all(&shared)))?;
    let Source::Vector(vector) = registration.source() else { return Err(IrqError::NoVector) };
    let destination = percpu::first().apic_id();
    with_pin(gsi, |io_apic, pin| {
        io_apic.write(REDIRECTION + 2 * pin + 1, destination << 24);
        io_apic.write(REDIRECTION + 2 * pin, low | u32::from(vector));
    });
    pins.push(Pin { gsi, low, handlers, _registration: registration });
    Ok(Line { gsi, id })
}

/// Calls the handlers of a line, one after the other; without the lock, which they may need.
fn run_all(handlers: &Handlers) {
    for index in 0.. {
        let Some((_, handler)) = handlers.lock().get(index).cloned() else { return };
        handler();
    }
}

/// Handles an ISA interrupt, wherever the firmware says that it goes.
///
/// # Errors
/// As [`register_gsi`].
pub fn register_isa(isa: u8, name: &'static str, handler: Handler) -> Result<Line, IrqError> {
    let exception =
        firmware::tables().and_then(|tables| tables.overrides.iter().find(|o| o.isa == isa));
    match exception {
        Some(o) => register_gsi(o.gsi, o.trigger, o.polarity, name, handler),
        None => register_gsi(u32::from(isa), Trigger::Edge, Polarity::High, name, handler),
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_handler_of_a_line_runs_even_when_one_leaves_meanwhile() {
        static RAN: AtomicUsize = AtomicUsize::new(0);
        let handlers = Arc::new(IrqLock::new(Vec::new()));
        let counting = || -> Handler {
            Box::new(|| {
                RAN.fetch_add(1, Ordering::Relaxed);
            })
        };
        let same = Arc::clone(&handlers);
        let leaving: Handler = Box::new(move || drop(same.lock().pop()));
        handlers.lock().extend([
            (0, Arc::new(counting())),
            (1, Arc::new(counting())),
            (2, Arc::new(leaving)),
        ]);
        run_all(&handlers);
        assert_eq!((RAN.load(Ordering::Relaxed), handlers.lock().len()), (2, 2));
        run_all(&handlers);
        assert_eq!(RAN.load(Ordering::Relaxed), 4);
    }
}
