//! The I/O APICs: lines of devices that have no messages of their own.
//!
//! Ref: Intel 82093AA. Which line is whose comes from [`crate::firmware`], a device's own description
//! or the command line.
// UNSAFETY: device registers.
#![expect(unsafe_code, reason = "device registers")]

use alloc::vec::Vec;
use core::ptr::NonNull;

use super::{Handler, IrqError, Registration, Source, apic, register_vector};
use crate::firmware::{self, IoApicInfo, Polarity, Trigger};
use crate::mm::paging::{self, MapError};
use crate::platform::lock::IrqLock;

/// Index and data registers, by offset.
const INDEX: usize = 0;
const WINDOW: usize = 0x10;
/// Bytes of registers.
const LENGTH: usize = 0x20;
const VERSION: u32 = 1;
/// The first of the pins' two-word entries.
const REDIRECTION: u32 = 0x10;

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

/// Maps the I/O APICs and masks all their pins.
///
/// # Errors
/// The registers of one could not be mapped.
pub(crate) fn init(list: &[IoApicInfo]) -> Result<(), MapError> {
    for info in list {
        let registers = paging::map_mmio(info.address, LENGTH)?;
        let mut io_apic = IoApic { registers, gsi_base: info.gsi_base, pins: 0 };
        io_apic.pins = (io_apic.read(VERSION) >> 16 & 0xff) + 1;
        for pin in 0..io_apic.pins {
            io_apic.write(REDIRECTION + 2 * pin, MASKED);
        }
        IO_APICS.lock().push(io_apic);
    }
    Ok(())
}

/// A line that is handled; dropping it masks the line and removes the handler.
#[derive(Debug)]
#[must_use = "dropping it masks the line"]
pub struct Line {
    gsi: u32,
    /// Dropped after the line is masked.
    _registration: Registration,
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
        with_pin(self.gsi, |io_apic, pin| io_apic.write(REDIRECTION + 2 * pin, MASKED));
    }
}

fn with_pin<T>(gsi: u32, work: impl FnOnce(&mut IoApic, u32) -> T) -> Option<T> {
    let mut list = IO_APICS.lock();
    let io_apic =
        list.iter_mut().find(|a| gsi.checked_sub(a.gsi_base).is_some_and(|pin| pin < a.pins))?;
    let pin = gsi - io_apic.gsi_base;
    Some(work(io_apic, pin))
}

/// Handles a global system interrupt on this CPU.
///
/// # Errors
/// No I/O APIC has the line, or no vector is left.
pub fn register_gsi(
    gsi: u32,
    trigger: Trigger,
    polarity: Polarity,
    name: &'static str,
    handler: Handler,
) -> Result<Line, IrqError> {
    with_pin(gsi, |_, _| ()).ok_or(IrqError::NoSuchLine)?;
    let registration = register_vector(name, handler)?;
    let Source::Vector(vector) = registration.source() else { return Err(IrqError::NoVector) };
    let mut low = u32::from(vector);
    if trigger == Trigger::Level {
        low |= LEVEL;
    }
    if polarity == Polarity::Low {
        low |= ACTIVE_LOW;
    }
    let destination = apic::id();
    with_pin(gsi, |io_apic, pin| {
        io_apic.write(REDIRECTION + 2 * pin + 1, destination << 24);
        io_apic.write(REDIRECTION + 2 * pin, low);
    });
    Ok(Line { gsi, _registration: registration })
}

/// Handles an ISA interrupt on this CPU, wherever the firmware says that it goes.
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
