//! The kernel's own tests, run inside a guest: `test=NAME` on the command line picks one.
//!
//! Where each runs, and which are meant to crash, stands in `tests/matrix.toml`.
#![cfg_attr(target_os = "none", no_std, no_main)]

extern crate alloc;

mod clocks;
mod cpu;
mod cpus;
mod disks;
mod memory;
mod networks;
mod randomness;
mod tasks;
mod traps;
mod xen;

janus_kernel::test_image!();
