//! virtio over MMIO, version 2 (virtio 1.2, 4.2): one window of registers, one interrupt.

use alloc::boxed::Box;
use core::fmt;
use core::sync::atomic::Ordering;

use janus_proto::abi::virtio::mmio::{
    CONFIG, CONFIG_GENERATION, DEVICE_FEATURES, DEVICE_FEATURES_SEL, DEVICE_ID, DRIVER_FEATURES,
    DRIVER_FEATURES_SEL, INTERRUPT_ACK, INTERRUPT_STATUS, MAGIC, MAGIC_VALUE, QUEUE_DESC,
    QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_NOTIFY, QUEUE_NUM, QUEUE_NUM_MAX, QUEUE_READY, QUEUE_SEL,
    STATUS, VERSION,
};
use janus_proto::abi::virtio::{DeviceId, InterruptStatus, Status};
use janus_proto::addr::Gpa;
use janus_proto::virtqueue::Rings;

use super::{Acknowledge, ConfigChanged, InitError, Interrupts, Notifications, Transport};
use crate::mmio::MmioRegion;

/// Makes the device look at its queues, by another way than its register.
pub type Doorbell = Box<dyn Fn() + Send + Sync>;

/// A device behind a window of registers.
pub struct MmioTransport {
    registers: MmioRegion,
    /// The interrupts say themselves what they are for, and this notifies: see [`MmioTransport::with_doorbell`].
    doorbell: Option<Doorbell>,
    config_changed: ConfigChanged,
    notifications: Notifications,
}

impl MmioTransport {
    /// Looks who is there; `Ok(None)` for an empty slot (device id 0).
    ///
    /// # Errors
    /// [`InitError::Window`] if these are no virtio registers, [`InitError::Legacy`] for version 1.
    pub fn new(registers: MmioRegion) -> Result<Option<Self>, InitError> {
        if registers.len() < CONFIG || registers.read32(MAGIC_VALUE) != MAGIC {
            return Err(InitError::Window("virtio-mmio"));
        }
        if registers.read32(DEVICE_ID) == DeviceId::RESERVED.0 {
            return Ok(None);
        }
        match registers.read32(VERSION) {
            2 => Ok(Some(Self {
                registers,
                doorbell: None,
                config_changed: ConfigChanged::default(),
                notifications: Notifications::default(),
            })),
            1 => Err(InitError::Legacy),
            _ => Err(InitError::Window("virtio-mmio")),
        }
    }

    /// Notifies by `doorbell` from now on, for all queues alike; and the device has an interrupt for its queues and
    /// another for its configuration, so that nothing has to be read or written when they come. For hosts where an
    /// access to a register costs more than either.
    #[must_use]
    pub fn with_doorbell(self, doorbell: Doorbell) -> Self {
        Self { doorbell: Some(doorbell), ..self }
    }

    fn write_address(&self, register: usize, address: Gpa) {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
        self.registers.write32(register, address.0 as u32);
        self.registers.write32(register + 4, (address.0 >> 32) as u32);
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport").field("registers", &self.registers).finish_non_exhaustive()
    }
}

/// Reads and takes back the reasons of an interrupt.
pub(super) fn acknowledge(registers: &MmioRegion) -> InterruptStatus {
    let status = registers.read32(INTERRUPT_STATUS);
    if status != 0 && status != u32::MAX {
        registers.write32(INTERRUPT_ACK, status);
    }
    InterruptStatus::from_bits_truncate(status)
}

impl Transport for MmioTransport {
    fn device_id(&self) -> DeviceId {
        DeviceId(self.registers.read32(DEVICE_ID))
    }
    fn read_device_features(&mut self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            self.registers.write32(DEVICE_FEATURES_SEL, half);
            u64::from(self.registers.read32(DEVICE_FEATURES))
        });
        low | high << 32
    }
    #[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
    fn write_driver_features(&mut self, features: u64) {
        for (half, bits) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.registers.write32(DRIVER_FEATURES_SEL, half);
            self.registers.write32(DRIVER_FEATURES, bits);
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "the status is the low byte")]
    fn status(&self) -> Status {
        Status::from_bits_retain(self.registers.read32(STATUS) as u8)
    }
    fn set_status(&mut self, status: Status) {
        self.registers.write32(STATUS, u32::from(status.bits()));
    }
    fn connect_interrupts(&mut self) -> Result<(), InitError> {
        Ok(()) // One line, always connected.
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        self.registers.write32(QUEUE_SEL, u32::from(queue));
        match self.registers.read32(QUEUE_NUM_MAX) {
            u32::MAX => 0,
            most => u16::try_from(most).unwrap_or(1 << 15),
        }
    }
    fn queue_enable(&mut self, queue: u16, size: u16, rings: Rings) -> Result<(), InitError> {
        if self.queue_enabled(queue) {
            return Err(InitError::Queue(queue));
        }
        self.registers.write32(QUEUE_NUM, u32::from(size));
        self.write_address(QUEUE_DESC, rings.descriptors);
        self.write_address(QUEUE_DRIVER, rings.available);
        self.write_address(QUEUE_DEVICE, rings.used);
        self.registers.write32(QUEUE_READY, 1);
        if self.registers.read32(QUEUE_READY) == 1 { Ok(()) } else { Err(InitError::Queue(queue)) }
    }
    fn queue_enabled(&mut self, queue: u16) -> bool {
        self.registers.write32(QUEUE_SEL, u32::from(queue));
        self.registers.read32(QUEUE_READY) != 0
    }
    fn notify(&self, queue: u16) {
        self.notifications.fetch_add(1, Ordering::Relaxed);
        match &self.doorbell {
            Some(doorbell) => doorbell(),
            None => self.registers.write32(QUEUE_NOTIFY, u32::from(queue)),
        }
    }
    fn config_generation(&self) -> u32 {
        self.registers.read32(CONFIG_GENERATION)
    }
    fn config_read8(&self, offset: usize) -> u8 {
        self.registers.read8(CONFIG + offset)
    }
    fn config_read16(&self, offset: usize) -> u16 {
        self.registers.read16(CONFIG + offset)
    }
    fn config_read32(&self, offset: usize) -> u32 {
        self.registers.read32(CONFIG + offset)
    }
    fn config_write32(&mut self, offset: usize, value: u32) {
        self.registers.write32(CONFIG + offset, value);
    }
    fn interrupts(&self) -> Interrupts {
        Interrupts {
            acknowledge: match &self.doorbell {
                Some(_) => Acknowledge::Message,
                None => Acknowledge::Mmio(self.registers.clone()),
            },
            config_changed: self.config_changed.clone(),
            notifications: self.notifications.clone(),
        }
    }
}
