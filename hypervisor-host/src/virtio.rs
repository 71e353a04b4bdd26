//! virtio devices (virtio 1.2), for any engine: what a virtual machine monitor's device models are.
//!
//! ```text
//!  the guest's driver ── registers ──> mmio::Mmio ──> device::Device ──> a Model: rng, blk, …
//!                     ── queues ─────> memory::GuestMemory ─┘
//!                    <── interrupts ── mmio::Line
//! ```
//!
//! A [`Model`] knows what its device does and nothing of registers, interrupts or where a guest's memory is;
//! [`device::Device`] has the specification's state machine and the queues; [`mmio::Mmio`] is the register file. An
//! engine gives three things: the guest's memory, a [`mmio::Line`] to interrupt it by, and its register accesses; it
//! calls [`device::Device::notify`] when the guest asks for that by another way (an eventfd, an event channel).
//!
//! The queues are `janus_proto::virtqueue`'s device half, the same code that the driver half is model-checked against.
//! rust-vmm's `virtio-queue` is not used here but tested against: it wants memory that is contiguous and reached
//! through raw pointers, where ours may be granted page by page and is only ever atomics; and without the event index
//! it interrupts drivers that asked not to be.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod memory;
pub mod mmio;
pub mod net;
pub mod pv;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod testing;

use janus_proto::abi::virtio::DeviceId;
use janus_proto::virtqueue::QueueError;

use device::Waker;
use queue::Queue;

/// What a device does, behind its queues. Its methods are called from the threads of virtual CPUs: they do not wait.
///
/// Locks are taken in this order: the device's registers, a queue, what the model has of its own.
pub trait Model: Send + Sync + 'static {
    /// What kind of device it is.
    fn id(&self) -> DeviceId;
    /// The features of its kind that it offers; those of the queues are added.
    fn features(&self) -> u64 {
        0
    }
    /// Whether to serve it takes long: each queue has a thread then, and no CPU of the guest's waits.
    fn is_slow(&self) -> bool {
        false
    }
    /// The most entries of each queue, a power of two each.
    fn queues(&self) -> &[u16];
    /// Its configuration, as it is now.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    /// The driver writes to the configuration.
    fn write_config(&self, _offset: usize, _bytes: &[u8]) {}
    /// Is called once, before everything else: by `waker` it has its queues served when it has something of its own.
    fn attach(&self, _waker: Waker) {}
    /// The driver is ready, and took these features.
    fn start(&self, _features: u64) {}
    /// The device is reset; no queue is being served.
    fn stop(&self) {}
    /// Does what there is to do with a queue: the driver notified it, or the model's own waker was used. At the end
    /// either [`Queue::arm`] was asked whether there is more, or the model wakes itself later.
    ///
    /// # Errors
    /// The driver broke the queue: the device asks for a reset.
    fn serve(&self, index: u16, queue: &mut Queue) -> Result<(), QueueError>;
}
