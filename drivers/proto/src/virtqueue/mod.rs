//! The split virtqueue (virtio 1.2, 2.7), both halves: [`DriverQueue`] in the guest, [`DeviceQueue`] in the host.
//!
//! Shared memory is seen as 32-bit atomics only, so that no two widths ever race on the same bytes:
//! `flags` and `idx` of a ring are one word with one writer, and 16-bit ring entries are written two at
//! a time by their only writer. The order of a notification is the delicate part, on both sides alike:
//! publish the index, **full fence**, then look at what the other side asked for ([`need_event`]); the
//! other side asks, full fence, then looks at the index. Without the fences a kick can be lost: the
//! loom tests show both.

mod device;
mod driver;
#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;

pub use device::{DeviceQueue, GuestWords, Rings, Segment};
pub use driver::{DriverQueue, IndirectMemory, QueueStats, Used};

use crate::sync::AtomicU32;

/// Memory that both sides of a queue can reach.
pub trait SharedWords: core::ops::Deref<Target = [AtomicU32]> {}
impl<M: core::ops::Deref<Target = [AtomicU32]>> SharedWords for M {}

/// Whether a side that moved its index from `old` to `new` must notify a peer that asked for `event`.
///
/// True if `event` lies in `old..new`, modulo 2^16 (virtio 1.2, 2.7.7.2; `vring_need_event` in Linux).
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Why a queue cannot be used, or can no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// Not enough free descriptors at the moment.
    Full,
    /// A chain of no buffers, or of more than the queue could ever hold.
    BadLength,
    /// The size is not a power of two from 2 to 32768, or the memory is too small for it.
    BadSize,
    /// The used index is further ahead than there are buffers in flight.
    UsedIndex,
    /// A used id that is not the head of a chain in flight.
    UsedId,
    /// More bytes used than the chain has room for.
    UsedLength,
    /// The available index is further ahead than the queue is long.
    AvailableIndex,
    /// A descriptor index beyond the table.
    DescriptorIndex,
    /// A chain longer than its table: a loop.
    DescriptorLoop,
    /// An indirect table inside another, empty, or of no whole number of descriptors; or not negotiated.
    Indirect,
    /// A buffer to read behind one to write.
    Order,
    /// An address outside memory.
    Address,
    /// A chain of more than 2^32 - 1 bytes.
    Overflow,
    /// The peer broke the protocol before; the queue must be set up anew.
    Broken,
}

impl QueueError {
    /// The rule that was broken, as a sentence fragment.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::Full => "no free descriptors",
            Self::BadLength => "a chain of no buffers or of too many",
            Self::BadSize => {
                "a queue size that is no power of two from 2 to 32768, or too little memory for it"
            }
            Self::UsedIndex => "used index beyond the buffers in flight",
            Self::UsedId => "used id that is not in flight",
            Self::UsedLength => "used length beyond the buffer",
            Self::AvailableIndex => "available index beyond the queue",
            Self::DescriptorIndex => "descriptor index beyond the table",
            Self::DescriptorLoop => "descriptor chain longer than its table",
            Self::Indirect => "malformed indirect descriptor",
            Self::Order => "readable descriptor behind a writable one",
            Self::Address => "address outside memory",
            Self::Overflow => "chain of more than 4 GiB",
            Self::Broken => "queue broken earlier",
        }
    }
}

impl core::fmt::Display for QueueError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.message())
    }
}

impl core::error::Error for QueueError {}

/// Bytes in a descriptor.
const DESC_BYTES: usize = 16;
/// Words in a descriptor.
const DESC_WORDS: usize = 4;

/// Where the three parts of a queue lie, in bytes from the start of its memory.
///
/// The used ring starts on a cache line of its own: it is the only part that the device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u16,
}

impl Layout {
    /// The layout of a queue of `size` entries; `None` unless a power of two from 2 to 32768.
    #[must_use]
    pub const fn new(size: u16) -> Option<Self> {
        if size.is_power_of_two() && size >= 2 { Some(Self { size }) } else { None }
    }
    /// Entries.
    #[must_use]
    pub const fn size(self) -> u16 {
        self.size
    }
    /// Offset of the available ring; the descriptor table is at 0.
    #[must_use]
    pub const fn available(self) -> usize {
        self.size as usize * DESC_BYTES
    }
    /// Offset of the used ring.
    #[must_use]
    pub const fn used(self) -> usize {
        (self.available() + 4 + 2 * self.size as usize + 2).next_multiple_of(64)
    }
    /// Bytes in all.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.used() + 4 + 8 * self.size as usize + 4
    }
}
