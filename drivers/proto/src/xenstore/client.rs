//! The two ends of a connection: requests matched to answers, watches to tokens, long lists to parts.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use super::wire::{
    Decoder, Message, Request, StoreError, TransactionId, WireError, cut, parse_strings, valid_path,
};
use super::{MessageType, PAYLOAD_MAX};

/// Names one request of this connection until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u32);

/// Names one watch of this connection. Travels as text, as xenstore demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// Why a request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// The daemon would close the connection on a payload of this many bytes.
    TooLong(usize),
    /// The daemon would not take this path, or it would cut the payload elsewhere than meant.
    InvalidPath,
    /// The connection is broken.
    Broken(WireError),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(len) => write!(f, "{len} bytes are more than a xenstore message holds"),
            Self::InvalidPath => f.write_str("not a xenstore path"),
            Self::Broken(error) => write!(f, "the xenstore connection is broken: {error}"),
        }
    }
}

impl core::error::Error for ClientError {}

/// What the daemon said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request is done.
    Reply {
        /// Which.
        id: RequestId,
        /// Its payload, or the daemon's refusal.
        result: Result<Vec<u8>, StoreError>,
    },
    /// A watched node, or one below it, changed (or the watch was just set).
    Changed {
        /// Which watch.
        token: Token,
        /// Which node.
        path: String,
    },
}

/// The guest's end of a connection. Many requests may be under way.
#[derive(Debug, Default)]
pub struct Client {
    last_id: u32,
    last_token: u32,
    /// What was asked, by id.
    pending: BTreeMap<u32, MessageType>,
    tokens: BTreeSet<Token>,
    outgoing: VecDeque<u8>,
    decoder: Decoder,
    broken: Option<WireError>,
    strays: u64,
}

impl Client {
    /// Queues a request; its bytes are then in [`Self::outgoing`].
    ///
    /// # Errors
    /// See [`ClientError`]; nothing was queued.
    pub fn request(
        &mut self,
        transaction: TransactionId,
        request: &Request<'_>,
    ) -> Result<RequestId, ClientError> {
        if let Some(error) = self.broken {
            return Err(ClientError::Broken(error));
        }
        check(request)?;
        let payload = request.payload();
        if payload.len() > PAYLOAD_MAX {
            return Err(ClientError::TooLong(payload.len()));
        }
        let id = self.free_id();
        let kind = request.kind();
        let message = Message { kind, request_id: id, transaction, payload };
        message.encode(&mut self.outgoing).map_err(ClientError::Broken)?;
        self.pending.insert(id, kind);
        Ok(RequestId(id))
    }

    /// Queues a request to watch `path`. Events may arrive before the answer does.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn watch(&mut self, path: &str) -> Result<(RequestId, Token), ClientError> {
        loop {
            self.last_token = self.last_token.wrapping_add(1);
            if !self.tokens.contains(&Token(self.last_token)) {
                break;
            }
        }
        let token = Token(self.last_token);
        let text = token.to_string();
        let id = self.request(TransactionId::NONE, &Request::Watch { path, token: &text })?;
        self.tokens.insert(token);
        Ok((id, token))
    }

    /// Queues a request to drop a watch; from here on its events are swallowed.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn unwatch(&mut self, path: &str, token: Token) -> Result<RequestId, ClientError> {
        self.tokens.remove(&token);
        let text = token.to_string();
        self.request(TransactionId::NONE, &Request::Unwatch { path, token: &text })
    }

    /// Bytes to send, oldest first; tell [`Self::sent`] how many went.
    #[must_use]
    pub fn outgoing(&self) -> &[u8] {
        self.outgoing.as_slices().0
    }

    /// Bytes to send in all, of which [`Self::outgoing`] may be a part.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.outgoing.len()
    }

    /// Takes `count` bytes off [`Self::outgoing`].
    pub fn sent(&mut self, count: usize) {
        self.outgoing.drain(..count.min(self.outgoing.len()));
    }

    /// Adds bytes that arrived; [`Self::event`] then tells what they mean.
    pub fn received(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// Takes the next thing the daemon said.
    ///
    /// # Errors
    /// The daemon broke the protocol. The connection stays broken until [`Self::reset`].
    pub fn event(&mut self) -> Result<Option<Event>, WireError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let result = self.next_event();
        if let Err(error) = result {
            self.broken = Some(error);
        }
        result
    }

    /// Requests not answered yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Events that named no live watch: late ones after an unwatch, or a confused daemon's.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Starts afresh on a new connection; answers the requests that will never be answered.
    pub fn reset(&mut self) -> Vec<RequestId> {
        let lost = self.pending.keys().map(|&id| RequestId(id)).collect();
        *self = Self { last_id: self.last_id, last_token: self.last_token, ..Self::default() };
        lost
    }

    fn next_event(&mut self) -> Result<Option<Event>, WireError> {
        while let Some(message) = self.decoder.take()? {
            if message.kind != MessageType::WATCH_EVENT {
                return self.reply(message).map(Some);
            }
            let malformed = WireError::Malformed(MessageType::WATCH_EVENT);
            let (path, rest) = cut(&message.payload).ok_or(malformed)?;
            let (token, _) = cut(rest).ok_or(malformed)?;
            match u32::from_str_radix(token, 16).map(Token) {
                Ok(token) if self.tokens.contains(&token) => {
                    return Ok(Some(Event::Changed { token, path: String::from(path) }));
                }
                _ => self.strays = self.strays.wrapping_add(1),
            }
        }
        Ok(None)
    }

    fn reply(&mut self, message: Message) -> Result<Event, WireError> {
        let Some(asked) = self.pending.remove(&message.request_id) else {
            return Err(WireError::UnexpectedReply(message.request_id));
        };
        let id = RequestId(message.request_id);
        if message.kind == MessageType::ERROR {
            let name = message.payload.strip_suffix(&[0]).unwrap_or(&message.payload);
            return Ok(Event::Reply { id, result: Err(StoreError::from_name(name)) });
        }
        if message.kind != asked {
            return Err(WireError::WrongReplyType { asked, came: message.kind });
        }
        Ok(Event::Reply { id, result: Ok(message.payload) })
    }

    /// An id that no request under way has; never 0, which watch events carry.
    fn free_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            if self.last_id != 0 && !self.pending.contains_key(&self.last_id) {
                return self.last_id;
            }
        }
    }
}

/// Refuses what would not survive the wire: a NUL inside a string moves the end of it.
fn check(request: &Request<'_>) -> Result<(), ClientError> {
    let (path, special) = match request {
        Request::Directory(path)
        | Request::DirectoryPart { path, .. }
        | Request::Read(path)
        | Request::GetPermissions(path)
        | Request::Write { path, .. }
        | Request::MakeDirectory(path)
        | Request::Remove(path)
        | Request::SetPermissions { path, .. } => (*path, false),
        Request::Watch { path, token } | Request::Unwatch { path, token } => {
            if token.contains('\0') {
                return Err(ClientError::InvalidPath);
            }
            (*path, path.starts_with('@') && !path.contains('\0'))
        }
        Request::TransactionStart
        | Request::Commit
        | Request::Abandon
        | Request::GetDomainPath(_)
        | Request::ResetWatches => return Ok(()),
    };
    if special || valid_path(path) { Ok(()) } else { Err(ClientError::InvalidPath) }
}

/// What a [`Listing`] wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListStep {
    /// Send [`Listing::request`] again and feed its answer.
    Again,
    /// The complete list.
    Done(Vec<String>),
}

/// Lists a node's children whatever their number: one `DIRECTORY`, and when that is too big for a
/// message, `DIRECTORY_PART` after part, from the start again whenever the node changed in between.
#[derive(Debug)]
pub struct Listing {
    path: String,
    /// `None`: the whole list in one message; else the bytes of it that are here already.
    parts: Option<Vec<u8>>,
    generation: Option<String>,
    restarts: u32,
}

impl Listing {
    /// Changes during one listing before it is given up as [`StoreError::Again`].
    pub const MAX_RESTARTS: u32 = 16;
    /// Longest list in bytes; far above any quota of a daemon.
    pub const MAX_LEN: usize = 1 << 20;

    /// Lists the children of `path`.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self { path: String::from(path), parts: None, generation: None, restarts: 0 }
    }

    /// What to ask now.
    #[must_use]
    pub fn request(&self) -> Request<'_> {
        match &self.parts {
            None => Request::Directory(&self.path),
            Some(parts) => Request::DirectoryPart {
                path: &self.path,
                offset: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            },
        }
    }

    /// Feeds the answer to [`Self::request`].
    ///
    /// # Errors
    /// The daemon's refusal; [`StoreError::Io`] for an answer without sense.
    pub fn reply(&mut self, result: Result<&[u8], StoreError>) -> Result<ListStep, StoreError> {
        let broken = |_: WireError| StoreError::Io;
        let Some(parts) = &mut self.parts else {
            return match result {
                Ok(payload) => parse_strings(payload).map(ListStep::Done).map_err(broken),
                Err(StoreError::TooBig) => {
                    self.parts = Some(Vec::new());
                    Ok(ListStep::Again)
                }
                Err(error) => Err(error),
            };
        };
        let (generation, list) = cut(result?).ok_or(StoreError::Io)?;
        let unchanged = self.generation.as_deref().is_none_or(|known| known == generation);
        if !unchanged {
            self.restarts += 1;
            if self.restarts > Self::MAX_RESTARTS {
                return Err(StoreError::Again);
            }
            parts.clear();
            self.generation = None;
            return Ok(ListStep::Again);
        }
        self.generation = Some(String::from(generation));
        // An empty string closes the list; a part without any byte would be asked for again for ever.
        let last = match list {
            [] => return Err(StoreError::Io),
            [0] => true,
            [.., 0, 0] => true,
            [.., 0] => false,
            _ => return Err(StoreError::Io),
        };
        let body = if last { list.get(..list.len() - 1).unwrap_or(&[]) } else { list };
        if parts.len() + body.len() > Self::MAX_LEN {
            return Err(StoreError::TooBig);
        }
        parts.extend_from_slice(body);
        if !last {
            return Ok(ListStep::Again);
        }
        parse_strings(parts).map(ListStep::Done).map_err(broken)
    }
}

/// The daemon's end of a connection: requests come out, answers and events go in.
#[derive(Debug, Default)]
pub struct Server {
    decoder: Decoder,
    outgoing: VecDeque<u8>,
}

impl Server {
    /// Adds bytes from the guest.
    pub fn received(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// Takes one request; [`Request::parse`] reads it.
    ///
    /// # Errors
    /// The guest broke the framing; the connection is of no more use.
    pub fn request(&mut self) -> Result<Option<Message>, WireError> {
        self.decoder.take()
    }

    /// Answers `to` with a payload of its own type; one that does not fit becomes `E2BIG`.
    pub fn reply(&mut self, to: &Message, payload: Vec<u8>) {
        if payload.len() > PAYLOAD_MAX {
            return self.refuse(to, StoreError::TooBig);
        }
        self.answer(to, to.kind, payload);
    }

    /// Answers `to` with the `OK` of requests that have no other result.
    pub fn reply_ok(&mut self, to: &Message) {
        self.answer(to, to.kind, b"OK\0".to_vec());
    }

    /// Answers `to` with an error.
    pub fn refuse(&mut self, to: &Message, error: StoreError) {
        let mut payload = error.name().as_bytes().to_vec();
        payload.push(0);
        self.answer(to, MessageType::ERROR, payload);
    }

    /// Tells the guest that `path` changed under the watch `token`.
    ///
    /// # Errors
    /// The two are longer than a message; nothing was queued.
    pub fn changed(&mut self, path: &str, token: &str) -> Result<(), WireError> {
        let payload = [path.as_bytes(), &[0], token.as_bytes(), &[0]].concat();
        let kind = MessageType::WATCH_EVENT;
        let event = Message { kind, request_id: 0, transaction: TransactionId::NONE, payload };
        event.encode(&mut self.outgoing)
    }

    /// Bytes to send, oldest first; tell [`Self::sent`] how many went.
    #[must_use]
    pub fn outgoing(&self) -> &[u8] {
        self.outgoing.as_slices().0
    }

    /// Bytes to send in all, of which [`Self::outgoing`] may be a part.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.outgoing.len()
    }

    /// Takes `count` bytes off [`Self::outgoing`].
    pub fn sent(&mut self, count: usize) {
        self.outgoing.drain(..count.min(self.outgoing.len()));
    }

    fn answer(&mut self, to: &Message, kind: MessageType, payload: Vec<u8>) {
        let (request_id, transaction) = (to.request_id, to.transaction);
        let answer = Message { kind, request_id, transaction, payload };
        // Every payload that gets here was measured, or is a short constant.
        let encoded = answer.encode(&mut self.outgoing);
        debug_assert!(encoded.is_ok());
    }
}
