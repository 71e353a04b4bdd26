//! The ACPI tables: processors and interrupt controllers, power, and the virtio devices. Ref: ACPI 6.5, 5.2.
//!
//! The fixed hardware is the least there is: an event block with the power button, a control block that sleeps, a
//! reset register.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::layout::{self, port};

const OEM: [u8; 6] = *b"JANUS ";
const TABLE: [u8; 8] = *b"JANUSKVM";
const REVISION: u32 = 1;
/// `_S5_`: the sleep type that [`super::ports`] takes for power-off.
pub(crate) const SOFT_OFF: u8 = 5;
/// What written to the reset register resets.
pub(crate) const RESET: u8 = 1;
/// `IAPC_BOOT_ARCH`: no VGA, no CMOS clock; the bits for ISA devices and a keyboard controller are not set.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// The size of a descriptor table's header.
const HEADER: u32 = 36;

/// A virtio-mmio device, as the tables name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The address of its registers.
    pub(crate) base: u32,
    /// Bytes of them.
    pub(crate) len: u32,
    /// Its interrupt, by edges.
    pub(crate) gsi: u32,
}

fn port_register(address: u16, bytes: u8) -> GAS {
    let access = if bytes == 1 { AccessSize::ByteAccess } else { AccessSize::WordAccess };
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, u64::from(address))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The byte code: how to sleep, the processors' container, the serial port, and the devices.
fn dsdt(windows: &[Window]) -> Vec<u8> {
    let mut code = bytes(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&SOFT_OFF, &0u8, &0u8, &0u8]),
    ));
    let io = aml::IO::new(port::SERIAL, port::SERIAL, 0, 8);
    let irq = aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let resources = aml::ResourceTemplate::new(vec![&io, &irq]);
    let mut devices = bytes(&aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    ));
    for (index, window) in (0u8..).zip(windows) {
        let memory = aml::Memory32Fixed::new(true, window.base, window.len);
        let irq = aml::Interrupt::new(true, true, false, false, window.gsi);
        let resources = aml::ResourceTemplate::new(vec![&memory, &irq]);
        let name = format!("VR{index:02X}");
        devices.extend(bytes(&aml::Device::new(
            name.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &index),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new("_CRS".into(), &resources),
            ],
        )));
    }
    code.extend(aml::Scope::raw("_SB_".into(), devices));
    let mut table = Sdt::new(*b"DSDT", HEADER, 2, OEM, TABLE, REVISION);
    table.append_slice(&code);
    table.as_slice().to_vec()
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // Old readers look at the 32-bit address only.
    table.dsdt = u32::try_from(dsdt).unwrap_or(0).into();
    table.sci_int = layout::SCI.into();
    table.pm1a_evt_blk = u32::from(port::PM1_EVENT).into();
    table.pm1a_cnt_blk = u32::from(port::PM1_CONTROL).into();
    (table.pm1_evt_len, table.pm1_cnt_len) = (4, 2);
    table.x_pm1a_evt_blk = GAS { register_bit_width: 32, ..port_register(port::PM1_EVENT, 2) };
    table.x_pm1a_cnt_blk = port_register(port::PM1_CONTROL, 2);
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = port_register(port::RESET, 1);
    table.reset_value = RESET;
    bytes(&table.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut table = MADT::new(OEM, TABLE, REVISION, controller);
    for id in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    let mut bytes = bytes(&table);
    // Ref: ACPI 6.5, 5.2.12.5: ISA interrupt overrides, which the crate does not have: the timer is on pin 2, and
    // the SCI is level-triggered, active high.
    for (isa, gsi, flags) in [(0, 2, 0u16), (layout::SCI.to_le_bytes()[0], layout::SCI, 0xd)] {
        bytes.extend([2, 10, 0, isa]);
        bytes.extend(u32::from(gsi).to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

/// Makes length and checksum of a table right again.
fn seal(table: &mut [u8]) {
    let length = u32::try_from(table.len()).unwrap_or(0).to_le_bytes();
    if let Some(place) = table.get_mut(4..8) {
        place.copy_from_slice(&length);
    }
    if let Some(sum) = table.get_mut(9) {
        *sum = 0;
    }
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(place) = table.get_mut(9) {
        *place = 0u8.wrapping_sub(sum);
    }
}

/// All tables as they lie from `at` on, the root pointer first.
pub(crate) fn tables(at: u64, cpus: u8, windows: &[Window]) -> Vec<u8> {
    let mut all = vec![0; 64];
    let mut put = |table: Vec<u8>| {
        let place = all.len().next_multiple_of(16);
        all.resize(place, 0);
        all.extend(table);
        at + place as u64
    };
    let dsdt = put(dsdt(windows));
    let fadt = put(fadt(dsdt));
    let madt = put(madt(cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(bytes(&xsdt));
    let root = bytes(&Rsdp::new(OEM, xsdt));
    if let Some(place) = all.get_mut(..root.len()) {
        place.copy_from_slice(&root);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table<'a>(all: &'a [u8], signature: &[u8]) -> &'a [u8] {
        let at = all.windows(4).position(|bytes| bytes == signature).unwrap();
        let length = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap());
        &all[at..at + usize::try_from(length).unwrap()]
    }

    #[test]
    fn every_table_adds_up_to_zero_and_names_what_there_is() {
        let windows: Vec<_> = (0..3)
            .map(|n| Window { base: 0xd000_0000 + n * 0x1000, len: 0x1000, gsi: 16 + n })
            .collect();
        let all = tables(0xe_0000, 3, &windows);
        assert_eq!(&all[..8], b"RSD PTR ");
        for signature in [b"DSDT", b"FACP", b"APIC", b"XSDT"] {
            let sum = table(&all, signature).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{}", String::from_utf8_lossy(signature));
        }
        let count = |table: &[u8], what: &[u8]| {
            table.windows(what.len()).filter(|bytes| *bytes == what).count()
        };
        assert_eq!(count(table(&all, b"DSDT"), b"LNRO0005"), 3);
        // Type 0, length 8: a processor's local APIC.
        let madt = &table(&all, b"APIC")[44..];
        let mut kinds = Vec::new();
        let mut at = 0;
        while at < madt.len() {
            kinds.push(madt[at]);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(kinds, [0, 0, 0, 1, 2, 2]);
        assert!(all.len() as u64 <= layout::HIGH - layout::ACPI);
    }
}
