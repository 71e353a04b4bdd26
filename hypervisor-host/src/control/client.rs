//! The side of whoever controls a guest.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::protocol::{Answer, Request};
use super::runtime::Entry;

/// A request failed.
#[derive(Debug)]
pub enum ClientError {
    /// The connection failed.
    Connection(io::Error),
    /// The socket is not this user's.
    Foreign,
    /// The guest ended before it answered.
    Gone,
    /// It refused.
    Refused(String),
    /// The answer makes no sense: another version?
    Nonsense(serde_json::Error),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(error) => write!(f, "the guest cannot be reached: {error}"),
            Self::Foreign => f.write_str("the socket is another user's"),
            Self::Gone => f.write_str("the guest ended before it answered"),
            Self::Refused(why) => f.write_str(why),
            Self::Nonsense(error) => write!(f, "the answer cannot be read: {error}"),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Gone,
            _ => Self::Connection(error),
        }
    }
}

/// A connection to a guest.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to a guest.
    ///
    /// # Errors
    /// It is gone, or not this user's.
    pub fn open(guest: &Entry) -> Result<Self, ClientError> {
        Self::new(UnixStream::connect(&guest.socket)?)
    }

    /// Uses a connection that there is.
    ///
    /// # Errors
    /// The other end is not this user's.
    pub fn new(stream: UnixStream) -> Result<Self, ClientError> {
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from)?;
        if peer.uid != rustix::process::geteuid() {
            return Err(ClientError::Foreign);
        }
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Waits at most so long for each answer from now on; `None`: for ever.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&self, most: Option<Duration>) -> Result<(), ClientError> {
        Ok(self.stream.get_ref().set_read_timeout(most)?)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        let mut line = serde_json::to_string(request).map_err(ClientError::Nonsense)?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            return Err(ClientError::Gone);
        }
        match serde_json::from_str(&answer).map_err(ClientError::Nonsense)? {
            Answer::Ok(value) => serde_json::from_value(value).map_err(ClientError::Nonsense),
            Answer::Error(why) => Err(ClientError::Refused(why)),
        }
    }

    /// The rest of the connection: a console, or events. What came already is the first.
    #[must_use]
    pub fn into_inner(self) -> (Vec<u8>, UnixStream) {
        let early = self.stream.buffer().to_vec();
        (early, self.stream.into_inner())
    }

    /// The next line of events; `None`: the guest ended.
    ///
    /// # Errors
    /// The connection failed.
    pub fn line(&mut self) -> Result<Option<String>, ClientError> {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line)?;
        Ok((count > 0).then(|| line.trim_end().to_owned()))
    }
}
