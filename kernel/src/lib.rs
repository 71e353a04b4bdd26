//! The guest kernel as a library: what a test image, or the default image, is built from.
#![cfg_attr(target_os = "none", no_std)]

extern crate alloc;

pub mod cpu;
pub mod irq;
pub mod mm;
pub mod percpu;
pub mod platform;
pub mod power;
pub mod sync;
pub mod task;
pub mod time;
pub mod trap;
