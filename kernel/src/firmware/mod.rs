//! What the firmware's ACPI tables say: interrupt controllers, PCI configuration space, power.
//!
//! The fixed tables (MADT, FADT, MCFG) are read once at boot, which is cheap. The DSDT's byte code is
//! interpreted only when somebody asks for what only it knows ([`virtio_mmio_devices`],
//! [`soft_off_values`]). Ref: ACPI 6.5, 5.2.
// UNSAFETY: reads tables at the addresses that the firmware gives.
#![expect(unsafe_code, reason = "firmware tables are raw memory")]

use alloc::vec::Vec;

use acpi::sdt::fadt::Fadt;
use acpi::sdt::madt::{Madt, MadtEntry};
use acpi::sdt::mcfg::Mcfg;
use acpi::{AcpiError, AcpiTables};
use janus_proto::addr::Gpa;
use spin::Once;

use handler::KernelHandler;

mod aml;
mod dsdt;
mod handler;

pub use aml::{WiredLine, pci_line, soft_off_values};

/// A virtio-mmio device that the byte code declares (`_HID` "LNRO0005").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Its registers.
    pub base: Gpa,
    /// Bytes of them.
    pub len: u64,
    /// Its interrupt.
    pub gsi: u32,
    /// How that signals.
    pub trigger: Trigger,
    /// Which level means something.
    pub polarity: Polarity,
}

/// The generic event device of a machine without fixed power hardware (ACPI 6.5, 5.6.9), as far as it tells of the
/// power button.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventDevice {
    /// A word that says what has happened since it was last read.
    pub selector: Gpa,
    /// Its bit for the power button.
    pub power_button: u32,
    /// Its interrupt.
    pub gsi: u32,
    /// How that signals.
    pub trigger: Trigger,
    /// Which level means something.
    pub polarity: Polarity,
}

/// The generic event device, if the byte code declares one with a power button in the way that is known here.
#[must_use]
pub fn event_device() -> Option<EventDevice> {
    dsdt::event_device(read_byte_code(tables()?.root)?)
}

/// The virtio-mmio devices that the byte code declares, in its order.
#[must_use]
pub fn virtio_mmio_devices() -> Vec<MmioDevice> {
    let Some(firmware) = tables() else { return Vec::new() };
    match read_byte_code(firmware.root) {
        Some(code) => dsdt::virtio_mmio(code).unwrap_or_else(aml::virtio_mmio_devices),
        None => Vec::new(),
    }
}

/// The DSDT's byte code, as it lies in memory.
fn read_byte_code(root: Gpa) -> Option<&'static [u8]> {
    let table = parse_root(root).ok()?.dsdt().ok()?;
    let (address, len) = (table.phys_address, usize::try_from(table.length).ok()?);
    handler::map(address, len);
    // SAFETY: mapped for good by `map`, as long as the table's header says; nobody writes firmware tables.
    let table =
        unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(address), len) };
    table.get(size_of::<acpi::sdt::SdtHeader>()..)
}

/// How a line signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// By a change.
    Edge,
    /// By a level that stays until the device is served.
    Level,
}

/// Which level of a line means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polarity {
    /// High, or rising.
    High,
    /// Low, or falling.
    Low,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicInfo {
    /// Where its registers are.
    pub address: Gpa,
    /// The global system interrupt of its first pin.
    pub gsi_base: u32,
}

/// Where an ISA interrupt really goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaOverride {
    /// The ISA number.
    pub isa: u8,
    /// The global system interrupt.
    pub gsi: u32,
    /// How it signals.
    pub trigger: Trigger,
    /// Which level means something.
    pub polarity: Polarity,
}

/// A piece of PCI configuration space in memory (PCI Firmware Specification 3.2, 4.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamRegion {
    /// Where the configuration space of bus 0 would start.
    pub base: Gpa,
    /// The PCI segment group.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
}

/// A register of the firmware's power hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRegister {
    /// An I/O port.
    Port(u16),
    /// A byte in memory.
    Memory(Gpa),
}

/// The power hardware (ACPI 6.5, 4.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerHardware {
    /// The system control interrupt, as global system interrupt.
    pub sci: u32,
    /// PM1a and PM1b event blocks: status, then enable, [`Self::event_length`] bytes together.
    pub events: [Option<u16>; 2],
    /// Bytes in an event block.
    pub event_length: u8,
    /// PM1a and PM1b control registers.
    pub control: [Option<u16>; 2],
    /// The sleep control register of hardware-reduced machines.
    pub sleep_control: Option<PowerRegister>,
    /// The reset register and the value that resets.
    pub reset: Option<(PowerRegister, u8)>,
    /// Where and with what the SCI is switched from the firmware to the kernel; none if it is already.
    pub enable: Option<(u16, u8)>,
    /// The power button reports in the event block (and not by a control method).
    pub fixed_power_button: bool,
    /// There is no fixed power hardware at all.
    pub is_reduced: bool,
}

/// What the fixed tables say.
#[derive(Debug)]
pub struct Firmware {
    /// The I/O APICs.
    pub io_apics: Vec<IoApicInfo>,
    /// ISA interrupts that are not what their number says.
    pub overrides: Vec<IsaOverride>,
    /// APIC ids of the processors that can be used.
    pub processors: Vec<u32>,
    /// PCI configuration space in memory; empty on machines without PCI.
    pub ecam: Vec<EcamRegion>,
    /// The power hardware, if the FADT describes any.
    pub power: PowerHardware,
    root: Gpa,
}

static FIRMWARE: Once<Firmware> = Once::new();

/// What the fixed tables say; none before boot has read them, or without ACPI.
#[must_use]
pub fn tables() -> Option<&'static Firmware> {
    FIRMWARE.get()
}

/// Reads the fixed tables from the root pointer `rsdp`.
///
/// # Errors
/// The root pointer is not one. Missing tables only leave their part empty.
pub(crate) fn init(rsdp: Gpa) -> Result<&'static Firmware, AcpiError> {
    let tables = parse_root(rsdp)?;
    let mut firmware = Firmware {
        io_apics: Vec::new(),
        overrides: Vec::new(),
        processors: Vec::new(),
        ecam: Vec::new(),
        power: PowerHardware::default(),
        root: rsdp,
    };
    if let Some(madt) = tables.find_table::<Madt>() {
        for entry in madt.get().entries() {
            read_madt_entry(&mut firmware, &entry);
        }
    }
    if let Some(mcfg) = tables.find_table::<Mcfg>() {
        firmware.ecam.extend(mcfg.entries().iter().map(|entry| EcamRegion {
            base: Gpa(entry.base_address),
            segment: entry.pci_segment_group,
            first_bus: entry.bus_number_start,
            last_bus: entry.bus_number_end,
        }));
    }
    if let Some(fadt) = tables.find_table::<Fadt>() {
        firmware.power = power_hardware(&fadt);
    }
    Ok(FIRMWARE.call_once(|| firmware))
}

fn parse_root(rsdp: Gpa) -> Result<AcpiTables<KernelHandler>, AcpiError> {
    let address = usize::try_from(rsdp.0).map_err(|_| AcpiError::NoValidRsdp)?;
    // SAFETY: the loader, or a search of the firmware's area for the signature, gave this address.
    unsafe { AcpiTables::from_rsdp(KernelHandler, address) }
}

fn read_madt_entry(firmware: &mut Firmware, entry: &MadtEntry<'_>) {
    const ENABLED: u32 = 1 << 0;
    match entry {
        MadtEntry::IoApic(entry) => firmware.io_apics.push(IoApicInfo {
            address: Gpa(u64::from(entry.io_apic_address)),
            gsi_base: entry.global_system_interrupt_base,
        }),
        MadtEntry::LocalApic(entry) if entry.flags & ENABLED != 0 => {
            firmware.processors.push(u32::from(entry.apic_id));
        }
        MadtEntry::LocalX2Apic(entry) if entry.flags & ENABLED != 0 => {
            firmware.processors.push(entry.x2apic_id);
        }
        MadtEntry::InterruptSourceOverride(entry) => {
            // MPS INTI flags (ACPI 6.5, table 5.26); an ISA line is edge-triggered, active high by default.
            let flags = entry.flags;
            firmware.overrides.push(IsaOverride {
                isa: entry.irq,
                gsi: entry.global_system_interrupt,
                trigger: if flags >> 2 & 0b11 == 0b11 { Trigger::Level } else { Trigger::Edge },
                polarity: if flags & 0b11 == 0b11 { Polarity::Low } else { Polarity::High },
            });
        }
        _ => {}
    }
}

fn power_hardware(fadt: &Fadt) -> PowerHardware {
    use acpi::address::{AddressSpace, GenericAddress};

    let port = |address: GenericAddress| match address.address_space {
        AddressSpace::SystemIo => u16::try_from(address.address).ok().filter(|port| *port != 0),
        _ => None,
    };
    let register = |address: GenericAddress| match address.address_space {
        AddressSpace::SystemIo => port(address).map(PowerRegister::Port),
        AddressSpace::SystemMemory if address.address != 0 => {
            Some(PowerRegister::Memory(Gpa(address.address)))
        }
        _ => None,
    };
    // Copied out: the table is packed.
    let flags = fadt.flags;
    let (smi_command, enable) = (fadt.smi_cmd_port, fadt.acpi_enable);
    let reduced = flags.system_is_hw_reduced_acpi();
    let fixed = |address: Result<GenericAddress, AcpiError>| {
        address.ok().filter(|_| !reduced).and_then(port)
    };
    let optional = |address: Result<Option<GenericAddress>, AcpiError>| {
        address.ok().flatten().filter(|_| !reduced).and_then(port)
    };
    PowerHardware {
        sci: u32::from(fadt.sci_interrupt),
        events: [fixed(fadt.pm1a_event_block()), optional(fadt.pm1b_event_block())],
        event_length: fadt.pm1_event_length,
        control: [fixed(fadt.pm1a_control_block()), optional(fadt.pm1b_control_block())],
        sleep_control: fadt.sleep_control_register().ok().flatten().and_then(register),
        reset: fadt
            .reset_register()
            .ok()
            .filter(|_| flags.supports_system_reset_via_fadt())
            .and_then(register)
            .map(|register| (register, fadt.reset_value)),
        enable: u16::try_from(smi_command)
            .ok()
            .filter(|port| *port != 0 && enable != 0)
            .map(|port| (port, enable)),
        is_reduced: reduced,
        fixed_power_button: !reduced && !flags.power_button_is_control_method(),
    }
}
