//! What every platform shares that owns its (virtual) CPU: the interrupt flag, `hlt`, ports.
// UNSAFETY: executes privileged instructions.
#![expect(unsafe_code, reason = "interrupt flag, hlt and port instructions")]

use core::arch::asm;

use x86_64::instructions::{interrupts, port::Port};

use crate::irq::apic;
use crate::percpu::PerCpu;

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

pub(super) fn wake_cpu(cpu: &PerCpu) {
    apic::send(cpu.apic_id(), u32::from(apic::WAKE_VECTOR));
}

/// Stops this CPU for good.
pub(super) fn halt_forever() -> ! {
    loop {
        interrupts::disable();
        x86_64::instructions::hlt();
    }
}
