//! A quick look into byte code without running it: virtio-mmio devices, and the power button of a machine without
//! fixed power hardware, as QEMU declares them.
//!
//! QEMU writes each virtio device as one whose `_HID` is the constant "LNRO0005" and whose `_CRS` is a constant
//! resource template. Such constants can be read in place, which takes microseconds where the
//! interpreter takes 14 ms on QEMU's TCG, most of a microvm's boot. Anything that looks different
//! makes [`virtio_mmio`] answer `None`, and the interpreter decide. Ref: ACPI 6.5, 20.2 (encoding),
//! 6.4.3 (resource descriptors), 5.6.9 (generic event device); QEMU, `docs/specs/acpi_hw_reduced_hotplug.rst`.

use alloc::vec::Vec;

use janus_proto::addr::Gpa;

use super::{EventDevice, MmioDevice, Polarity, Trigger};

/// `Name (_HID, "LNRO0005")`: name op, name segment, string prefix, string.
const HID: &[u8] = b"\x08_HID\x0dLNRO0005\0";
/// `Name (_CRS, Buffer ...)`: name op, name segment, buffer op.
const CRS: &[u8] = b"\x08_CRS\x11";
/// Byte code between the two may be `_UID`, `_CCA` and the like.
const FAR: usize = 64;
/// Integer prefixes: one byte, two bytes.
const BYTE: u8 = 0x0a;
const WORD: u8 = 0x0b;
/// Descriptors: 32-bit fixed memory range, extended interrupt, end tag.
const MEMORY_32_FIXED: u8 = 0x86;
const EXTENDED_INTERRUPT: u8 = 0x89;
const END_TAG: u8 = 0x79;
/// Extended interrupt flags: edge-triggered, active low.
const INTERRUPT_EDGE: u8 = 1 << 1;
const INTERRUPT_LOW: u8 = 1 << 2;

/// `Name (_HID, "ACPI0013")`: the generic event device.
const EVENTS: &[u8] = b"\x08_HID\x0dACPI0013\0";
/// `OperationRegion (EREG, SystemMemory, address, 4)`, up to the address, a 32-bit constant.
const SELECTOR: &[u8] = b"\x5b\x80EREG\x00\x0c";
/// `Notify (PWRB, 0x80)`, behind the test of a bit of the selector, twice a one-byte constant:
/// `If (((Local0 & BIT) == BIT))`.
const PRESSED: &[u8] = b"\x86PWRB\x0a\x80";

/// The generic event device in `code`, if pressing the power button is one of its events.
pub(super) fn event_device(code: &[u8]) -> Option<EventDevice> {
    let at = find(code, EVENTS)?;
    let code = code.get(at + EVENTS.len()..)?;
    let near = code.get(..FAR.min(code.len()))?;
    let crs = find(near, CRS)?;
    let (_, (flags, gsi)) = template(code.get(crs + CRS.len()..)?)?;
    let selector = find(code, SELECTOR)?;
    let selector = u32::from_le_bytes(array(code, selector + SELECTOR.len())?);
    let pressed = find(code, PRESSED)?;
    let [BYTE, bit, 0, BYTE, same] = array(code, pressed.checked_sub(5)?)? else { return None };
    (bit == same && bit.is_power_of_two()).then_some(EventDevice {
        selector: Gpa(u64::from(selector)),
        power_button: u32::from(bit),
        gsi,
        trigger: trigger(flags),
        polarity: polarity(flags),
    })
}

/// The virtio-mmio devices in `code`; `None` if one is declared in a way that must be interpreted.
pub(super) fn virtio_mmio(code: &[u8]) -> Option<Vec<MmioDevice>> {
    let mut devices = Vec::new();
    let mut rest = code;
    while let Some(at) = find(rest, HID) {
        rest = rest.get(at + HID.len()..)?;
        let near = rest.get(..FAR.min(rest.len()))?;
        let crs = find(near, CRS)?;
        let (memory, (flags, gsi)) = template(rest.get(crs + CRS.len()..)?)?;
        let (base, len) = memory?;
        devices.push(MmioDevice {
            base: Gpa(u64::from(base)),
            len: u64::from(len),
            gsi,
            trigger: trigger(flags),
            polarity: polarity(flags),
        });
    }
    // A name in another encoding (a method, a package) is not for this place.
    (count(code, b"LNRO0005") == devices.len()).then_some(devices)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|window| *window == what).count()
}

fn trigger(flags: u8) -> Trigger {
    if flags & INTERRUPT_EDGE != 0 { Trigger::Edge } else { Trigger::Level }
}

fn polarity(flags: u8) -> Polarity {
    if flags & INTERRUPT_LOW != 0 { Polarity::Low } else { Polarity::High }
}

/// Memory, as base and length, and an interrupt, as flags and number.
type Resources = (Option<(u32, u32)>, (u8, u32));

/// Reads the buffer that begins behind its op: package length, size, descriptors.
fn template(code: &[u8]) -> Option<Resources> {
    // The two high bits say how many bytes of the length follow.
    let code = code.get(1 + usize::from(code.first()? >> 6)..)?;
    let (size, data) = match *code.first()? {
        BYTE => (usize::from(*code.get(1)?), code.get(2..)?),
        WORD => (usize::from(u16::from_le_bytes(array(code, 1)?)), code.get(3..)?),
        _ => return None,
    };
    let mut rest = data.get(..size)?;
    let (mut memory, mut interrupt) = (None, None);
    while *rest.first()? != END_TAG {
        let len = usize::from(u16::from_le_bytes(array(rest, 1)?));
        let body = rest.get(3..3 + len)?;
        match *rest.first()? {
            MEMORY_32_FIXED => {
                memory = Some((
                    u32::from_le_bytes(array(body, 1)?),
                    u32::from_le_bytes(array(body, 5)?),
                ));
            }
            // One interrupt.
            EXTENDED_INTERRUPT if *body.get(1)? == 1 => {
                interrupt = Some((*body.first()?, u32::from_le_bytes(array(body, 2)?)));
            }
            _ => return None,
        }
        rest = rest.get(3 + len..)?;
    }
    Some((memory, interrupt?))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 7.2 writes for one transport (`hw/i386/acpi-microvm.c`).
    fn declared(base: u32, gsi: u32) -> Vec<u8> {
        let mut crs = vec![MEMORY_32_FIXED, 9, 0, 1];
        crs.extend(base.to_le_bytes());
        crs.extend(512_u32.to_le_bytes());
        crs.extend([EXTENDED_INTERRUPT, 6, 0, 0b0001, 1]);
        crs.extend(gsi.to_le_bytes());
        crs.extend([END_TAG, 0]);
        let mut code = HID.to_vec();
        code.extend(b"\x08_UID\x0a\x05\x08_CCA\x01");
        code.extend(CRS);
        code.push(u8::try_from(crs.len()).unwrap() + 3);
        code.extend([BYTE, u8::try_from(crs.len()).unwrap()]);
        code.extend(crs);
        code
    }

    #[test]
    fn constant_declarations_are_read_in_place() {
        let code =
            [b"noise".to_vec(), declared(0xfeb0_0e00, 12), declared(0xfeb0_1000, 13)].concat();
        let devices = virtio_mmio(&code).unwrap();
        let found: Vec<_> = devices.iter().map(|d| (d.base.0, d.len, d.gsi, d.trigger)).collect();
        assert_eq!(
            found,
            [(0xfeb0_0e00, 512, 12, Trigger::Level), (0xfeb0_1000, 512, 13, Trigger::Level)]
        );
        assert_eq!(virtio_mmio(b"nothing of the kind"), Some(Vec::new()));
    }

    /// What QEMU 7.2 writes for a microvm (`hw/acpi/generic_event_device.c`).
    const GENERIC_EVENT_DEVICE: &[u8] =
        b"\x5b\x82\x4c\x06GED_\x08_HID\x0dACPI0013\0\x08_UID\x0dGED\0\
        \x08_CRS\x11\x0e\x0a\x0b\x89\x06\x00\x03\x01\x09\0\0\0\x79\0\
        \x5b\x80EREG\x00\x0c\x00\x00\xa0\xfe\x0a\x04\x5b\x81\x0bEREG\x43ESEL\x20\
        \x14\x1d_EVT\x09\x70ESEL\x60\xa0\x10\x93\x7b\x60\x0a\x02\x00\x0a\x02\x86PWRB\x0a\x80\
        \x5b\x82\x19PWRB\x08_HID\x0dPNP0C0C\0\x08_UID\x00";

    #[test]
    fn the_power_button_of_the_generic_event_device_is_found() {
        let device = event_device(GENERIC_EVENT_DEVICE).unwrap();
        assert_eq!(device.selector, Gpa(0xfea0_0000));
        assert_eq!((device.power_button, device.gsi), (2, 9));
        assert_eq!((device.trigger, device.polarity), (Trigger::Edge, Polarity::High));
        assert_eq!(event_device(&declared(0xfeb0_0e00, 12)), None);
    }

    #[test]
    fn an_event_device_that_is_cut_short_or_computes_is_not_taken() {
        let end = find(GENERIC_EVENT_DEVICE, PRESSED).unwrap() + PRESSED.len();
        for len in 0..end {
            assert_eq!(event_device(&GENERIC_EVENT_DEVICE[..len]), None, "cut to {len} bytes");
        }
        let mut other = GENERIC_EVENT_DEVICE.to_vec();
        other[end - PRESSED.len() - 1] = 4;
        assert_eq!(event_device(&other), None, "two bits");
    }

    #[test]
    fn what_is_cut_short_or_computed_is_left_to_the_interpreter() {
        let code = declared(0xfeb0_0e00, 12);
        for len in HID.len()..code.len() - 1 {
            assert_eq!(virtio_mmio(&code[..len]), None, "cut to {len} bytes");
        }
        assert_eq!(virtio_mmio(b"\x14\x0f_HID\0\xa4\x0dLNRO0005\0"), None);
    }
}
