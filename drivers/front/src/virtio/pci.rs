//! virtio over PCI, the modern interface (virtio 1.2, 4.1): capabilities, common configuration, MSI-X.
//!
//! Configuration space, BARs and the MSI-X table are the kernel's; this reads capabilities through
//! [`ConfigSpace`] and gets its windows mapped by a callback.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use janus_proto::abi::virtio::pci::{Cap, CfgType, CommonCfg, NO_VECTOR};
use janus_proto::abi::virtio::{DeviceId, Status};
use janus_proto::addr::Gpa;
use janus_proto::virtqueue::Rings;
use zerocopy::FromBytes;

use super::{Acknowledge, ConfigChanged, InitError, Interrupts, Notifications, Transport};
use crate::mmio::MmioRegion;

/// The configuration space of one PCI function.
pub trait ConfigSpace {
    /// Reads the aligned 32-bit register at `offset`.
    fn read32(&self, offset: u16) -> u32;
}

/// PCI status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u32 = 1 << 20;
/// Vendor-specific capability.
const CAP_VENDOR: u8 = 0x09;

/// Calls `visit(id, offset)` for each capability of a function; a looping list ends after 48.
pub fn for_each_capability(space: &dyn ConfigSpace, mut visit: impl FnMut(u8, u16)) {
    if space.read32(0x04) & STATUS_CAPABILITIES == 0 {
        return;
    }
    let mut offset = low16(space.read32(0x34)) & 0xfc;
    for _ in 0..48 {
        if offset < 0x40 {
            return;
        }
        let [id, next, ..] = space.read32(offset).to_le_bytes();
        visit(id, offset);
        offset = u16::from(next & 0xfc);
    }
}

/// A piece of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Byte offset in the BAR.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// Where a device keeps its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Common configuration.
    pub common: Window,
    /// Notification addresses.
    pub notify: Window,
    /// Bytes between the notification addresses of queues.
    pub notify_multiplier: u32,
    /// Interrupt status.
    pub isr: Window,
    /// Device configuration, if the device type has one.
    pub device: Option<Window>,
}

impl Capabilities {
    /// Reads the list; of several capabilities of one kind the first counts (virtio 1.2, 4.1.4).
    ///
    /// # Errors
    /// [`InitError::Legacy`] without any, [`InitError::Window`] if one of the three that must exist is missing.
    pub fn read(space: &dyn ConfigSpace) -> Result<Self, InitError> {
        let (mut common, mut notify, mut isr, mut device) = (None, None, None, None);
        let mut any = false;
        for_each_capability(space, |id, offset| {
            if id != CAP_VENDOR || offset > 0x100 - 16 {
                return;
            }
            let mut bytes = [0u8; 16];
            for (chunk, at) in bytes.chunks_exact_mut(4).zip((offset..).step_by(4)) {
                chunk.copy_from_slice(&space.read32(at).to_le_bytes());
            }
            let Ok(cap) = Cap::read_from_bytes(&bytes) else { return };
            if usize::from(cap.cap_len) < size_of::<Cap>() || cap.bar > 5 {
                return;
            }
            any = true;
            let window = Window { bar: cap.bar, offset: cap.offset, len: cap.length };
            match cap.cfg_type {
                CfgType::COMMON => _ = common.get_or_insert(window),
                CfgType::NOTIFY
                    if usize::from(cap.cap_len) >= size_of::<Cap>() + 4 && offset <= 0x100 - 20 =>
                {
                    _ = notify.get_or_insert((window, space.read32(offset + 16)));
                }
                CfgType::ISR => _ = isr.get_or_insert(window),
                CfgType::DEVICE => _ = device.get_or_insert(window),
                _ => {}
            }
        });
        if !any {
            return Err(InitError::Legacy);
        }
        let (notify, notify_multiplier) = notify.ok_or(InitError::Window("notification"))?;
        Ok(Self {
            common: common.ok_or(InitError::Window("common configuration"))?,
            notify,
            notify_multiplier,
            isr: isr.ok_or(InitError::Window("interrupt status"))?,
            device,
        })
    }
}

/// Which entries of the MSI-X table a device is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// None: interrupts come by the shared line, and the ISR register says why.
    Line,
    /// Entry 0 for configuration changes, entry `1 + queue` for each queue, the last shared by the rest.
    Messages {
        /// Entries available, at least 1.
        entries: u16,
    },
}

impl Vectors {
    fn config(self) -> u16 {
        match self {
            Self::Line => NO_VECTOR,
            Self::Messages { .. } => 0,
        }
    }
    /// The entry for a queue.
    #[must_use]
    pub fn queue(self, queue: u16) -> u16 {
        match self {
            Self::Line => NO_VECTOR,
            Self::Messages { entries } => queue.saturating_add(1).min(entries.saturating_sub(1)),
        }
    }
}

/// No notification address yet.
const UNKNOWN: usize = usize::MAX;

macro_rules! common {
    ($field:ident) => {
        core::mem::offset_of!(CommonCfg, $field)
    };
}

/// A device behind BARs.
#[derive(Debug)]
pub struct PciTransport {
    device: DeviceId,
    common: MmioRegion,
    notify: MmioRegion,
    notify_multiplier: u32,
    isr: MmioRegion,
    config: Option<MmioRegion>,
    vectors: Vectors,
    /// Offset of each queue's notification address, read once.
    notify_offsets: Vec<usize>,
    config_changed: ConfigChanged,
    notifications: Notifications,
}

impl PciTransport {
    /// Takes a device of type `device`; `map` maps a piece of a BAR.
    ///
    /// # Errors
    /// [`InitError::Window`] if a window is too small or cannot be mapped.
    pub fn new(
        device: DeviceId,
        capabilities: Capabilities,
        vectors: Vectors,
        map: &mut dyn FnMut(Window) -> Option<MmioRegion>,
    ) -> Result<Self, InitError> {
        let mut window = |window: Window, least: usize, name| {
            map(window).filter(|region| region.len() >= least).ok_or(InitError::Window(name))
        };
        Ok(Self {
            device,
            common: window(capabilities.common, size_of::<CommonCfg>(), "common configuration")?,
            notify: window(capabilities.notify, 2, "notification")?,
            notify_multiplier: capabilities.notify_multiplier,
            isr: window(capabilities.isr, 1, "interrupt status")?,
            config: capabilities
                .device
                .map(|part| window(part, 1, "device configuration"))
                .transpose()?,
            vectors,
            notify_offsets: Vec::new(),
            config_changed: ConfigChanged::default(),
            notifications: Notifications::default(),
        })
    }

    fn select(&self, queue: u16) {
        self.common.write16(common!(queue_select), queue);
    }

    fn write_address(&self, offset: usize, address: Gpa) {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
        self.common.write32(offset, address.0 as u32);
        self.common.write32(offset + 4, (address.0 >> 32) as u32);
    }
}

impl Transport for PciTransport {
    fn device_id(&self) -> DeviceId {
        self.device
    }
    fn read_device_features(&mut self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            self.common.write32(common!(device_feature_select), half);
            u64::from(self.common.read32(common!(device_feature)))
        });
        low | high << 32
    }
    #[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
    fn write_driver_features(&mut self, features: u64) {
        for (half, bits) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.common.write32(common!(driver_feature_select), half);
            self.common.write32(common!(driver_feature), bits);
        }
    }
    fn status(&self) -> Status {
        Status::from_bits_retain(self.common.read8(common!(device_status)))
    }
    fn set_status(&mut self, status: Status) {
        self.common.write8(common!(device_status), status.bits());
    }
    fn connect_interrupts(&mut self) -> Result<(), InitError> {
        let vector = self.vectors.config();
        self.common.write16(common!(config_msix_vector), vector);
        if self.common.read16(common!(config_msix_vector)) == vector {
            Ok(())
        } else {
            Err(InitError::Vector)
        }
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        if queue >= self.common.read16(common!(num_queues)) {
            return 0;
        }
        self.select(queue);
        self.common.read16(common!(queue_size))
    }
    fn queue_enable(&mut self, queue: u16, size: u16, rings: Rings) -> Result<(), InitError> {
        if self.queue_enabled(queue) {
            return Err(InitError::Queue(queue));
        }
        self.common.write16(common!(queue_size), size);
        let vector = self.vectors.queue(queue);
        self.common.write16(common!(queue_msix_vector), vector);
        if self.common.read16(common!(queue_msix_vector)) != vector {
            return Err(InitError::Vector);
        }
        self.write_address(common!(queue_desc), rings.descriptors);
        self.write_address(common!(queue_driver), rings.available);
        self.write_address(common!(queue_device), rings.used);
        // Read once: asking the device at every notification would cost two more exits.
        let offset = u64::from(self.common.read16(common!(queue_notify_off)))
            * u64::from(self.notify_multiplier);
        let offset = usize::try_from(offset).map_err(|_| InitError::Window("notification"))?;
        if self.notify.part(offset, 2).is_none() {
            return Err(InitError::Window("notification"));
        }
        let index = usize::from(queue);
        if self.notify_offsets.len() <= index {
            self.notify_offsets.resize(index + 1, UNKNOWN);
        }
        if let Some(entry) = self.notify_offsets.get_mut(index) {
            *entry = offset;
        }
        self.common.write16(common!(queue_enable), 1);
        Ok(())
    }
    fn queue_enabled(&mut self, queue: u16) -> bool {
        self.select(queue);
        self.common.read16(common!(queue_enable)) != 0
    }
    fn notify(&self, queue: u16) {
        if let Some(&offset) = self.notify_offsets.get(usize::from(queue)) {
            self.notifications.fetch_add(1, Ordering::Relaxed);
            self.notify.write16(offset, queue);
        }
    }
    fn config_generation(&self) -> u32 {
        u32::from(self.common.read8(common!(config_generation)))
    }
    fn config_read8(&self, offset: usize) -> u8 {
        self.config.as_ref().map_or(u8::MAX, |config| config.read8(offset))
    }
    fn config_read16(&self, offset: usize) -> u16 {
        self.config.as_ref().map_or(u16::MAX, |config| config.read16(offset))
    }
    fn config_read32(&self, offset: usize) -> u32 {
        self.config.as_ref().map_or(u32::MAX, |config| config.read32(offset))
    }
    fn config_write32(&mut self, offset: usize, value: u32) {
        if let Some(config) = &self.config {
            config.write32(offset, value);
        }
    }
    fn interrupts(&self) -> Interrupts {
        Interrupts {
            acknowledge: match self.vectors {
                Vectors::Line => Acknowledge::Isr(self.isr.clone()),
                Vectors::Messages { .. } => Acknowledge::Message,
            },
            config_changed: self.config_changed.clone(),
            notifications: self.notifications.clone(),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
const fn low16(word: u32) -> u16 {
    word as u16
}
