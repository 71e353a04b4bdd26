//! What only the byte code of DSDT and SSDTs knows: virtio-mmio devices, the way to soft-off.

use alloc::vec;
use alloc::vec::Vec;
use core::str::FromStr;

use acpi::AcpiError;
use acpi::aml::namespace::{AmlName, NamespaceLevelKind};
use acpi::aml::object::Object;
use acpi::aml::pci_routing::{PciRoutingTable, Pin};
use acpi::aml::resource::{
    InterruptPolarity, InterruptTrigger, MemoryRangeDescriptor, Resource, resource_descriptor_list,
};
use acpi::aml::{AmlError, Interpreter};
use acpi::platform::AcpiPlatform;
use janus_proto::addr::Gpa;
use spin::{Mutex, Once};

use super::handler::KernelHandler;
use super::{MmioDevice, Polarity, Trigger};

/// The interpreter, made when first asked for; none without usable byte code. One user at a time.
static INTERPRETER: Once<Option<Mutex<Interpreter<KernelHandler>>>> = Once::new();

fn interpreter() -> Option<&'static Mutex<Interpreter<KernelHandler>>> {
    let made = INTERPRETER.call_once(|| match make() {
        Ok(interpreter) => Some(Mutex::new(interpreter)),
        Err(error) => {
            log::warn!("ACPI byte code cannot be used: {error:?}");
            None
        }
    });
    made.as_ref()
}

fn make() -> Result<Interpreter<KernelHandler>, AcpiError> {
    let root = super::tables().ok_or(AcpiError::NoValidRsdp)?.root;
    let platform = AcpiPlatform::new(super::parse_root(root)?, KernelHandler)?;
    Interpreter::new_from_platform(&platform)
}

/// The virtio-mmio devices that the byte code declares, in its order.
pub(super) fn virtio_mmio_devices() -> Vec<MmioDevice> {
    let Some(interpreter) = interpreter() else { return Vec::new() };
    let interpreter = interpreter.lock();
    let mut paths = Vec::new();
    // Collected first: evaluating needs the namespace that is walked.
    let walked = interpreter.namespace.lock().traverse(|path, level| {
        if level.kind == NamespaceLevelKind::Device {
            paths.push(path.clone());
        }
        Ok(true)
    });
    if let Err(error) = walked {
        log::warn!("ACPI namespace: {error:?}");
    }
    paths.iter().filter_map(|path| device(&interpreter, path).ok().flatten()).collect()
}

fn device(
    interpreter: &Interpreter<KernelHandler>,
    path: &AmlName,
) -> Result<Option<MmioDevice>, AmlError> {
    let member = |name: &str| AmlName::from_str(name)?.resolve(path);
    let Some(id) = interpreter.evaluate_if_present(member("_HID")?, Vec::new())? else {
        return Ok(None);
    };
    if !matches!(&*id, Object::String(id) if id == "LNRO0005") {
        return Ok(None);
    }
    let resources = resource_descriptor_list(interpreter.evaluate(member("_CRS")?, Vec::new())?)?;
    let memory = resources.iter().find_map(|resource| match resource {
        Resource::MemoryRange(MemoryRangeDescriptor::FixedLocation {
            base_address,
            range_length,
            ..
        }) => Some((u64::from(*base_address), u64::from(*range_length))),
        Resource::AddressSpace(space) => Some((space.address_range.0, space.length)),
        _ => None,
    });
    let interrupt = resources.iter().find_map(|resource| match resource {
        Resource::Irq(irq) => Some(irq),
        _ => None,
    });
    let (Some((base, len)), Some(interrupt)) = (memory, interrupt) else { return Ok(None) };
    Ok(Some(MmioDevice {
        base: Gpa(base),
        len,
        gsi: interrupt.irq,
        trigger: interrupt.trigger.into(),
        polarity: interrupt.polarity.into(),
    }))
}

/// A line of an interrupt controller, as a device is wired to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WiredLine {
    /// Global system interrupt.
    pub gsi: u32,
    /// How it signals.
    pub trigger: Trigger,
    /// Which level means something.
    pub polarity: Polarity,
}

/// Where interrupt pin `pin` (1 to 4) of `device` on PCI bus 0 goes, by the root bridge's `_PRT`
/// (ACPI 6.5, 6.2.13).
#[must_use]
pub fn pci_line(device: u8, pin: u8) -> Option<WiredLine> {
    let pin = match pin {
        1 => Pin::IntA,
        2 => Pin::IntB,
        3 => Pin::IntC,
        4 => Pin::IntD,
        _ => return None,
    };
    let interpreter = interpreter()?.lock();
    match route(&interpreter, device, pin) {
        Ok(line) => Some(line),
        Err(error) => {
            log::warn!("ACPI interrupt routing of PCI device {device:#x}: {error:?}");
            None
        }
    }
}

fn route(
    interpreter: &Interpreter<KernelHandler>,
    device: u8,
    pin: Pin,
) -> Result<WiredLine, AmlError> {
    // The routing depends on the interrupt controller in use: 1 is the I/O APIC (ACPI 6.5, 5.8.1).
    let model = Object::Integer(1).wrap();
    interpreter.evaluate_if_present(AmlName::from_str("\\_PIC")?, vec![model])?;
    let table = PciRoutingTable::from_prt_path(AmlName::from_str("\\_SB.PCI0._PRT")?, interpreter)?;
    let line = table.route(device.into(), 0, pin, interpreter)?;
    Ok(WiredLine { gsi: line.irq, trigger: line.trigger.into(), polarity: line.polarity.into() })
}

impl From<InterruptTrigger> for Trigger {
    fn from(trigger: InterruptTrigger) -> Self {
        match trigger {
            InterruptTrigger::Edge => Self::Edge,
            InterruptTrigger::Level => Self::Level,
        }
    }
}

impl From<InterruptPolarity> for Polarity {
    fn from(polarity: InterruptPolarity) -> Self {
        match polarity {
            InterruptPolarity::ActiveHigh => Self::High,
            InterruptPolarity::ActiveLow => Self::Low,
        }
    }
}

/// The SLP_TYP values of soft-off for PM1a and PM1b, from `\_S5` (ACPI 6.5, 7.4.2).
#[must_use]
pub fn soft_off_values() -> Option<(u8, u8)> {
    let interpreter = interpreter()?.lock();
    let package =
        interpreter.evaluate_if_present(AmlName::from_str("\\_S5").ok()?, Vec::new()).ok()??;
    let Object::Package(elements) = &*package else { return None };
    let value = |index: usize| {
        let element = elements.get(index)?;
        u8::try_from(element.as_integer().ok()? & 7).ok()
    };
    let first = value(0)?;
    Some((first, value(1).unwrap_or(first)))
}
