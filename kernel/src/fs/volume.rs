//! A mounted file system behind an async interface: one fiber owns it and serves requests in turn.
//!
//! The libraries underneath are synchronous and not `Send`, so the file system is made inside its fiber and never
//! leaves it; only requests and answers cross. While the fiber waits for its disk, every other task goes on.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use super::archive::Archive;
use super::disk_reader::DiskReader;
use super::ext::Ext;
use super::fat::Fat;
use super::file_cache::{self, PIECE, Piece};
use super::{DirEntry, FileSystem, FsError, Metadata, normalise, partition};
use crate::block::Block;
use crate::block::cache::Cached;
use crate::sync::Channel;
use crate::task;

/// Requests that may wait for the fiber.
const QUEUE: usize = 64;

type Reply<T> = Arc<Channel<Result<T, FsError>>>;

enum Request {
    Metadata(String, Reply<Metadata>),
    List(String, Reply<Vec<DirEntry>>),
    Open(String, Reply<(u64, u64)>),
    Read { handle: u64, offset: u64, buf: Vec<u8>, reply: Reply<Vec<u8>> },
    Close(u64),
    Stop,
}

/// A mounted file system. Dropping the last clone of it, and its files, unmounts it.
#[derive(Clone, Debug)]
pub struct Volume(Arc<Shared>);

struct Shared {
    requests: Arc<Channel<Request>>,
    type_name: &'static str,
    label: String,
    source: String,
    /// By which the cache knows its files.
    number: u64,
    /// `None` for a module in memory.
    disk: Option<Arc<Block>>,
}

impl core::fmt::Debug for Shared {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} on {}", self.type_name, self.source)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        file_cache::forget(self.number);
        post(&self.requests, Request::Stop);
    }
}

/// Hands over a request from a place that cannot wait (`drop`): a task waits for room if there is none now.
fn post(requests: &Arc<Channel<Request>>, request: Request) {
    if let Err(request) = requests.try_send(request) {
        let requests = Arc::clone(requests);
        drop(task::spawn("volume-post", async move { requests.send(request).await }));
    }
}

/// What a fiber makes its file system from.
type Maker = Box<dyn FnOnce() -> Result<Box<dyn FileSystem>, FsError> + Send>;

impl Volume {
    /// Mounts the first thing on `disk` that can be mounted: the whole disk, or else its partitions in order.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`] names what was looked for; a recognised but broken file system says what is wrong.
    pub async fn mount(disk: Arc<Block>) -> Result<Self, FsError> {
        let source = String::from(disk.name());
        let kept = Arc::clone(&disk);
        Self::serve(source, Some(kept), Box::new(move || probe(disk))).await
    }

    /// Mounts an archive that the loader put into memory.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`] if it is neither tar nor cpio (newc); [`FsError::Corrupt`] if it is broken.
    pub async fn mount_module(name: &str, data: &'static [u8]) -> Result<Self, FsError> {
        let make = move || Archive::in_memory(data).map(|fs| Box::new(fs) as Box<dyn FileSystem>);
        Self::serve(String::from(name), None, Box::new(make)).await
    }

    async fn serve(source: String, disk: Option<Arc<Block>>, make: Maker) -> Result<Self, FsError> {
        let requests = Arc::new(Channel::new(QUEUE));
        let mounted: Reply<(&'static str, String)> = Arc::new(Channel::new(1));
        let (queue, answer) = (Arc::clone(&requests), Arc::clone(&mounted));
        let fiber = task::try_spawn_fiber("volume", move || {
            let result = make();
            match result {
                Ok(mut fs) => {
                    // The channel has room for one answer and gets one.
                    drop(answer.try_send(Ok((fs.type_name(), fs.label()))));
                    run(&mut *fs, &queue);
                }
                Err(error) => drop(answer.try_send(Err(error))),
            }
        });
        drop(fiber.map_err(|_| FsError::NoMemory)?);
        let (type_name, label) = mounted.recv().await?;
        let number = file_cache::new_volume();
        Ok(Self(Arc::new(Shared { requests, type_name, label, source, number, disk })))
    }

    /// The type, for people: `ext4`, `vfat`, `tar`, `cpio`.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        self.0.type_name
    }
    /// The label; empty if there is none.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.0.label
    }
    /// What it was mounted from: a disk's or a module's name.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.0.source
    }
    /// What `path` is, following symbolic links.
    ///
    /// # Errors
    /// See [`FsError`].
    pub async fn metadata(&self, path: &str) -> Result<Metadata, FsError> {
        let path = normalise(path)?;
        self.ask(|reply| Request::Metadata(path, reply)).await
    }
    /// The entries of a directory, sorted by name.
    ///
    /// # Errors
    /// See [`FsError`].
    pub async fn list(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let path = normalise(path)?;
        let mut entries = self.ask(|reply| Request::List(path, reply)).await?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }
    /// Opens a file.
    ///
    /// # Errors
    /// See [`FsError`].
    pub async fn open(&self, path: &str) -> Result<File, FsError> {
        let path = normalise(path)?;
        let name = Arc::from(path.as_str());
        let (handle, size) = self.ask(|reply| Request::Open(path, reply)).await?;
        Ok(File { volume: self.clone(), path: name, handle, size })
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, FsError> {
        let reply = Arc::new(Channel::new(1));
        self.0.requests.send(request(Arc::clone(&reply))).await;
        reply.recv().await
    }
}

/// An open file; any number of reads may be under way.
#[derive(Debug)]
pub struct File {
    volume: Volume,
    path: Arc<str>,
    handle: u64,
    size: u64,
}

impl File {
    /// Bytes in the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
    /// The piece of [`PIECE`] bytes with this number, from the cache or the disk. The last one is as long as the file
    /// has bytes left.
    ///
    /// # Errors
    /// See [`FsError`]; [`FsError::Corrupt`] when the file ends before its size.
    pub async fn piece(&self, index: u64) -> Result<Piece, FsError> {
        let shared = &self.volume.0;
        let generation = shared.disk.as_ref().map_or(0, |disk| disk.changes());
        if let Some(piece) = file_cache::find(shared.number, &self.path, index, generation) {
            return Ok(piece);
        }
        let offset = index.saturating_mul(PIECE as u64);
        let left = self.size.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let mut buf = Vec::new();
        buf.try_reserve_exact(len).map_err(|_| FsError::NoMemory)?;
        buf.resize(len, 0);
        let piece = Arc::new(self.read_at(offset, buf).await?);
        if piece.len() != len {
            return Err(FsError::Corrupt(String::from("the file ends before its size")));
        }
        if len > 0 {
            file_cache::keep(shared.number, &self.path, index, generation, &piece);
        }
        Ok(piece)
    }
    /// Reads up to `buf.len()` bytes from `offset` on; the buffer comes back cut to what was there.
    ///
    /// The buffer travels, so that a reader can use one for a whole file.
    ///
    /// # Errors
    /// See [`FsError`].
    pub async fn read_at(&self, offset: u64, buf: Vec<u8>) -> Result<Vec<u8>, FsError> {
        let handle = self.handle;
        self.volume.ask(|reply| Request::Read { handle, offset, buf, reply }).await
    }
}

impl Drop for File {
    fn drop(&mut self) {
        post(&self.volume.0.requests, Request::Close(self.handle));
    }
}

/// The fiber's life: one request after the other until the volume is dropped.
fn run(fs: &mut dyn FileSystem, requests: &Channel<Request>) {
    loop {
        // An answer that nobody waits for any more is dropped with its channel.
        match task::block_on(requests.recv()) {
            Request::Metadata(path, reply) => drop(reply.try_send(fs.metadata(&path))),
            Request::List(path, reply) => drop(reply.try_send(fs.list(&path))),
            Request::Open(path, reply) => {
                let result = fs.open(&path);
                let opened = result.as_ref().ok().map(|&(handle, _)| handle);
                // Only this fiber and the asker hold the channel: an asker that has gone will never close the file.
                if Arc::strong_count(&reply) == 1 {
                    if let Some(handle) = opened {
                        fs.close(handle);
                    }
                } else {
                    drop(reply.try_send(result));
                }
            }
            Request::Read { handle, offset, mut buf, reply } => {
                let result = fs.read(handle, offset, &mut buf).map(|len| {
                    buf.truncate(len);
                    buf
                });
                drop(reply.try_send(result));
            }
            Request::Close(handle) => fs.close(handle),
            Request::Stop => return,
        }
    }
}

/// Finds a file system on the whole disk, or on its first partition that has one.
fn probe(disk: Arc<Block>) -> Result<Box<dyn FileSystem>, FsError> {
    let len = disk.capacity();
    if len == 0 {
        return Err(FsError::Unrecognised(format!("disk {} has 0 bytes", disk.name())));
    }
    let disk = Cached::new(disk);
    let whole = match probe_range(&disk, 0, len) {
        Err(FsError::Unrecognised(why)) => why,
        other => return other,
    };
    let mut head = vec![0; partition::HEAD_LEN.min(usize::try_from(len).unwrap_or(usize::MAX))];
    DiskReader::new(disk.clone(), 0, len).read(0, &mut head).map_err(read_error)?;
    for part in partition::parse(&head, len) {
        match probe_range(&disk, part.start, part.len) {
            Err(FsError::Unrecognised(_)) => {}
            other => return other,
        }
    }
    Err(FsError::Unrecognised(whole))
}

/// Tries each kind on a range of the disk; each says `Unrecognised` when the range is not its kind at all.
fn probe_range(disk: &Cached, start: u64, len: u64) -> Result<Box<dyn FileSystem>, FsError> {
    let reader = || DiskReader::new(disk.clone(), start, len);
    match Ext::mount(reader()) {
        Err(FsError::Unrecognised(_)) => {}
        other => return other.map(|fs| Box::new(fs) as Box<dyn FileSystem>),
    }
    match Fat::mount(reader()) {
        Err(FsError::Unrecognised(_)) => {}
        other => return other.map(|fs| Box::new(fs) as Box<dyn FileSystem>),
    }
    match Archive::on_disk(reader()) {
        Err(FsError::Unrecognised(_)) => {}
        other => return other.map(|fs| Box::new(fs) as Box<dyn FileSystem>),
    }
    Err(FsError::Unrecognised(format!(
        "{} is neither ext2/3/4, FAT, tar nor cpio (newc), and no partition of it is",
        disk.block().name()
    )))
}

/// A failed read during mounting.
pub(super) fn read_error(error: super::disk_reader::ReadError) -> FsError {
    match error {
        super::disk_reader::ReadError::Disk(error) => FsError::Disk(error),
        error @ super::disk_reader::ReadError::OutOfRange { .. } => {
            FsError::Corrupt(format!("{error}"))
        }
    }
}
