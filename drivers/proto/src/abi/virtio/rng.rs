//! Entropy device (virtio 1.2, 5.4); it has no configuration.

/// The only queue.
pub const QUEUE_REQUEST: u16 = 0;
