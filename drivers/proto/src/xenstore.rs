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

open_enum! {
    /// What a message is (`xs_wire.h`, `enum xsd_sockmsg_type`).
    pub enum MessageType: u32 {
        /// Control of the daemon; privileged.
        CONTROL = 0,
        /// Names of a node's children.
        DIRECTORY = 1,
        /// A node's value.
        READ = 2,
        /// A node's permissions.
        GET_PERMS = 3,
        /// Sets a watch.
        WATCH = 4,
        /// Removes a watch.
        UNWATCH = 5,
        /// Opens a transaction.
        TRANSACTION_START = 6,
        /// Commits or abandons a transaction.
        TRANSACTION_END = 7,
        /// Tells the daemon of a domain; privileged.
        INTRODUCE = 8,
        /// Opposite of `INTRODUCE`; privileged.
        RELEASE = 9,
        /// The path of a domain's own directory.
        GET_DOMAIN_PATH = 10,
        /// Sets a node's value.
        WRITE = 11,
        /// Creates an empty node.
        MKDIR = 12,
        /// Removes a node and what is below it.
        RM = 13,
        /// Sets a node's permissions.
        SET_PERMS = 14,
        /// From the daemon only: a watched node changed.
        WATCH_EVENT = 15,
        /// From the daemon only: a request failed; the payload is an error name.
        ERROR = 16,
        /// Whether a domain has a connection; privileged.
        IS_DOMAIN_INTRODUCED = 17,
        /// Privileged.
        RESUME = 18,
        /// Privileged.
        SET_TARGET = 19,
        /// Removes every watch of the connection and ends its transactions.
        RESET_WATCHES = 21,
        /// A part of a list of children that is too long for one message.
        DIRECTORY_PART = 22,
    }
}

/// A message's header (`xs_wire.h`, `struct xsd_sockmsg`).
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
#[repr(C)]
pub struct Header {
    /// What it is.
    pub kind: MessageType,
    /// Chosen by the client, echoed in the answer.
    pub request_id: u32,
    /// The transaction, 0 outside of one.
    pub transaction: u32,
    /// Payload bytes that follow.
    pub len: u32,
}
assert_layout!(Header, size = 16, kind = 0, request_id = 4, transaction = 8, len = 12);

/// Bytes of a [`Header`].
pub const HEADER_LEN: usize = size_of::<Header>();
/// Longest payload in bytes (`XENSTORE_PAYLOAD_MAX`): a longer one ends the connection.
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path in bytes (`XENSTORE_ABS_PATH_MAX`).
pub const ABSOLUTE_PATH_MAX: usize = 3072;
/// Longest relative path in bytes (`XENSTORE_REL_PATH_MAX`).
pub const RELATIVE_PATH_MAX: usize = 2048;
