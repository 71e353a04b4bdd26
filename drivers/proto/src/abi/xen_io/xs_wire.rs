//! Xenstore: messages and ring page (`xen/include/public/io/xs_wire.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// [`XsHeader::kind`] (`XS_*`).
    pub enum XsMessageType: u32 {
        /// Commands to the daemon.
        CONTROL = 0,
        /// Lists children.
        DIRECTORY = 1,
        /// Reads a node.
        READ = 2,
        /// Reads permissions.
        GET_PERMS = 3,
        /// Sets a watch.
        WATCH = 4,
        /// Removes it.
        UNWATCH = 5,
        /// Starts a transaction.
        TRANSACTION_START = 6,
        /// Ends it.
        TRANSACTION_END = 7,
        /// Tells of a new domain.
        INTRODUCE = 8,
        /// Tells of its end.
        RELEASE = 9,
        /// Home of a domain.
        GET_DOMAIN_PATH = 10,
        /// Writes a node.
        WRITE = 11,
        /// Makes a node.
        MKDIR = 12,
        /// Removes a node and its children.
        RM = 13,
        /// Sets permissions.
        SET_PERMS = 14,
        /// A watch fired (from the daemon, unasked).
        WATCH_EVENT = 15,
        /// The request failed: the name of an error.
        ERROR = 16,
        /// Asks for a domain.
        IS_DOMAIN_INTRODUCED = 17,
        /// A domain resumed.
        RESUME = 18,
        /// Lets one domain act for another.
        SET_TARGET = 19,
        /// Drops all watches and transactions of the caller.
        RESET_WATCHES = 21,
        /// Lists children in parts.
        DIRECTORY_PART = 22,
    }
}

/// Before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XsHeader {
    /// What.
    pub kind: XsMessageType,
    /// Chosen by the client, echoed in the answer.
    pub req_id: u32,
    /// Transaction, or 0.
    pub tx_id: u32,
    /// Bytes that follow, at most [`PAYLOAD_MAX`].
    pub len: u32,
}
assert_layout!(XsHeader, size = 16, kind = 0, req_id = 4, tx_id = 8, len = 12);

/// Longest payload in bytes; a longer one breaks the connection.
pub const PAYLOAD_MAX: usize = 4096;

/// Longest absolute path in bytes.
pub const ABS_PATH_MAX: usize = 3072;

/// Longest relative path in bytes.
pub const REL_PATH_MAX: usize = 2048;

/// Byte offset and size of `req` in the ring page: from the guest to the daemon.
pub const REQ: (usize, usize) = (0, 1024);
/// Byte offset and size of `rsp`: from the daemon to the guest.
pub const RSP: (usize, usize) = (1024, 1024);
/// Byte offset of `req_cons`.
pub const REQ_CONS: usize = 2048;
/// Byte offset of `req_prod`.
pub const REQ_PROD: usize = 2052;
/// Byte offset of `rsp_cons`.
pub const RSP_CONS: usize = 2056;
/// Byte offset of `rsp_prod`.
pub const RSP_PROD: usize = 2060;
/// Byte offset of [`ServerFeatures`].
pub const SERVER_FEATURES: usize = 2064;
/// Byte offset of [`Connection`].
pub const CONNECTION: usize = 2068;
/// Byte offset of [`RingError`].
pub const ERROR: usize = 2072;

open_flags! {
    /// What the daemon can do (`XENSTORE_SERVER_FEATURE_*`).
    pub struct ServerFeatures: u32 {
        /// The ring can be reconnected.
        const RECONNECTION = 1;
        /// The `error` field exists.
        const ERROR = 2;
    }
}

open_enum! {
    /// State of the connection.
    pub enum Connection: u32 {
        /// In use.
        CONNECTED = 0,
        /// The guest asks for a reconnection; the daemon writes 0 when done.
        RECONNECT = 1,
    }
}

open_enum! {
    /// What the daemon found wrong (`XENSTORE_ERROR_*`).
    pub enum RingError: u32 {
        /// Nothing.
        NONE = 0,
        /// Communication problem.
        COMM = 1,
        /// Invalid ring index.
        RINGIDX = 2,
        /// Protocol violation.
        PROTO = 3,
    }
}
