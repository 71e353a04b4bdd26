//! Power off, reset and the power button through ACPI's fixed hardware (ACPI 6.5, 4.8), or the power button through
//! the generic event device of a machine that has none (5.6.9).
// UNSAFETY: writes the firmware's power registers.
#![expect(unsafe_code, reason = "power registers")]

use alloc::boxed::Box;
use core::ptr::NonNull;

use x86_64::instructions::port::Port;

use super::{Request, request};
use crate::firmware::{self, Polarity, PowerHardware, PowerRegister, Trigger};
use crate::irq::{IrqError, ioapic};
use crate::mm::paging;
use crate::platform;

/// PM1 control: the firmware routes events to the kernel (bit 0), sleep type (bits 10 to 12), go (bit 13).
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// The sleep control register of hardware-reduced machines: type in bits 2 to 4, go in bit 5.
const REDUCED_TYPE_SHIFT: u32 = 2;
const REDUCED_ENABLE: u8 = 1 << 5;
/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// How long the firmware may take to hand over, and a machine to switch off.
const PATIENCE_NS: u64 = 100_000_000;

fn read_port(port: u16) -> u16 {
    // SAFETY: a PM1 register that the FADT names; reading has no effect.
    unsafe { Port::new(port).read() }
}

fn write_port(port: u16, value: u16) {
    // SAFETY: a PM1 register that the FADT names.
    unsafe { Port::new(port).write(value) }
}

fn write_register(register: PowerRegister, value: u8) {
    match register {
        PowerRegister::Port(port) => {
            // SAFETY: a register that the FADT names for this value.
            unsafe { Port::new(port).write(value) }
        }
        PowerRegister::Memory(address) => {
            if let Ok(register) = paging::map_mmio(address, 1) {
                // SAFETY: a register that the FADT names, just mapped.
                unsafe { register.write_volatile(value) }
            }
        }
    }
}

fn wait_until(done: impl Fn() -> bool) -> bool {
    let end_ns = platform::now_ns().saturating_add(PATIENCE_NS);
    while !done() {
        if platform::now_ns() > end_ns {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Switches the machine off (S5); comes back if it does not go.
pub(super) fn soft_off() {
    let Some(firmware) = firmware::tables() else { return };
    let power = &firmware.power;
    let Some((type_a, type_b)) = firmware::soft_off_values() else { return };
    if let Some(register) = power.sleep_control {
        write_register(register, type_a << REDUCED_TYPE_SHIFT | REDUCED_ENABLE);
    }
    for (port, sleep_type) in power.control.iter().zip([type_a, type_b]) {
        if let Some(port) = *port {
            let control = read_port(port) & !SLEEP_TYPE_MASK;
            write_port(port, control | u16::from(sleep_type) << SLEEP_TYPE_SHIFT | SLEEP_ENABLE);
        }
    }
    wait_until(|| false);
}

/// Resets the machine by the register that the FADT names; comes back if there is none or it does not work.
pub(super) fn reset() {
    let Some((register, value)) = firmware::tables().and_then(|firmware| firmware.power.reset)
    else {
        return;
    };
    write_register(register, value);
    wait_until(|| false);
}

/// Takes power events over from the firmware and listens to the power button.
///
/// # Errors
/// The interrupt could not be had.
pub(crate) fn init() -> Result<(), IrqError> {
    let Some(firmware) = firmware::tables() else { return Ok(()) };
    let power = firmware.power;
    if power.is_reduced {
        return listen_to_events();
    }
    if !power.fixed_power_button || power.events.iter().all(Option::is_none) {
        return Ok(());
    }
    if !take_over(&power) {
        log::warn!("the firmware keeps the power button to itself");
        return Ok(());
    }
    let handler = Box::new(move || {
        let mut pressed = false;
        for port in power.events.iter().flatten() {
            if read_port(*port) & POWER_BUTTON != 0 {
                // Writing the bit clears it, and with it the level-triggered interrupt.
                write_port(*port, POWER_BUTTON);
                pressed = true;
            }
        }
        if pressed {
            request(Request::PowerOff);
        }
    });
    // Ref: ACPI 6.5, 5.2.9: level, active low, unless the MADT overrides it.
    let exception =
        firmware.overrides.iter().find(|o| o.gsi == power.sci || u32::from(o.isa) == power.sci);
    let (gsi, trigger, polarity) = exception
        .map_or((power.sci, Trigger::Level, Polarity::Low), |o| (o.gsi, o.trigger, o.polarity));
    ioapic::register_gsi(gsi, trigger, polarity, "acpi", handler)?.keep();
    for port in power.events.iter().flatten() {
        // The enable half follows the status half; nothing but the button is wanted.
        write_port(*port, POWER_BUTTON);
        write_port(*port + u16::from(power.event_length / 2), POWER_BUTTON);
    }
    Ok(())
}

/// Listens to the power button of a machine without fixed power hardware.
fn listen_to_events() -> Result<(), IrqError> {
    let Some(device) = firmware::event_device() else { return Ok(()) };
    let Ok(selector) = paging::map_mmio(device.selector, size_of::<u32>()) else {
        log::warn!("the power button's register is nowhere");
        return Ok(());
    };
    let selector = Selector(selector.cast());
    let handler = Box::new(move || {
        if selector.take() & device.power_button != 0 {
            request(Request::PowerOff);
        }
    });
    ioapic::register_gsi(device.gsi, device.trigger, device.polarity, "acpi events", handler)?
        .keep();
    Ok(())
}

/// The register of the generic event device.
struct Selector(NonNull<u32>);

// SAFETY: a device register, mapped for good; it is only read.
unsafe impl Send for Selector {}
// SAFETY: as above; the device serialises reads.
unsafe impl Sync for Selector {}

impl Selector {
    /// What has happened since the last reading, which clears it.
    fn take(&self) -> u32 {
        // SAFETY: the register that the byte code names, mapped uncached for good.
        unsafe { self.0.read_volatile() }
    }
}

/// Makes the firmware route events to the kernel; answers whether it does.
fn take_over(power: &PowerHardware) -> bool {
    let Some(control) = power.control.iter().flatten().next() else { return false };
    let ours = || read_port(*control) & SCI_ENABLE != 0;
    if ours() {
        return true;
    }
    let Some((port, value)) = power.enable else { return false };
    write_register(PowerRegister::Port(port), value);
    wait_until(ours)
}
