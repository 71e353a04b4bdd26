//! The guest kernel as a library: what a test image, or the default image, is built from.
#![cfg_attr(target_os = "none", no_std)]

extern crate alloc;

pub mod sync;
pub mod task;
pub mod time;
