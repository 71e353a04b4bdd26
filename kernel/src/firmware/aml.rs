//! What only the byte code of DSDT and SSDTs knows: virtio-mmio devices, the way to soft-off.

use alloc::vec::Vec;
use core::str::FromStr;

use acpi::AcpiError;
use acpi::aml::namespace::{AmlName, NamespaceLevelKind};
use acpi::aml::object::Object;
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

fn device(interpreter: &Interpreter<KernelHandler>, path: &AmlName) -> Result<Option<MmioDevice>, AmlError> {
    let member = |name: &str| AmlName::from_str(name)?.resolve(path);
    let Some(id) = interpreter.evaluate_if_present(member("_HID")?, Vec::new())? else { return Ok(None) };
    if !matches!(&*id, Object::String(id) if id == "LNRO0005") {
        return Ok(None);
    }
    let resources = resource_descriptor_list(interpreter.evaluate(member("_CRS")?, Vec::new())?)?;
    let memory = resources.iter().find_map(|resource| match resource {
        Resource::MemoryRange(MemoryRangeDescriptor::FixedLocation { base_address, range_length, .. }) => {
            Some((u64::from(*base_address), u64::from(*range_length)))
        }
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
        trigger: match interrupt.trigger {
            InterruptTrigger::Edge => Trigger::Edge,
            InterruptTrigger::Level => Trigger::Level,
        },
        polarity: match interrupt.polarity {
            InterruptPolarity::ActiveHigh => Polarity::High,
            InterruptPolarity::ActiveLow => Polarity::Low,
        },
    }))
}

/// The SLP_TYP values of soft-off for PM1a and PM1b, from `\_S5` (ACPI 6.5, 7.4.2).
#[must_use]
pub fn soft_off_values() -> Option<(u8, u8)> {
    let interpreter = interpreter()?.lock();
    let package = interpreter.evaluate_if_present(AmlName::from_str("\\_S5").ok()?, Vec::new()).ok()??;
    let Object::Package(elements) = &*package else { return None };
    let value = |index: usize| {
        let element = elements.get(index)?;
        u8::try_from(element.as_integer().ok()? & 7).ok()
    };
    let first = value(0)?;
    Some((first, value(1).unwrap_or(first)))
}
