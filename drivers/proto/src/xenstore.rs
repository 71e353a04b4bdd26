//! xenstore: the wire codec, and both ends of a connection as machines that do no I/O.
//!
//! Bytes go in and out through slices, so the same code runs over the guest's shared ring, a Unix
//! socket, or two vectors in a test. [`Client`] is the guest's end (ids, watches, replies matched to
//! requests), [`Server`] the daemon's; neither trusts the other's lengths, types or ids.
//! Spec: `xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`.

mod client;
#[cfg(test)]
mod tests;
mod wire;

pub use client::{Client, ClientError, Event, ListStep, Listing, RequestId, Server, Token};
pub use wire::{
    Access, Decoder, Message, Permission, Request, StoreError, TransactionId, WireError,
    parse_permissions, parse_strings, parse_transaction_id, valid_path,
};

pub use crate::abi::xen_io::xs_wire::{
    ABS_PATH_MAX, PAYLOAD_MAX, REL_PATH_MAX, XsHeader as Header, XsMessageType as MessageType,
};

/// Bytes of a [`Header`].
pub const HEADER_LEN: usize = size_of::<Header>();
