//! The PCI bus: configuration space, BARs, MSI-X.
//!
//! Configuration space is reached through the ECAM window that ACPI's MCFG names, or by ports 0xcf8 and
//! 0xcfc. Buses behind bridges are found by following the bridges; addresses are the firmware's choice.
// UNSAFETY: port I/O, and mapped configuration space.
#![expect(unsafe_code, reason = "configuration space is ports or mapped registers")]

use alloc::vec::Vec;
use core::fmt;

use janus_front::mmio::MmioRegion;
use janus_front::virtio::pci::{ConfigSpace, Window, for_each_capability};
use janus_proto::addr::Gpa;
use spin::Once;
use x86_64::instructions::port::Port;

use crate::firmware;
use crate::irq::msi::Message;
use crate::mm::paging;
use crate::sync::IrqMutex;

/// PCI capability: MSI-X.
const CAP_MSIX: u8 = 0x11;
/// Bytes of configuration space of one bus in an ECAM window.
const ECAM_BUS: u64 = 1 << 20;

/// Command register.
const COMMAND: u16 = 0x04;
const COMMAND_IO: u32 = 1 << 0;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;
const COMMAND_NO_LINE: u32 = 1 << 10;

/// How configuration space is reached.
#[derive(Debug)]
enum Access {
    /// Address to 0xcf8, data at 0xcfc.
    Ports,
    /// Memory, of the buses that it covers.
    Ecam {
        start: u64,
        buses: core::ops::RangeInclusive<u8>,
        mapped: IrqMutex<Vec<(u8, MmioRegion)>>,
    },
}

static ACCESS: Once<Access> = Once::new();
/// Address and data port are one register pair.
static PORTS: IrqMutex<()> = IrqMutex::new(());

fn access() -> &'static Access {
    ACCESS.call_once(|| {
        let segment0 = firmware::tables()
            .and_then(|tables| tables.ecam.iter().find(|region| region.segment == 0));
        match segment0 {
            Some(region) => Access::Ecam {
                start: region.base.0,
                buses: region.first_bus..=region.last_bus,
                mapped: IrqMutex::new(Vec::new()),
            },
            None => Access::Ports,
        }
    })
}

/// One function of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Bus.
    pub bus: u8,
    /// Device on the bus, 0 to 31.
    pub device: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

impl ConfigSpace for Function {
    fn read32(&self, offset: u16) -> u32 {
        match access() {
            Access::Ports => self.with_ports(offset, |data| {
                // SAFETY: reading configuration space by the address just written.
                unsafe { data.read() }
            }),
            ecam @ Access::Ecam { .. } => ecam
                .region(self.bus)
                .map_or(u32::MAX, |region| region.read32(self.ecam_offset(offset))),
        }
    }
}

impl Access {
    fn region(&self, bus: u8) -> Option<MmioRegion> {
        let Self::Ecam { start, buses, mapped } = self else { return None };
        if !buses.contains(&bus) {
            return None;
        }
        if let Some((_, region)) = mapped.lock().iter().find(|(b, _)| *b == bus) {
            return Some(region.clone());
        }
        // The window starts with bus 0, whichever buses it covers (PCI firmware specification 3.3, 4.1.2).
        let region = map(Gpa(start + u64::from(bus) * ECAM_BUS), ECAM_BUS)?;
        mapped.lock().push((bus, region.clone()));
        Some(region)
    }
}

impl Function {
    fn with_ports<R>(&self, offset: u16, access: impl FnOnce(&mut Port<u32>) -> R) -> R {
        let address = 1 << 31
            | u32::from(self.bus) << 16
            | u32::from(self.device & 31) << 11
            | u32::from(self.function & 7) << 8
            | u32::from(offset & 0xfc);
        let guard = PORTS.lock();
        // SAFETY: selects a configuration register; nothing happens before the data port is used.
        unsafe { Port::new(0xcf8).write(address) };
        let result = access(&mut Port::new(0xcfc));
        drop(guard);
        result
    }

    fn ecam_offset(&self, offset: u16) -> usize {
        usize::from(self.device & 31) << 15
            | usize::from(self.function & 7) << 12
            | usize::from(offset & 0xffc)
    }

    fn write32(&self, offset: u16, value: u32) {
        match access() {
            Access::Ports => self.with_ports(offset, |data| {
                // SAFETY: the callers below write command, BARs and MSI-X control, of devices that have no
                // driver but ours.
                unsafe { data.write(value) }
            }),
            ecam @ Access::Ecam { .. } => {
                if let Some(region) = ecam.region(self.bus) {
                    region.write32(self.ecam_offset(offset), value);
                }
            }
        }
    }

    /// Vendor and device id.
    #[must_use]
    pub fn ids(&self) -> (u16, u16) {
        split(self.read32(0x00))
    }
    /// Subsystem vendor and subsystem id.
    #[must_use]
    pub fn subsystem(&self) -> (u16, u16) {
        split(self.read32(0x2c))
    }
    /// The interrupt pin, 1 to 4 for A to D; 0: none.
    #[must_use]
    pub fn interrupt_pin(&self) -> u8 {
        self.read32(0x3c).to_le_bytes()[1]
    }
    fn header_type(&self) -> u8 {
        self.read32(0x0c).to_le_bytes()[2]
    }

    /// Lets the device answer at its addresses and reach memory; its interrupt line stays as `line` says.
    pub fn enable(&self, line: Line) {
        let command = self.read32(COMMAND) & 0xffff;
        let line = match line {
            Line::On => 0,
            Line::Off => COMMAND_NO_LINE,
        };
        self.write32(COMMAND, command & !COMMAND_NO_LINE | COMMAND_MEMORY | COMMAND_MASTER | line);
    }

    /// The memory BARs: where each is and how long.
    ///
    /// Looked at once for a device, all together: the device must not answer while a length is asked
    /// for, and every change of that makes a hypervisor rebuild its map of the machine.
    #[must_use]
    pub fn memory_bars(&self) -> MemoryBars {
        let command = self.read32(COMMAND) & 0xffff;
        self.write32(COMMAND, command & !(COMMAND_IO | COMMAND_MEMORY));
        let mut bars = [None; 6];
        let mut upper_half = false;
        for (index, bar) in (0u16..).zip(&mut bars) {
            if upper_half {
                upper_half = false;
                continue;
            }
            let register = 0x10 + 4 * index;
            let low = self.read32(register);
            upper_half = low & 0b111 == 0b100;
            *bar = self.memory_bar(register, low);
        }
        self.write32(COMMAND, command);
        MemoryBars(bars)
    }

    /// The BAR at `register`, which holds `low`; `None` for I/O ports, an unused BAR, one without an address.
    fn memory_bar(&self, register: u16, low: u32) -> Option<(Gpa, u64)> {
        let wide = low & 0b110 == 0b100;
        if low & 1 != 0 || (wide && register == 0x24) {
            return None;
        }
        let length_mask = |register: u16, value: u32| {
            self.write32(register, u32::MAX);
            let mask = self.read32(register);
            self.write32(register, value);
            mask
        };
        let high = if wide { self.read32(register + 4) } else { 0 };
        let mask_low = length_mask(register, low) & !0xf;
        let mask_high = if wide { length_mask(register + 4, high) } else { u32::MAX };
        let base = u64::from(high) << 32 | u64::from(low & !0xf);
        let mask = u64::from(mask_high) << 32 | u64::from(mask_low);
        (mask_low != 0 && base != 0).then(|| (Gpa(base), (!mask).wrapping_add(1)))
    }
}

/// The memory BARs of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBars([Option<(Gpa, u64)>; 6]);

impl MemoryBars {
    /// Maps a piece of a BAR; `None` if it is not wholly inside one.
    #[must_use]
    pub fn map(&self, window: Window) -> Option<MmioRegion> {
        let (base, len) = self.0.get(usize::from(window.bar)).copied().flatten()?;
        let end = u64::from(window.offset) + u64::from(window.len);
        let start = Gpa(base.0.checked_add(u64::from(window.offset))?);
        if end <= len { map(start, u64::from(window.len)) } else { None }
    }
}

/// Whether a device may use its interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// It may.
    On,
    /// It must not: it has messages.
    Off,
}

fn split(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_le_bytes();
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

/// Maps device memory at its address.
pub(super) fn map(start: Gpa, len: u64) -> Option<MmioRegion> {
    let len = usize::try_from(len).ok()?;
    match paging::map_mmio(start, len) {
        // SAFETY: `map_mmio` mapped the whole range uncached for good, and refuses RAM, where objects live.
        Ok(memory) => Some(unsafe { MmioRegion::new(memory, len) }),
        Err(error) => {
            log::warn!("cannot map device registers at {:#x}: {error}", start.0);
            None
        }
    }
}

/// All functions, on bus 0 and behind bridges.
#[must_use]
pub fn functions() -> Vec<Function> {
    let mut found = Vec::new();
    let mut seen = [false; 256];
    let mut buses = alloc::vec![0u8];
    while let Some(bus) = buses.pop() {
        let Some(first @ false) = seen.get_mut(usize::from(bus)) else { continue };
        *first = true;
        for device in 0..32 {
            let first = Function { bus, device, function: 0 };
            if first.ids().0 == 0xffff {
                continue;
            }
            let count = if first.header_type() & 0x80 != 0 { 8 } else { 1 };
            for function in 0..count {
                let function = Function { bus, device, function };
                if function.ids().0 == 0xffff {
                    continue;
                }
                if function.header_type() & 0x7f == 1 {
                    buses.push(function.read32(0x18).to_le_bytes()[1]);
                }
                found.push(function);
            }
        }
    }
    found
}

/// The MSI-X table of a function, switched on.
#[derive(Debug)]
pub struct Msix {
    table: MmioRegion,
    entries: u16,
}

/// Bytes of a table entry.
const ENTRY: usize = 16;
const ENTRY_BYTES: u32 = 16;

impl Msix {
    /// Finds the table, masks all entries, and switches MSI-X on; `None` if the function has none.
    #[must_use]
    pub fn enable(function: Function, bars: &MemoryBars) -> Option<Self> {
        let mut capability = None;
        for_each_capability(&function, |id, offset| {
            if id == CAP_MSIX && offset <= 0x100 - 12 {
                capability.get_or_insert(offset);
            }
        });
        let capability = capability?;
        let control = function.read32(capability);
        let entries = split(control).1 & 0x7ff;
        let entries = entries + 1;
        let place = function.read32(capability + 4);
        let [first, ..] = place.to_le_bytes();
        let window =
            Window { bar: first & 7, offset: place & !7, len: u32::from(entries) * ENTRY_BYTES };
        let table = bars.map(window)?;
        let this = Self { table, entries };
        function.enable(Line::Off);
        for entry in 0..entries {
            this.table.write32(usize::from(entry) * ENTRY + 12, 1);
        }
        // Enable (bit 15 of the control word), function mask (bit 14) off.
        function.write32(capability, control & !(1 << 30) | 1 << 31);
        Some(this)
    }
    /// Entries in the table, at least 1.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.entries
    }
    /// Makes the device send `message` by an entry, and unmasks it.
    pub fn set(&self, entry: u16, message: Message) {
        if entry >= self.entries {
            return;
        }
        let at = usize::from(entry) * ENTRY;
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        self.table.write32(at + 12, 1);
        self.table.write32(at, u32::from_le_bytes([a, b, c, d]));
        self.table.write32(at + 4, u32::from_le_bytes([e, f, g, h]));
        self.table.write32(at + 8, message.data);
        self.table.write32(at + 12, 0);
    }
}
