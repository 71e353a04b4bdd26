//! An HTTP/1.1 server for the mounted file systems: GET and HEAD, ranges, keep-alive, directory listings.
//!
//! - `request.rs`: what a client may ask, parsed by `httparse` and checked;
//! - `reply.rs`: heads, media types, error and directory pages;
//! - `server.rs`: the port on the network;
//! - here: the life of a connection, over any byte stream.
//!
//! Ref: RFC 9110 (semantics), RFC 9112 (messages).

pub mod reply;
pub mod request;
pub mod server;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::future::Future;
use core::time::Duration;

use crate::fs::volume::File;
use crate::fs::{DirEntry, FsError, Metadata, NodeKind};
use crate::{task, time};
use reply::{Body, Reply};
use request::{Method, ParseError, Request};

/// The longest request head, in bytes; more is answered with 431.
pub const MAX_HEAD: usize = 8 * 1024;
/// Bytes of a file read and sent at a time.
const PIECE: u64 = crate::fs::file_cache::PIECE as u64;
/// How long a client may take over a request head, or be silent between requests.
const IDLE: Duration = Duration::from_secs(30);
/// How long a client may take over one piece of the answer.
const STALL: Duration = Duration::from_secs(60);

/// A byte stream to a client.
pub trait Connection: Send {
    /// Why the stream failed.
    type Error: Send;
    /// Reads some bytes; 0 when the client has closed its side.
    fn read(&mut self, buf: &mut [u8]) -> impl Future<Output = Result<usize, Self::Error>> + Send;
    /// Sends all bytes, as far as the local buffer goes.
    fn write_all(&mut self, bytes: &[u8]) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// What is served.
pub trait Files: Send + Sync {
    /// What `path` is.
    fn metadata(&self, path: &str) -> impl Future<Output = Result<Metadata, FsError>> + Send;
    /// The entries of a directory.
    fn list(&self, path: &str) -> impl Future<Output = Result<Vec<DirEntry>, FsError>> + Send;
    /// Opens a file.
    fn open(&self, path: &str) -> impl Future<Output = Result<File, FsError>> + Send;
}

/// The tree of mounted volumes.
#[derive(Clone, Copy, Debug)]
pub struct MountedFiles;

impl Files for MountedFiles {
    async fn metadata(&self, path: &str) -> Result<Metadata, FsError> {
        crate::fs::mounts::metadata(path).await
    }
    async fn list(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        crate::fs::mounts::list(path).await
    }
    async fn open(&self, path: &str) -> Result<File, FsError> {
        crate::fs::mounts::open(path).await
    }
}

/// Why a connection ended before the client closed it.
#[derive(Debug)]
pub enum End<E> {
    /// The client closed, or asked us to, or an answer said so: the normal case.
    Closed,
    /// The client was silent, or took nothing, for too long.
    TimedOut,
    /// The stream failed.
    Stream(E),
    /// The file could not be read after its head had been sent; the connection is cut so that the client notices.
    File(FsError),
}

impl<E> From<time::Elapsed> for End<E> {
    fn from(_: time::Elapsed) -> Self {
        Self::TimedOut
    }
}

/// Answers requests until the connection ends; the caller closes it.
pub async fn serve<C: Connection>(connection: &mut C, files: &impl Files) -> End<C::Error> {
    let mut input = Vec::with_capacity(1024);
    loop {
        match one_exchange(connection, files, &mut input).await {
            Ok(true) => {}
            Ok(false) => return End::Closed,
            Err(end) => return end,
        }
    }
}

/// One request and its answer; `false` if the connection is to end.
async fn one_exchange<C: Connection>(
    connection: &mut C,
    files: &impl Files,
    input: &mut Vec<u8>,
) -> Result<bool, End<C::Error>> {
    let request = loop {
        match request::parse(input) {
            Ok((request, len)) => {
                input.drain(..len);
                break request;
            }
            Err(ParseError::Incomplete) if input.len() < MAX_HEAD => {
                let mut some = [0; 1024];
                let len =
                    time::timeout(IDLE, connection.read(&mut some)).await?.map_err(End::Stream)?;
                if len == 0 {
                    return Ok(false);
                }
                input.extend_from_slice(some.get(..len).unwrap_or_default());
            }
            Err(error) => {
                send(connection, Reply::error(error.status()), Method::Get, false).await?;
                return Ok(false);
            }
        }
    };
    let reply = answer(&request, files).await;
    let keep_alive = request.keep_alive && reply.status < 500;
    send(connection, reply, request.method, keep_alive).await?;
    Ok(keep_alive)
}

/// Works out the answer to a request.
async fn answer(request: &Request, files: &impl Files) -> Reply {
    if request.method == Method::Other {
        return Reply::error(405).with_header("Allow", "GET, HEAD".to_string());
    }
    match find(request, files).await {
        Ok(reply) => reply,
        Err(FsError::NotFound | FsError::NotADirectory | FsError::NotAFile) => Reply::error(404),
        Err(FsError::BadPath) => Reply::error(400),
        Err(FsError::NoMemory) => Reply::error(503),
        Err(error) => {
            log::warn!("http: {}: {error}", request.path);
            Reply::error(500)
        }
    }
}

async fn find(request: &Request, files: &impl Files) -> Result<Reply, FsError> {
    let path = &request.path;
    let metadata = files.metadata(path).await?;
    if metadata.kind != NodeKind::Directory {
        return open(request, path, files).await;
    }
    if !path.ends_with('/') {
        // Relative links in a listing or index page need the slash.
        return Ok(Reply::error(301).with_header("Location", reply::percent_encode(path) + "/"));
    }
    match open(request, &(path.clone() + "index.html"), files).await {
        Err(FsError::NotFound | FsError::NotAFile) => {}
        found => return found,
    }
    Ok(reply::directory(path, &files.list(path).await?))
}

async fn open(request: &Request, path: &str, files: &impl Files) -> Result<Reply, FsError> {
    let file = files.open(path).await?;
    let size = file.size();
    let media_type = reply::media_type(path);
    Ok(match request.range.map(|range| range.within(size)) {
        None => Reply::new(200, media_type, Body::File { file, start: 0, len: size })
            .with_header("Accept-Ranges", "bytes".to_string()),
        Some(Some((start, len))) => {
            let last = start + len - 1;
            Reply::new(206, media_type, Body::File { file, start, len })
                .with_header("Content-Range", alloc::format!("bytes {start}-{last}/{size}"))
        }
        Some(None) => {
            Reply::error(416).with_header("Content-Range", alloc::format!("bytes */{size}"))
        }
    })
}

/// Sends a whole answer.
async fn send<C: Connection>(
    connection: &mut C,
    reply: Reply,
    method: Method,
    keep_alive: bool,
) -> Result<(), End<C::Error>> {
    let mut head = reply.head(keep_alive).into_bytes();
    match reply.body {
        Body::Text(text) => {
            if method != Method::Head {
                head.extend_from_slice(text.as_bytes());
            }
            write(connection, &head).await
        }
        Body::File { file, start, len } => {
            if method == Method::Head || len == 0 {
                return write(connection, &head).await;
            }
            send_file(connection, &head, &file, start, len).await
        }
    }
}

async fn write<C: Connection>(connection: &mut C, bytes: &[u8]) -> Result<(), End<C::Error>> {
    time::timeout(STALL, connection.write_all(bytes)).await?.map_err(End::Stream)
}

/// Sends a range of a file, straight from the cache's pieces; the next one is read while one is sent.
async fn send_file<C: Connection>(
    connection: &mut C,
    head: &[u8],
    file: &File,
    start: u64,
    len: u64,
) -> Result<(), End<C::Error>> {
    let end = start + len;
    write(connection, head).await?;
    let mut at = start;
    let mut current = file.piece(at / PIECE).await.map_err(End::File)?;
    loop {
        let from = usize::try_from(at % PIECE).unwrap_or(0);
        let rest = current.get(from..).filter(|rest| !rest.is_empty());
        let rest = rest.ok_or_else(|| {
            End::File(FsError::Corrupt("the file ends before its size".to_string()))
        })?;
        let wanted = usize::try_from(end - at).unwrap_or(usize::MAX);
        let part = rest.get(..wanted).unwrap_or(rest);
        at += part.len() as u64;
        if at >= end {
            return write(connection, part).await;
        }
        let (sent, next) = task::join(write(connection, part), file.piece(at / PIECE)).await;
        sent?;
        current = next.map_err(End::File)?;
    }
}

/// The status line's words (RFC 9110, 15).
#[must_use]
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        301 => "Moved Permanently",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        414 => "URI Too Long",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Unknown",
    }
}

/// A path as it may stand in a log line: control characters replaced.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests;
