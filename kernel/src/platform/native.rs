//! What every platform shares that owns its (virtual) CPU: the interrupt flag, `hlt`, ports.
// UNSAFETY: executes privileged instructions.
#![expect(unsafe_code, reason = "interrupt flag, hlt and port instructions")]

use core::arch::asm;

use x86_64::instructions::{interrupts, port::Port};

/// The first serial port of a PC.
const COM1: u16 = 0x3f8;
/// Line status register, from the base; bit 5: the transmitter takes another FIFO of bytes.
const LSR: u16 = 5;
const LSR_THR_EMPTY: u8 = 1 << 5;
/// Bytes in a 16550's transmit FIFO.
const FIFO: usize = 16;
/// Tries before a silent transmitter is taken for a missing one.
const PATIENCE: u32 = 10_000;

/// Reads a byte from an I/O port.
///
/// # Safety
/// Reading this port has no effect on memory.
#[inline]
pub unsafe fn inb(port: u16) -> u8 {
    // SAFETY: the caller's promise.
    unsafe { Port::new(port).read() }
}

/// Writes a byte to an I/O port.
///
/// # Safety
/// What the device does with it keeps to Rust's rules: no writes to memory that is in use.
#[inline]
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { Port::new(port).write(value) }
}

/// Writes to COM1, a FIFO at a time; newlines get their carriage return.
pub(super) fn early_write(bytes: &[u8]) {
    let mut room = 0;
    for &byte in bytes {
        if byte == b'\n' {
            put(&mut room, b'\r');
        }
        put(&mut room, byte);
    }
}

fn put(room: &mut usize, byte: u8) {
    if *room == 0 {
        // SAFETY: reading COM1's line status affects the serial port only.
        let ready = (0..PATIENCE).any(|_| unsafe { inb(COM1 + LSR) } & LSR_THR_EMPTY != 0);
        if !ready {
            return;
        }
        *room = FIFO;
    }
    // SAFETY: COM1's transmit register; a machine without the port ignores the write.
    unsafe { outb(COM1, byte) }
    *room -= 1;
}

#[inline]
pub(super) fn irqs_enabled() -> bool {
    interrupts::are_enabled()
}

#[inline]
pub(super) fn disable_irqs() {
    interrupts::disable();
}

/// # Safety
/// As [`super::enable_irqs`].
#[inline]
pub(super) unsafe fn enable_irqs() {
    interrupts::enable();
}

/// `sti` takes effect after the next instruction, so no interrupt falls between it and `hlt`.
#[inline]
pub(super) fn idle_wait() {
    // SAFETY: called with interrupts masked and nothing locked (`idle_wait`'s contract); handlers run
    // between `hlt` and `cli` as they would anywhere else.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
}

/// Stops this CPU for good.
pub(super) fn halt_forever() -> ! {
    loop {
        interrupts::disable();
        x86_64::instructions::hlt();
    }
}
