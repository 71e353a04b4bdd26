//! The paravirtual protocols of Xen and virtio: layouts, rings, codecs and state machines.
//!
//! Both halves of every protocol stand side by side here, so that a test is "one page, two ends"
//! and the guest's frontend cannot drift away from the host's backend. What belongs here: anything
//! that can be written without I/O, without `unsafe` and without knowing who runs it. What never
//! will: hypercalls, memory mapping, interrupts, allocation policy.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
// rustc cannot see that they come from a derive when the type stands in a macro, as all of `open_enum!` do.
#![expect(missing_debug_implementations, reason = "zerocopy's derive makes public helper types")]

extern crate alloc;

#[macro_use]
pub mod abi;
pub mod addr;
pub mod byte_ring;
pub mod evtchn;
pub mod grant;
pub mod pvclock;
pub mod ring;
pub mod sync;
pub mod virtqueue;
pub mod xenbus;
pub mod xenstore;
