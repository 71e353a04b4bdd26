//! The codec: messages, requests, permissions and error names, in both directions.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use zerocopy::{FromBytes, IntoBytes};

use super::{ABS_PATH_MAX, HEADER_LEN, Header, MessageType, PAYLOAD_MAX, REL_PATH_MAX};
use crate::addr::DomId;

/// The other end broke the wire protocol; the connection cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// A header announces more than [`PAYLOAD_MAX`] bytes.
    PayloadTooLong(u32),
    /// An answer to a request that was never sent, or was answered already.
    UnexpectedReply(u32),
    /// An answer of another type than its request.
    WrongReplyType {
        /// What was asked.
        asked: MessageType,
        /// What came.
        came: MessageType,
    },
    /// A payload does not have the form its type demands.
    Malformed(MessageType),
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PayloadTooLong(len) => {
                write!(f, "xenstore message of {len} bytes, more than {PAYLOAD_MAX}")
            }
            Self::UnexpectedReply(id) => write!(f, "xenstore answered request {id}, never asked"),
            Self::WrongReplyType { asked, came } => {
                write!(f, "xenstore answered {asked:?} with {came:?}")
            }
            Self::Malformed(kind) => write!(f, "xenstore sent a malformed {kind:?}"),
        }
    }
}

impl core::error::Error for WireError {}

macro_rules! store_errors {
    ($($(#[$meta:meta])* $variant:ident = $name:literal: $text:literal,)*) => {
        /// Why the daemon refused a request: an error name of `xs_wire.h`, `xsd_errors`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum StoreError {
            $(#[doc = $text] $variant,)*
            /// A name that `xs_wire.h` does not list.
            Unknown,
        }
        impl StoreError {
            /// The error that a name on the wire stands for (without its closing NUL).
            #[must_use]
            pub fn from_name(name: &[u8]) -> Self {
                $(if name == $name.as_bytes() { return Self::$variant; })*
                Self::Unknown
            }
            /// The name on the wire. `Unknown` travels as `EIO`, because a peer must know the name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Unknown => "EIO",
                }
            }
            /// Every error with a name.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];
        }
        impl fmt::Display for StoreError {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $text,)*
                    Self::Unknown => "an error of unknown name",
                })
            }
        }
    };
}

store_errors! {
    Invalid = "EINVAL": "invalid argument",
    AccessDenied = "EACCES": "permission denied",
    Exists = "EEXIST": "already exists",
    IsDirectory = "EISDIR": "is a directory",
    NotFound = "ENOENT": "no such node",
    OutOfMemory = "ENOMEM": "the daemon is out of memory",
    NoSpace = "ENOSPC": "over quota",
    Io = "EIO": "I/O error in the daemon",
    NotEmpty = "ENOTEMPTY": "not empty",
    NotSupported = "ENOSYS": "not supported by the daemon",
    ReadOnly = "EROFS": "read-only",
    Busy = "EBUSY": "busy",
    Again = "EAGAIN": "the transaction conflicted, try again",
    Connected = "EISCONN": "already connected",
    TooBig = "E2BIG": "too big for one message",
    NotPermitted = "EPERM": "operation not permitted",
}

impl core::error::Error for StoreError {}

/// A transaction's id, given by the daemon; [`TransactionId::NONE`] outside of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(pub u32);

impl TransactionId {
    /// Not inside a transaction.
    pub const NONE: Self = Self(0);
}

/// One whole message, of either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: MessageType,
    /// Id of the request, also in its answer; 0 in watch events.
    pub request_id: u32,
    /// The transaction it belongs to.
    pub transaction: TransactionId,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Message {
    /// Appends the bytes that travel.
    ///
    /// # Errors
    /// The payload is too long; nothing was appended.
    pub fn encode(&self, out: &mut impl Extend<u8>) -> Result<(), WireError> {
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        if self.payload.len() > PAYLOAD_MAX {
            return Err(WireError::PayloadTooLong(len));
        }
        let header =
            Header { kind: self.kind, req_id: self.request_id, tx_id: self.transaction.0, len };
        out.extend(header.as_bytes().iter().copied());
        out.extend(self.payload.iter().copied());
        Ok(())
    }
}

/// Cuts a stream of bytes into messages, however the stream is broken up.
///
/// Holds at most what was pushed and not yet taken; a length that no message may have is refused
/// as soon as its header is complete, so a lying peer cannot make it grow.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` that were taken already.
    taken: usize,
    broken: Option<WireError>,
}

impl Decoder {
    /// Adds bytes from the other end.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken.is_none() {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// Takes one message, if it is complete.
    ///
    /// # Errors
    /// The stream is broken; it stays so, because nobody knows where the next message starts.
    pub fn take(&mut self) -> Result<Option<Message>, WireError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let rest = self.buffer.get(self.taken..).unwrap_or(&[]);
        let Ok((header, rest)) = Header::read_from_prefix(rest) else {
            return Ok(None);
        };
        let len = header.len as usize;
        if len > PAYLOAD_MAX {
            let error = WireError::PayloadTooLong(header.len);
            self.broken = Some(error);
            self.buffer = Vec::new();
            self.taken = 0;
            return Err(error);
        }
        let Some(payload) = rest.get(..len) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken += HEADER_LEN + len;
        Ok(Some(Message {
            kind: header.kind,
            request_id: header.req_id,
            transaction: TransactionId(header.tx_id),
            payload,
        }))
    }
}

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing (`n`).
    None,
    /// Read it (`r`).
    Read,
    /// Write it (`w`).
    Write,
    /// Both (`b`).
    Both,
}

/// One entry of a node's permissions. The first entry names the owner, and its access is everybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// What is allowed.
    pub access: Access,
    /// To whom.
    pub domain: DomId,
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.domain)
    }
}

impl Permission {
    /// Reads the text form, such as `r0`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (letter, number) = text.split_at_checked(1)?;
        let access = match letter {
            "n" => Access::None,
            "r" => Access::Read,
            "w" => Access::Write,
            "b" => Access::Both,
            _ => return None,
        };
        Some(Self { access, domain: DomId(decimal(number)?) })
    }
}

/// A request, as the client writes it and as the daemon reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Names of the children of a node.
    Directory(&'a str),
    /// The same from a byte offset of the list on.
    DirectoryPart {
        /// The node.
        path: &'a str,
        /// Bytes of the list to skip.
        offset: u32,
    },
    /// A node's value.
    Read(&'a str),
    /// A node's permissions.
    GetPermissions(&'a str),
    /// Watches a node and everything below it.
    Watch {
        /// The node, or a special name (`@releaseDomain`).
        path: &'a str,
        /// Comes back with every event.
        token: &'a str,
    },
    /// Removes a watch.
    Unwatch {
        /// As it was given to `Watch`.
        path: &'a str,
        /// As it was given to `Watch`.
        token: &'a str,
    },
    /// Opens a transaction.
    TransactionStart,
    /// Commits the transaction of the message.
    Commit,
    /// Abandons the transaction of the message.
    Abandon,
    /// The path of a domain's own directory.
    GetDomainPath(DomId),
    /// Sets a node's value, creating it and its parents.
    Write {
        /// The node.
        path: &'a str,
        /// Any bytes.
        value: &'a [u8],
    },
    /// Creates an empty node and its parents; leaves an existing one alone.
    MakeDirectory(&'a str),
    /// Removes a node and everything below it.
    Remove(&'a str),
    /// Replaces a node's permissions.
    SetPermissions {
        /// The node.
        path: &'a str,
        /// At least one: the owner.
        permissions: Vec<Permission>,
    },
    /// Removes all watches and ends all transactions of this connection.
    ResetWatches,
}

impl<'a> Request<'a> {
    /// The type that travels in the header.
    #[must_use]
    pub const fn kind(&self) -> MessageType {
        match self {
            Self::Directory(_) => MessageType::DIRECTORY,
            Self::DirectoryPart { .. } => MessageType::DIRECTORY_PART,
            Self::Read(_) => MessageType::READ,
            Self::GetPermissions(_) => MessageType::GET_PERMS,
            Self::Watch { .. } => MessageType::WATCH,
            Self::Unwatch { .. } => MessageType::UNWATCH,
            Self::TransactionStart => MessageType::TRANSACTION_START,
            Self::Commit | Self::Abandon => MessageType::TRANSACTION_END,
            Self::GetDomainPath(_) => MessageType::GET_DOMAIN_PATH,
            Self::Write { .. } => MessageType::WRITE,
            Self::MakeDirectory(_) => MessageType::MKDIR,
            Self::Remove(_) => MessageType::RM,
            Self::SetPermissions { .. } => MessageType::SET_PERMS,
            Self::ResetWatches => MessageType::RESET_WATCHES,
        }
    }

    /// The payload that travels; every string is closed by a NUL, a value is not.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut string = |text: &str| {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        };
        match self {
            Self::Directory(path)
            | Self::Read(path)
            | Self::GetPermissions(path)
            | Self::MakeDirectory(path)
            | Self::Remove(path) => string(path),
            Self::DirectoryPart { path, offset } => {
                string(path);
                string(&alloc::format!("{offset}"));
            }
            Self::Watch { path, token } | Self::Unwatch { path, token } => {
                string(path);
                string(token);
            }
            Self::TransactionStart | Self::ResetWatches => string(""),
            Self::Commit => string("T"),
            Self::Abandon => string("F"),
            Self::GetDomainPath(domain) => string(&alloc::format!("{domain}")),
            Self::Write { path, value } => {
                string(path);
                out.extend_from_slice(value);
            }
            Self::SetPermissions { path, permissions } => {
                string(path);
                for permission in permissions {
                    string(&alloc::format!("{permission}"));
                }
            }
        }
        out
    }

    /// Reads a request, as the daemon does.
    ///
    /// # Errors
    /// What to answer: `EINVAL` for a payload of the wrong form, `ENOSYS` for a type that is no
    /// request of a guest.
    pub fn parse(kind: MessageType, payload: &'a [u8]) -> Result<Self, StoreError> {
        let invalid = StoreError::Invalid;
        let path_of = |watch_names: WatchNames| -> Result<(&'a str, &'a [u8]), StoreError> {
            let (path, rest) = cut(payload).ok_or(invalid)?;
            let special = watch_names == WatchNames::Allowed && path.starts_with('@');
            if special || valid_path(path) { Ok((path, rest)) } else { Err(invalid) }
        };
        let lone_path = || match path_of(WatchNames::Refused)? {
            (path, []) => Ok(path),
            _ => Err(invalid),
        };
        // The C daemon takes these with and without a closing NUL.
        let text = |bytes: &'a [u8]| {
            let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
            core::str::from_utf8(bytes).map_err(|_| invalid)
        };
        Ok(match kind {
            MessageType::DIRECTORY => Self::Directory(lone_path()?),
            MessageType::READ => Self::Read(lone_path()?),
            MessageType::GET_PERMS => Self::GetPermissions(lone_path()?),
            MessageType::MKDIR => Self::MakeDirectory(lone_path()?),
            MessageType::RM => Self::Remove(lone_path()?),
            MessageType::DIRECTORY_PART => {
                let (path, rest) = path_of(WatchNames::Refused)?;
                Self::DirectoryPart { path, offset: decimal(text(rest)?).ok_or(invalid)? }
            }
            MessageType::WATCH | MessageType::UNWATCH => {
                let (path, rest) = path_of(WatchNames::Allowed)?;
                let token = text(rest)?;
                if token.contains('\0') {
                    return Err(invalid);
                }
                if kind == MessageType::WATCH {
                    Self::Watch { path, token }
                } else {
                    Self::Unwatch { path, token }
                }
            }
            MessageType::TRANSACTION_START => Self::TransactionStart,
            MessageType::TRANSACTION_END => match text(payload)? {
                "T" => Self::Commit,
                "F" => Self::Abandon,
                _ => return Err(invalid),
            },
            MessageType::GET_DOMAIN_PATH => {
                Self::GetDomainPath(DomId(decimal(text(payload)?).ok_or(invalid)?))
            }
            MessageType::WRITE => {
                let (path, value) = path_of(WatchNames::Refused)?;
                Self::Write { path, value }
            }
            MessageType::SET_PERMS => {
                let (path, rest) = path_of(WatchNames::Refused)?;
                let permissions = parse_permissions(rest).map_err(|_| invalid)?;
                if permissions.is_empty() {
                    return Err(invalid);
                }
                Self::SetPermissions { path, permissions }
            }
            MessageType::RESET_WATCHES => Self::ResetWatches,
            _ => return Err(StoreError::NotSupported),
        })
    }
}

/// Whether `@introduceDomain` and the like may stand for a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WatchNames {
    Allowed,
    Refused,
}

/// Whether the daemon takes this as a path (`docs/misc/xenstore.txt`, "Communication with xenstore"):
/// its characters, its length, no empty component, no closing `/` except in `/` itself.
#[must_use]
pub fn valid_path(path: &str) -> bool {
    let limit = if path.starts_with('/') { ABS_PATH_MAX } else { REL_PATH_MAX };
    let bytes = path.as_bytes();
    let known = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@');
    !bytes.is_empty()
        && bytes.len() <= limit
        && bytes.iter().all(known)
        && !path.contains("//")
        && (path == "/" || !path.ends_with('/'))
}

/// A decimal number and nothing else: no sign, no space, no overflow.
fn decimal<T: TryFrom<u64>>(text: &str) -> Option<T> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    T::try_from(text.parse::<u64>().ok()?).ok()
}

/// Cuts the first NUL-closed string off.
pub(super) fn cut(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|&b| b == 0)?;
    let text = core::str::from_utf8(bytes.get(..end)?).ok()?;
    Some((text, bytes.get(end + 1..)?))
}

/// Reads a list of NUL-closed strings: children, or permissions.
///
/// # Errors
/// [`WireError::Malformed`]: the last string is not closed, or is not UTF-8.
pub fn parse_strings(mut payload: &[u8]) -> Result<Vec<String>, WireError> {
    let mut strings = Vec::new();
    while !payload.is_empty() {
        let (text, rest) = cut(payload).ok_or(WireError::Malformed(MessageType::DIRECTORY))?;
        strings.push(String::from(text));
        payload = rest;
    }
    Ok(strings)
}

/// Reads the permissions in a `GET_PERMS` answer or a `SET_PERMS` request.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn parse_permissions(mut payload: &[u8]) -> Result<Vec<Permission>, WireError> {
    let malformed = WireError::Malformed(MessageType::GET_PERMS);
    let mut permissions = Vec::new();
    while !payload.is_empty() {
        let (text, rest) = cut(payload).ok_or(malformed)?;
        permissions.push(Permission::parse(text).ok_or(malformed)?);
        payload = rest;
    }
    Ok(permissions)
}

/// Reads the id in a `TRANSACTION_START` answer.
///
/// # Errors
/// [`WireError::Malformed`]: no number, or 0, which means "no transaction".
pub fn parse_transaction_id(payload: &[u8]) -> Result<TransactionId, WireError> {
    let malformed = WireError::Malformed(MessageType::TRANSACTION_START);
    let (text, _) = cut(payload).ok_or(malformed)?;
    match decimal::<u32>(text) {
        Some(id) if id != 0 => Ok(TransactionId(id)),
        _ => Err(malformed),
    }
}
