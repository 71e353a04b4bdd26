//! Asks a Xen of everything, and tells what it answers.
//!
//! Nothing here is right or wrong by itself: each test prints `{"answer":KEY,"is":VALUE}` lines, and `cargo xtask
//! conformance` (and the matrix) compare them with those of a real Xen, kept in `tests/conformance/xen-4.17.toml`.
//! Answers say nothing of where things are in memory, how fast they are, or which CPU it is: those differ anyway.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "words of the interface are cut into their fields; all lengths are constants"
)]
// On the host, alloc's names come with the standard library.
#![cfg_attr(
    not(target_os = "none"),
    expect(unused_qualifications, reason = "the guest has to name alloc")
)]
#![cfg_attr(not(target_os = "none"), allow(dead_code, unused_mut, reason = "only the guest asks"))]

extern crate alloc;

mod ask;
mod calls;
mod descriptors;
mod events;
mod exceptions;
mod fifo;
mod grants;
mod instructions;
mod limits;
mod memory;
mod operands;
mod probe;
mod sched;
mod start;
mod tables;
mod user;
mod version;

janus_kernel::test_image!();
