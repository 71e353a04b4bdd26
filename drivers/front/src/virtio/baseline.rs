//! The `virtio-drivers` crate on our transports.
//!
//! [`Adapter`] is its `Transport`, [`FramesHal`] its `Hal`. Event index is hidden from it: its test
//! whether to notify is wrong at the wrap of the index and it has no fence behind the index store (see
//! `tests/tests/virtio_drivers_lost_kicks.rs`). Its block and network drivers are the baseline that our
//! own are measured against; its queue carries the low-rate devices of [`super::low_rate`].
// UNSAFETY: implements the crate's unsafe `Hal` trait.
#![expect(unsafe_code, reason = "the crate's Hal trait is unsafe to implement")]

use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use janus_proto::abi::virtio::{Status, feature};
use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::virtqueue::Rings;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus};
use virtio_drivers::{BufferDirection, Error, Hal, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Interrupts, Transport};
use crate::dma::{DmaBuf, FrameSource};

/// How the crate's devices reach memory.
///
/// # Implementation safety
/// `FrameSource::guest_address` of [`Self::frames`] says for every byte of memory that came from there where the device
/// finds it, and memory of one allocation is contiguous for the device too. If [`Self::ANY_MEMORY`] is set, both hold
/// for all memory of the program, heap and stacks included.
pub unsafe trait DeviceFrames: Send + Sync + fmt::Debug + 'static {
    /// Devices reach whatever a pointer points to, not only what came from the source: the crate's own drivers, which
    /// share parts of themselves, need that.
    const ANY_MEMORY: bool;
    /// The source of whole pages.
    fn frames() -> &'static dyn FrameSource;
}

/// The crate's `Hal` over our frames.
#[derive(Debug)]
pub struct FramesHal<S>(PhantomData<S>);

// SAFETY: 1. `dma_alloc` hands on what `FrameSource::allocate` promises: zeroed, page-aligned memory that
// nobody else has; 2. no MMIO is ever mapped through it, because the adapter owns the registers.
unsafe impl<S: DeviceFrames> Hal for FramesHal<S> {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match S::frames().allocate(pages) {
            Some(memory) => (S::frames().guest_address(memory).0, memory),
            None => (0, NonNull::dangling()), // The crate's word for "no memory".
        }
    }
    unsafe fn dma_dealloc(_paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller promises that both are from one `dma_alloc`; the crate has unset the queue.
        unsafe { S::frames().free(vaddr, pages) };
        0
    }
    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("registers at {paddr:#x} belong to the transport")
    }
    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        S::frames().guest_address(buffer.cast()).0 // `DeviceFrames`
    }
    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// One of our transports, as the crate sees it.
#[derive(Debug)]
pub struct Adapter {
    transport: Box<dyn Transport>,
    device: DeviceType,
}

impl Adapter {
    /// Wraps a transport; gives it back if the crate does not know the device type.
    ///
    /// # Errors
    /// The transport.
    pub fn new(transport: Box<dyn Transport>) -> Result<Self, Box<dyn Transport>> {
        match DeviceType::try_from(transport.device_id().0) {
            Ok(device) => Ok(Self { transport, device }),
            Err(_) => Err(transport),
        }
    }
    /// The wrapped transport.
    pub fn transport(&mut self) -> &mut dyn Transport {
        self.transport.as_mut()
    }
    /// What an interrupt handler needs.
    #[must_use]
    pub fn interrupts(&self) -> Interrupts {
        self.transport.interrupts()
    }
}

impl virtio_drivers::transport::Transport for Adapter {
    fn device_type(&self) -> DeviceType {
        self.device
    }
    fn read_device_features(&mut self) -> u64 {
        self.transport.read_device_features() & !feature::RING_EVENT_IDX
    }
    fn write_driver_features(&mut self, driver_features: u64) {
        self.transport.write_driver_features(driver_features);
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.transport.queue_max_size(queue).into()
    }
    fn notify(&mut self, queue: u16) {
        self.transport.notify(queue);
    }
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.transport.status().bits().into())
    }
    #[expect(clippy::cast_possible_truncation, reason = "every status bit is in the low byte")]
    fn set_status(&mut self, status: DeviceStatus) {
        if status.is_empty() {
            // A device that does not finish is found by the crate when it looks at the queues.
            _ = self.transport.reset();
            return;
        }
        self.transport.set_status(Status::from_bits_retain(status.bits() as u8));
        if status.contains(DeviceStatus::FEATURES_OK) && !status.contains(DeviceStatus::DRIVER_OK) {
            // Without vectors the device only loses its interrupts; the baseline polls anyway.
            _ = self.transport.connect_interrupts();
        }
    }
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {} // Legacy only.
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let rings = Rings {
            descriptors: Gpa(descriptors),
            available: Gpa(driver_area),
            used: Gpa(device_area),
        };
        let size = u16::try_from(size).unwrap_or(0);
        if let Err(error) = self.transport.queue_enable(queue, size, rings) {
            log::error!("virtio: {error}"); // The crate has no way to hear of it.
        }
    }
    fn queue_unset(&mut self, _queue: u16) {
        // One queue alone cannot be taken back over PCI; the crate does so only when it drops a driver.
        _ = self.transport.reset();
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.transport.queue_enabled(queue)
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_truncate(self.transport.interrupts().acknowledge().bits())
    }
    fn read_config_generation(&self) -> u32 {
        self.transport.config_generation()
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        match (bytes.len(), align_of::<T>()) {
            // The width of the field, as virtio 1.2, 4.1.3.1 demands.
            (2, 2) => bytes.copy_from_slice(&self.transport.config_read16(offset).to_le_bytes()),
            (len, 4..) if len.is_multiple_of(4) => {
                for (chunk, at) in bytes.chunks_exact_mut(4).zip((offset..).step_by(4)) {
                    chunk.copy_from_slice(&self.transport.config_read32(at).to_le_bytes());
                }
            }
            _ => {
                for (byte, at) in bytes.iter_mut().zip(offset..) {
                    *byte = self.transport.config_read8(at);
                }
            }
        }
        Ok(value)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        let Ok(bytes) = <[u8; 4]>::try_from(value.as_bytes()) else {
            return Err(Error::Unsupported); // No device here has another writable field.
        };
        self.transport.config_write32(offset, u32::from_le_bytes(bytes));
        Ok(())
    }
}

/// Whole pages for a low-rate device.
pub(super) fn page<S: DeviceFrames>() -> Option<DmaBuf> {
    DmaBuf::new(S::frames(), PAGE_SIZE)
}
