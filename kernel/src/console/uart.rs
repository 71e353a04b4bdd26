//! The PC's first serial port: a 16550 with FIFOs, input by interrupt.
//!
//! Output is written a FIFO at a time, waiting for the transmitter: every emulator's is at once empty.
// UNSAFETY: port I/O.
#![expect(unsafe_code, reason = "port I/O")]

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use janus_front::class::ConsoleDevice;

use super::{DeviceId, attach, service};
use crate::irq::{IrqError, ioapic};
use crate::platform::native::{inb, outb};

/// COM1's ports and interrupt.
const COM1: u16 = 0x3f8;
const COM1_ISA: u8 = 4;

/// Registers, from the base. Ref: National Semiconductor PC16550D.
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const SCRATCH: u16 = 7;

const LINE_DATA_READY: u8 = 1 << 0;
const LINE_TRANSMITTER_EMPTY: u8 = 1 << 5;
const ENABLE_RECEIVED: u8 = 1 << 0;
/// FIFOs on and cleared, an interrupt for every byte.
const FIFO_ON: u8 = 0b111;
/// DTR, RTS and OUT2, which lets the interrupt out.
const MODEM_INTERRUPTS: u8 = 0b1011;
/// Bytes in the transmit FIFO.
const FIFO_BYTES: usize = 16;
/// Bytes that are taken out of the port before its FIFOs are switched on.
const TYPED_AHEAD: usize = 1024;
/// Looks at the line status before output is taken for stuck.
const PATIENCE: u32 = 100_000;

/// A serial port.
#[derive(Debug)]
pub struct Uart {
    base: u16,
    /// What was typed before the FIFOs were switched on, which clears the receiver.
    typed_ahead: VecDeque<u8>,
}

impl Uart {
    /// The serial port at `base`, if one answers there; set up for FIFOs at the speed the boot code set.
    ///
    /// # Safety
    /// At `base` is a 16550, or nothing, and nobody else drives it.
    #[must_use]
    pub unsafe fn probe(base: u16) -> Option<Self> {
        let mut uart = Self { base, typed_ahead: VecDeque::new() };
        let values = [0x5a, 0xa5];
        if values.iter().any(|value| {
            uart.write_register(SCRATCH, *value);
            uart.read_register(SCRATCH) != *value
        }) {
            return None;
        }
        uart.write_register(MODEM_CONTROL, MODEM_INTERRUPTS);
        while uart.typed_ahead.len() < TYPED_AHEAD && uart.is_ready() {
            let byte = uart.read_register(DATA);
            uart.typed_ahead.push_back(byte);
        }
        uart.write_register(FIFO_CONTROL, FIFO_ON);
        // Read even if nothing is there: QEMU passes on what it holds back for us only after a read, and
        // clearing may have taken the byte whose reading it waits for.
        let ready = uart.is_ready();
        let byte = uart.read_register(DATA);
        if ready {
            uart.typed_ahead.push_back(byte);
        }
        Some(uart)
    }

    fn is_ready(&self) -> bool {
        self.read_register(LINE_STATUS) & LINE_DATA_READY != 0
    }
    fn read_register(&self, register: u16) -> u8 {
        // SAFETY: a register of this port (`probe`'s contract); reading has no effect on memory.
        unsafe { inb(self.base + register) }
    }
    fn write_register(&self, register: u16, value: u8) {
        // SAFETY: as above.
        unsafe { outb(self.base + register, value) }
    }
}

impl ConsoleDevice for Uart {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        for piece in bytes.chunks(FIFO_BYTES) {
            let empty = |_| self.read_register(LINE_STATUS) & LINE_TRANSMITTER_EMPTY != 0;
            if !(0..PATIENCE).any(empty) {
                return written;
            }
            for byte in piece {
                self.write_register(DATA, *byte);
            }
            written += piece.len();
        }
        written
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut count = 0;
        for slot in buf {
            *slot = match self.typed_ahead.pop_front() {
                Some(byte) => byte,
                None if self.is_ready() => self.read_register(DATA),
                None => break,
            };
            count += 1;
        }
        count
    }
}

/// Puts COM1 behind the console, with input by interrupt; nothing happens on a machine without it.
///
/// # Errors
/// Its interrupt could not be had: output works, input does not.
pub(crate) fn init() -> Result<(), IrqError> {
    // SAFETY: COM1's ports, which the boot code has stopped using.
    let Some(uart) = (unsafe { Uart::probe(COM1) }) else { return Ok(()) };
    let id: DeviceId = attach(Box::new(uart));
    ioapic::register_isa(COM1_ISA, "serial", Box::new(move || service(id)))?.keep();
    // SAFETY: COM1 answered, and its handler is in place.
    unsafe { outb(COM1 + INTERRUPT_ENABLE, ENABLE_RECEIVED) }
    // What was typed before.
    service(id);
    Ok(())
}
