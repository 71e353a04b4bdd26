//! virtio-mmio windows: those that the command line names as Linux does, and those that ACPI names.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use janus_front::virtio::mmio::MmioTransport;
use janus_front::virtio::{InitError, Transport};
use janus_proto::abi::virtio::DeviceId;
use janus_proto::addr::Gpa;

use super::wake::Wake;
use super::{StartError, pci, report, serve};
use crate::firmware::{MmioDevice, Polarity, Trigger, WiredLine};

/// The word of the command line, up to its value.
const WORD: &[u8] = b"virtio_mmio.device=";

/// The windows that `virtio_mmio.device=<size>@<start>:<irq>[:<id>]` words name
/// (Linux, `Documentation/admin-guide/kernel-parameters.txt`). Malformed words are reported and left out.
#[must_use]
pub fn from_command_line(line: &[u8]) -> Vec<MmioDevice> {
    let words = line.split(|byte| byte.is_ascii_whitespace());
    let mut windows = Vec::new();
    for value in words.filter_map(|word| word.strip_prefix(WORD)) {
        match core::str::from_utf8(value).ok().and_then(parse) {
            Some(window) => windows.push(window),
            None => log::warn!(
                "virtio_mmio.device={}: expected <size>@<start>:<irq>",
                String::from_utf8_lossy(value)
            ),
        }
    }
    windows
}

fn parse(value: &str) -> Option<MmioDevice> {
    let (len, rest) = value.split_once('@')?;
    let (start, rest) = rest.split_once(':')?;
    let gsi = rest.split(':').next()?;
    let window = MmioDevice {
        base: Gpa(number(start)?),
        len: size(len)?,
        gsi: u32::try_from(number(gsi)?).ok()?,
        // The word says nothing of it; hosts that use it (Firecracker, QEMU without ACPI) pulse the line.
        trigger: Trigger::Edge,
        polarity: Polarity::High,
    };
    window.base.0.checked_add(window.len)?;
    Some(window)
}

/// A number as Linux reads it: decimal, 0x for hexadecimal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A number with an optional K, M or G.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    number(digits)?.checked_mul(1 << shift)
}

/// Starts the device in a window, if there is one.
pub(super) fn start(window: MmioDevice) {
    let place = format!("mmio {:#x}, irq {}", window.base.0, window.gsi);
    let Some(registers) = pci::map(window.base, window.len) else { return };
    match MmioTransport::new(registers) {
        Ok(Some(transport)) => {
            let id = transport.device_id();
            report(&place, id, start_device(transport, window, &place));
        }
        Ok(None) => {} // An empty slot.
        Err(InitError::Legacy) => log::warn!(
            "virtio device at {place} is of the legacy kind (QEMU: -global virtio-mmio.force-legacy=false)"
        ),
        Err(error) => report(&place, DeviceId::RESERVED, Err(error.into())),
    }
}

fn start_device(
    transport: MmioTransport,
    window: MmioDevice,
    place: &str,
) -> Result<Option<String>, StartError> {
    if !serve::known(transport.device_id()) {
        return Ok(None);
    }
    let wake = Arc::new(Wake::new());
    let wired = WiredLine { gsi: window.gsi, trigger: window.trigger, polarity: window.polarity };
    let handlers = super::connect_wire(wired, "virtio-mmio", transport.interrupts(), &wake)?;
    super::start::<serve::Identity>(Box::new(transport), String::from(place), wake, handlers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_windows_are_read_as_linux_reads_them() {
        let window = |start, len, gsi| MmioDevice {
            base: Gpa(start),
            len,
            gsi,
            trigger: Trigger::Edge,
            polarity: Polarity::High,
        };
        let line =
            b"quiet virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=4K@0xd0000000:5:2 x=1";
        assert_eq!(
            from_command_line(line),
            [window(0xfeb0_0e00, 512, 12), window(0xd000_0000, 4096, 5)]
        );
        for bad in [
            "512",
            "512@",
            "@0x1:2",
            "512@0x1",
            "5x@0x1:2",
            "512@0x1:99999999999",
            "1@0xffffffffffffffff:1",
            "99999999999G@1:1",
        ] {
            assert_eq!(
                from_command_line(format!("virtio_mmio.device={bad}").as_bytes()),
                [],
                "{bad}"
            );
        }
    }
}
