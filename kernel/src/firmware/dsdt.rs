//! A quick look into byte code without running it: virtio-mmio devices as QEMU declares them.
//!
//! QEMU writes each as a device whose `_HID` is the constant "LNRO0005" and whose `_CRS` is a constant
//! resource template. Such constants can be read in place, which takes microseconds where the
//! interpreter takes 14 ms on QEMU's TCG, most of a microvm's boot. Anything that looks different
//! makes [`virtio_mmio`] answer `None`, and the interpreter decide. Ref: ACPI 6.5, 20.2 (encoding),
//! 6.4.3 (resource descriptors).

use alloc::vec::Vec;

use janus_proto::addr::Gpa;

use super::{MmioDevice, Polarity, Trigger};

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

/// The virtio-mmio devices in `code`; `None` if one is declared in a way that must be interpreted.
pub(super) fn virtio_mmio(code: &[u8]) -> Option<Vec<MmioDevice>> {
    let mut devices = Vec::new();
    let mut rest = code;
    while let Some(at) = find(rest, HID) {
        rest = rest.get(at + HID.len()..)?;
        let near = rest.get(..FAR.min(rest.len()))?;
        let crs = find(near, CRS)?;
        devices.push(template(rest.get(crs + CRS.len()..)?)?);
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

/// Reads the buffer that begins behind its op: package length, size, descriptors.
fn template(code: &[u8]) -> Option<MmioDevice> {
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
    let ((base, len), (flags, gsi)) = (memory?, interrupt?);
    Some(MmioDevice {
        base: Gpa(u64::from(base)),
        len: u64::from(len),
        gsi,
        trigger: if flags & INTERRUPT_EDGE != 0 { Trigger::Edge } else { Trigger::Level },
        polarity: if flags & INTERRUPT_LOW != 0 { Polarity::Low } else { Polarity::High },
    })
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

    #[test]
    fn what_is_cut_short_or_computed_is_left_to_the_interpreter() {
        let code = declared(0xfeb0_0e00, 12);
        for len in HID.len()..code.len() - 1 {
            assert_eq!(virtio_mmio(&code[..len]), None, "cut to {len} bytes");
        }
        assert_eq!(virtio_mmio(b"\x14\x0f_HID\0\xa4\x0dLNRO0005\0"), None);
    }
}
