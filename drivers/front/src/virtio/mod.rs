//! virtio drivers, over PCI and MMIO alike.
//!
//! [`Transport`] carries the specification's state machine (virtio 1.2, 3.1.1) as default methods; its
//! implementations ([`pci`], [`mmio`], and a device in memory for tests) give register access only.
//! Block and network stand on our own ring ([`janus_proto::virtqueue`]); [`low_rate`] runs the
//! `virtio-drivers` crate's queue on the same transports where throughput does not matter.

pub mod balloon;
pub mod baseline;
pub mod baseline_blk;
pub mod baseline_net;
pub mod blk;
pub mod low_rate;
pub mod mmio;
pub mod net;
pub mod pci;

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of the test's own")]
mod blk_tests;
#[cfg(any(test, feature = "std"))]
pub mod fake;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of the test's own")]
mod net_tests;
#[cfg(test)]
mod other_tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use janus_proto::abi::virtio::{DeviceId, InterruptStatus, Status, feature};
use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::sync::AtomicU32;
use janus_proto::virtqueue::{DriverQueue, IndirectMemory, Layout, Rings};

use crate::class::PeerError;
use crate::dma::{FrameSource, SharedFrames};
use crate::mmio::MmioRegion;

/// Why a device could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitError {
    /// Only the legacy interface of before virtio 1.0.
    Legacy,
    /// The device did not accept the features chosen from its own offer.
    Features,
    /// Status never became 0 after a reset.
    Reset,
    /// A queue that the device type has is missing.
    NoQueue(u16),
    /// A queue was in use already, or its size is impossible.
    Queue(u16),
    /// The device has no room for an interrupt vector.
    Vector,
    /// A capability or register window is missing, or outside its BAR.
    Window(&'static str),
    /// Not enough memory.
    Memory,
    /// A value in the configuration makes no sense.
    Config(&'static str),
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Legacy => {
                f.write_str("the device knows only the legacy interface, of before virtio 1.0")
            }
            Self::Features => f.write_str("the device did not accept features that it offered"),
            Self::Reset => f.write_str("the device did not finish its reset"),
            Self::NoQueue(queue) => write!(f, "the device has no queue {queue}"),
            Self::Queue(queue) => write!(f, "queue {queue} was in use or has an impossible size"),
            Self::Vector => f.write_str("the device has no room for an interrupt vector"),
            Self::Window(which) => write!(f, "no usable {which} registers"),
            Self::Memory => f.write_str("not enough memory for its queues"),
            Self::Config(what) => write!(f, "configuration makes no sense: {what}"),
        }
    }
}

impl core::error::Error for InitError {}

/// Polls of the status register before a reset counts as failed.
const RESET_POLLS: usize = 1_000_000;

/// Features that every driver here takes when they are offered.
///
/// `ACCESS_PLATFORM` too: no IOMMU is ever switched on here, so the addresses stay what they are.
pub const COMMON_FEATURES: u64 = feature::VERSION_1
    | feature::RING_EVENT_IDX
    | feature::RING_INDIRECT_DESC
    | feature::ACCESS_PLATFORM;

/// A way to a device's registers.
pub trait Transport: Send + fmt::Debug {
    /// What kind of device it is.
    fn device_id(&self) -> DeviceId;
    /// The features it offers.
    fn read_device_features(&mut self) -> u64;
    /// Tells it the features that the driver takes.
    fn write_driver_features(&mut self, features: u64);
    /// The status register.
    fn status(&self) -> Status;
    /// Writes the status register; empty resets.
    fn set_status(&mut self, status: Status);
    /// Connects the configuration interrupt; called after every negotiation, as a reset undoes it.
    ///
    /// # Errors
    /// [`InitError::Vector`].
    fn connect_interrupts(&mut self) -> Result<(), InitError>;
    /// The most entries that a queue can have; 0 if there is no such queue.
    fn queue_max_size(&mut self, queue: u16) -> u16;
    /// Gives a queue to the device.
    ///
    /// # Errors
    /// [`InitError::Queue`], [`InitError::Vector`].
    fn queue_enable(&mut self, queue: u16, size: u16, rings: Rings) -> Result<(), InitError>;
    /// Whether a queue has been given to the device.
    fn queue_enabled(&mut self, queue: u16) -> bool;
    /// Tells the device to look at a queue: one register write.
    fn notify(&self, queue: u16);
    /// Changes whenever the device changes its configuration.
    fn config_generation(&self) -> u32;
    /// Reads a byte of the device's configuration.
    fn config_read8(&self, offset: usize) -> u8;
    /// Reads two bytes of the device's configuration.
    fn config_read16(&self, offset: usize) -> u16;
    /// Reads four bytes of the device's configuration.
    fn config_read32(&self, offset: usize) -> u32;
    /// Writes four bytes of the device's configuration.
    fn config_write32(&mut self, offset: usize, value: u32);
    /// What an interrupt handler needs, apart from the driver.
    fn interrupts(&self) -> Interrupts;

    /// Resets the device and waits until it has let go of all memory.
    ///
    /// # Errors
    /// [`InitError::Reset`]: it may still use memory that it was given.
    fn reset(&mut self) -> Result<(), InitError> {
        self.set_status(Status::empty());
        for _ in 0..RESET_POLLS {
            let status = self.status().bits();
            // All ones: nobody answers any more, so nobody touches memory either.
            if status == 0 || status == 0xff {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(InitError::Reset)
    }

    /// Resets the device and agrees on features (virtio 1.2, 3.1.1, steps 1 to 6).
    ///
    /// # Errors
    /// [`InitError::Reset`], [`InitError::Legacy`], [`InitError::Features`], [`InitError::Vector`].
    fn negotiate(&mut self, supported: u64) -> Result<u64, InitError> {
        self.reset()?;
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        let offered = self.read_device_features();
        if offered & feature::VERSION_1 == 0 {
            self.set_status(Status::FAILED);
            return Err(InitError::Legacy);
        }
        let features = offered & (supported | feature::VERSION_1);
        self.write_driver_features(features);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        if !self.status().contains(Status::FEATURES_OK) {
            self.set_status(Status::FAILED);
            return Err(InitError::Features);
        }
        self.connect_interrupts()?;
        Ok(features)
    }

    /// Sets the device to work (step 8).
    fn start(&mut self) {
        self.set_status(
            Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK,
        );
    }

    /// Reads eight bytes of configuration that belong together (virtio 1.2, 2.5.1).
    ///
    /// # Errors
    /// [`InitError::Config`] if the device changes it faster than we can read.
    fn config_read64(&self, offset: usize) -> Result<u64, InitError> {
        for _ in 0..1000 {
            let before = self.config_generation();
            let low = self.config_read32(offset);
            let high = self.config_read32(offset + 4);
            if self.config_generation() == before {
                return Ok(u64::from(low) | u64::from(high) << 32);
            }
        }
        Err(InitError::Config("it never holds still"))
    }
}

/// Set by the interrupt handler when the configuration (or the status) of a device changed.
pub type ConfigChanged = Arc<AtomicBool>;

/// The interrupt side of a device: usable while the driver is busy elsewhere.
#[derive(Clone, Debug)]
pub struct Interrupts {
    acknowledge: Acknowledge,
    config_changed: ConfigChanged,
    notifications: Notifications,
}

/// Counts what the driver tells the device: see [`Interrupts::notifications`].
type Notifications = Arc<AtomicU64>;

/// How the reason of an interrupt is read and taken back.
#[derive(Clone, Debug)]
enum Acknowledge {
    /// Message-signalled: nothing to take back.
    Message,
    /// PCI: reading the ISR register takes it back.
    Isr(MmioRegion),
    /// MMIO: `InterruptStatus` and `InterruptACK`.
    Mmio(MmioRegion),
}

impl Interrupts {
    /// Takes back a level-triggered interrupt and answers its reasons (none: it was another device's).
    ///
    /// A configuration change is passed on to the driver.
    pub fn acknowledge(&self) -> InterruptStatus {
        let status = match &self.acknowledge {
            Acknowledge::Message => InterruptStatus::QUEUE,
            Acknowledge::Isr(isr) => InterruptStatus::from_bits_truncate(u32::from(isr.read8(0))),
            Acknowledge::Mmio(registers) => mmio::acknowledge(registers),
        };
        if status.contains(InterruptStatus::CONFIG) {
            self.config_changed();
        }
        status
    }
    /// How often the driver has told the device to look at a queue.
    #[must_use]
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }
    /// Tells the driver that the configuration or the status changed.
    pub fn config_changed(&self) {
        self.config_changed.store(true, Ordering::Release);
    }
}

/// The device's memory and interrupts as a driver sees them.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) transport: Box<dyn Transport>,
    config_changed: ConfigChanged,
}

impl Link {
    pub(crate) fn new(transport: Box<dyn Transport>) -> Self {
        let config_changed = transport.interrupts().config_changed;
        Self { transport, config_changed }
    }
    /// Whether the configuration changed since the last call.
    pub(crate) fn take_config_changed(&self) -> bool {
        self.config_changed.load(Ordering::Relaxed)
            && self.config_changed.swap(false, Ordering::Acquire)
    }
    /// Whether the device has given up, or gone.
    pub(crate) fn failed(&self) -> bool {
        let status = self.transport.status();
        status.contains(Status::DEVICE_NEEDS_RESET) || !status.contains(Status::DRIVER_OK)
    }
}

/// The text of a broken device, for errors.
pub(crate) const NEEDS_RESET: PeerError = PeerError("the device asks for a reset");

/// Memory of a ring, which is given up for good if its device cannot be stopped.
#[derive(Debug)]
pub(crate) struct RingMemory(Option<SharedFrames>);

impl RingMemory {
    pub(crate) fn new(frames: &'static dyn FrameSource, bytes: usize) -> Result<Self, InitError> {
        let memory =
            SharedFrames::new(frames, bytes.div_ceil(PAGE_SIZE)).ok_or(InitError::Memory)?;
        Ok(Self(Some(memory)))
    }
    pub(crate) fn guest_address(&self) -> Gpa {
        self.0.as_ref().map_or(Gpa(0), SharedFrames::guest_address)
    }
    pub(crate) fn leak(&mut self) {
        if let Some(memory) = self.0.take() {
            memory.leak();
        }
    }
}

impl core::ops::Deref for RingMemory {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        self.0.as_deref().unwrap_or(&[])
    }
}

/// A queue in memory that a device reaches.
pub(crate) type Queue = DriverQueue<RingMemory>;

/// Makes a queue of at most `wanted` entries, with indirect tables of `table` entries (0: none), and
/// gives it to the device.
pub(crate) fn make_queue(
    transport: &mut dyn Transport,
    frames: &'static dyn FrameSource,
    queue: u16,
    wanted: u16,
    table: u16,
    features: u64,
) -> Result<Queue, InitError> {
    let most = transport.queue_max_size(queue);
    if most == 0 {
        return Err(InitError::NoQueue(queue));
    }
    // The largest power of two that both sides can do: a PCI device may offer any other number only by mistake.
    let size = most.min(wanted);
    let size = if size.is_power_of_two() { size } else { size.next_power_of_two() >> 1 };
    let layout = Layout::new(size).ok_or(InitError::Queue(queue))?;
    let memory = RingMemory::new(frames, layout.bytes())?;
    let rings = Rings::of(layout, memory.guest_address());
    let indirect = if table != 0 && features & feature::RING_INDIRECT_DESC != 0 {
        let memory = RingMemory::new(frames, IndirectMemory::<RingMemory>::bytes(size, table))?;
        Some(IndirectMemory { address: memory.guest_address(), memory, entries: table })
    } else {
        None
    };
    let driver =
        DriverQueue::new(size, memory, indirect, features).map_err(|_| InitError::Queue(queue))?;
    transport.queue_enable(queue, size, rings)?;
    Ok(driver)
}
