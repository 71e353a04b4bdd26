//! The guest kernel as a library: what a test image, or the default image, is built from.
#![cfg_attr(target_os = "none", no_std)]

extern crate alloc;

pub mod block;
pub mod devices;
pub mod dma_pool;
pub mod console;
pub mod cpu;
pub mod fs;
pub mod http;
pub mod irq;
pub mod mm;
pub mod panic;
pub mod percpu;
pub mod platform;
pub mod power;
#[cfg(target_os = "none")]
mod start;
pub mod sync;
pub mod task;
pub mod test;
pub mod time;
pub mod trap;
