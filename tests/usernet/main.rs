//! The user network, with a guest made of smoltcp and peers on the host's loopback interface.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test"
)]

mod datagrams;
mod guest;
mod hostile;
mod tcp;
