//! A virtio device in memory, for tests: registers here, its queues served by the device half.
//!
//! It remembers what the driver did to it (kicks, status writes) and lies on request, through the
//! public fields of [`Registers`] and by whatever a test writes into the rings.
// UNSAFETY: the device reaches the memory that the driver gave it, by address, as real ones do.
#![expect(unsafe_code, reason = "a device in memory follows the addresses that the driver gave it")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test's device may panic")]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard};

use janus_proto::abi::virtio::{DeviceId, Status};
use janus_proto::addr::Gpa;
use janus_proto::sync::{AtomicU32, Ordering};
use janus_proto::virtqueue::{DeviceQueue, GuestWords, Rings, Segment};

use super::{Acknowledge, ConfigChanged, InitError, Interrupts, Notifications, Transport};

/// The memory of this process as a device sees it: every address that the driver gave is a pointer.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory;

impl GuestWords for ProcessMemory {
    fn word(&self, address: Gpa) -> Option<&AtomicU32> {
        if address.0 < 0x1_0000 || !address.0.is_multiple_of(4) {
            return None;
        }
        let pointer: *const AtomicU32 =
            core::ptr::with_exposed_provenance(usize::try_from(address.0).ok()?);
        // SAFETY: the drivers under test give addresses of live, page-aligned frames, and nobody else
        // looks at these bytes while the device has them.
        Some(unsafe { &*pointer })
    }
}

/// Reads the bytes of a segment as a device does.
#[must_use]
pub fn read(segment: Segment) -> Vec<u8> {
    (0..u64::from(segment.len)).map(|n| byte(segment.address.0 + n)).collect()
}

fn byte(address: u64) -> u8 {
    let word = ProcessMemory.word(Gpa(address & !3)).map_or(0, |word| word.load(Ordering::Relaxed));
    word.to_le_bytes()[usize::try_from(address & 3).unwrap_or(0)]
}

/// Writes bytes into a segment as a device does; as many as fit.
pub fn write(segment: Segment, bytes: &[u8]) {
    for (address, byte) in
        (segment.address.0..segment.address.0 + u64::from(segment.len)).zip(bytes)
    {
        let Some(word) = ProcessMemory.word(Gpa(address & !3)) else { return };
        let mut old = word.load(Ordering::Relaxed).to_le_bytes();
        old[usize::try_from(address & 3).unwrap_or(0)] = *byte;
        word.store(u32::from_le_bytes(old), Ordering::Relaxed);
    }
}

/// One queue as the device holds it.
#[derive(Debug)]
pub struct FakeQueue {
    /// The device half.
    pub device: DeviceQueue,
    /// Where the driver put the parts.
    pub rings: Rings,
    /// Notifications that came.
    pub kicks: u32,
}

/// What the driver sees of the device, and what it did to it.
#[derive(Debug)]
pub struct Registers {
    /// Device type.
    pub id: DeviceId,
    /// Features offered.
    pub offered: u64,
    /// Features taken.
    pub taken: u64,
    /// Whether the device accepts what was taken.
    pub accepts: bool,
    /// Status register.
    pub status: Status,
    /// Every value written to the status register.
    pub written: Vec<u8>,
    /// Whether a reset ever ends.
    pub resets: bool,
    /// Device configuration.
    pub config: Vec<u8>,
    /// Whether the configuration changes at every look.
    pub restless: bool,
    generation: u32,
    /// Largest size of each queue.
    pub sizes: Vec<u16>,
    /// Queues in use.
    pub queues: Vec<Option<FakeQueue>>,
}

/// The device; clones are the same one.
#[derive(Clone, Debug)]
pub struct FakeDevice {
    registers: Arc<Mutex<Registers>>,
    config_changed: ConfigChanged,
}

impl FakeDevice {
    /// A device that offers `offered`, with queues of these sizes.
    #[must_use]
    pub fn new(id: DeviceId, offered: u64, config: Vec<u8>, sizes: &[u16]) -> Self {
        let registers = Registers {
            id,
            offered,
            taken: 0,
            accepts: true,
            status: Status::empty(),
            written: Vec::new(),
            resets: true,
            config,
            restless: false,
            generation: 0,
            sizes: sizes.to_vec(),
            queues: sizes.iter().map(|_| None).collect(),
        };
        Self {
            registers: Arc::new(Mutex::new(registers)),
            config_changed: Arc::new(AtomicBool::new(false)),
        }
    }
    /// The registers.
    pub fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap()
    }
    /// Changes the status and tells the driver, as a device that fails does.
    pub fn fail(&self) {
        self.registers().status |= Status::DEVICE_NEEDS_RESET;
        self.config_changed.store(true, Ordering::Release);
    }
    /// Serves a queue: `work` gets each chain and answers the bytes written; whether an interrupt is due.
    pub fn serve(&self, queue: usize, mut work: impl FnMut(&[Segment]) -> u32) -> bool {
        let mut registers = self.registers();
        let Some(Some(queue)) = registers.queues.get_mut(queue) else { return false };
        let memory = ProcessMemory;
        let mut chain = Vec::new();
        let mut interrupt = false;
        loop {
            while let Some(head) = queue.device.pop(&memory, &mut chain).unwrap() {
                let written = work(&chain);
                queue.device.push(&memory, head, written).unwrap();
            }
            interrupt |= queue.device.publish(&memory).unwrap();
            if !queue.device.arm(&memory).unwrap() {
                return interrupt;
            }
        }
    }
    /// Kicks of a queue so far.
    #[must_use]
    pub fn kicks(&self, queue: usize) -> u32 {
        self.registers().queues.get(queue).and_then(Option::as_ref).map_or(0, |queue| queue.kicks)
    }
}

impl Transport for FakeDevice {
    fn device_id(&self) -> DeviceId {
        self.registers().id
    }
    fn read_device_features(&mut self) -> u64 {
        self.registers().offered
    }
    fn write_driver_features(&mut self, features: u64) {
        self.registers().taken = features;
    }
    fn status(&self) -> Status {
        self.registers().status
    }
    fn set_status(&mut self, status: Status) {
        let mut registers = self.registers();
        registers.written.push(status.bits());
        if status.is_empty() {
            if !registers.resets {
                return;
            }
            registers.queues.iter_mut().for_each(|queue| *queue = None);
        }
        let refused = status.contains(Status::FEATURES_OK) && !registers.accepts;
        registers.status = if refused { status - Status::FEATURES_OK } else { status };
    }
    fn connect_interrupts(&mut self) -> Result<(), InitError> {
        Ok(())
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        self.registers().sizes.get(usize::from(queue)).copied().unwrap_or(0)
    }
    fn queue_enable(&mut self, queue: u16, size: u16, rings: Rings) -> Result<(), InitError> {
        let mut registers = self.registers();
        let mut device =
            DeviceQueue::new(size, rings, registers.taken).map_err(|_| InitError::Queue(queue))?;
        device.arm(&ProcessMemory).map_err(|_| InitError::Queue(queue))?;
        match registers.queues.get_mut(usize::from(queue)) {
            Some(slot @ None) => *slot = Some(FakeQueue { device, rings, kicks: 0 }),
            _ => return Err(InitError::Queue(queue)),
        }
        Ok(())
    }
    fn queue_enabled(&mut self, queue: u16) -> bool {
        self.registers().queues.get(usize::from(queue)).is_some_and(Option::is_some)
    }
    fn notify(&self, queue: u16) {
        if let Some(Some(queue)) = self.registers().queues.get_mut(usize::from(queue)) {
            queue.kicks += 1;
        }
    }
    fn config_generation(&self) -> u32 {
        let mut registers = self.registers();
        registers.generation += u32::from(registers.restless);
        registers.generation
    }
    fn config_read8(&self, offset: usize) -> u8 {
        self.registers().config.get(offset).copied().unwrap_or(u8::MAX)
    }
    fn config_read16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([0, 1].map(|n| self.config_read8(offset + n)))
    }
    fn config_read32(&self, offset: usize) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|n| self.config_read8(offset + n)))
    }
    fn config_write32(&mut self, offset: usize, value: u32) {
        let mut registers = self.registers();
        for (slot, byte) in registers.config.iter_mut().skip(offset).zip(value.to_le_bytes()) {
            *slot = byte;
        }
    }
    fn interrupts(&self) -> Interrupts {
        Interrupts {
            acknowledge: Acknowledge::Message,
            config_changed: self.config_changed.clone(),
            notifications: Notifications::default(),
        }
    }
}
