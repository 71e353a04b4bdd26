//! Guest drivers for both paravirtual worlds, generic over a small [`hal`].
//!
//! Xen and virtio differ in kind below, so they meet above, in the device classes of [`class`], and
//! underneath, in the memory that is shared with the peer, [`dma`]. Every driver is a state machine
//! that submits and completes; it never waits, so the kernel decides what blocks.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

extern crate alloc;

pub mod class;
pub mod dma;
#[cfg(any(test, feature = "std"))]
pub mod fake;
pub mod hal;
#[cfg(any(test, feature = "std"))]
pub mod heap_frames;
pub mod mmio;
pub mod virtio;
pub mod xen;
