//! Plain archives as file systems: tar (ustar) and cpio (newc), on a disk or as a module in memory.
//!
//! The whole index is read at mount; contents stay where they are.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::disk_reader::{DiskReader, ReadError};
use super::volume::read_error;
use super::{DirEntry, FileSystem, FsError, Metadata, NodeKind, normalise};

/// Where the bytes of an archive are.
#[derive(Debug)]
enum Source {
    Disk(DiskReader),
    Memory(&'static [u8]),
}

impl Source {
    fn size(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.size(),
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }
    fn read(&mut self, start: u64, dst: &mut [u8]) -> Result<(), FsError> {
        match self {
            Self::Disk(disk) => disk.read(start, dst).map_err(read_error),
            Self::Memory(bytes) => {
                let end = start.checked_add(dst.len() as u64);
                let range =
                    usize::try_from(start).ok().zip(end.and_then(|e| usize::try_from(e).ok()));
                let found =
                    range.and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| {
                        let (len, size) = (dst.len(), bytes.len() as u64);
                        read_error(ReadError::OutOfRange { start, len, size })
                    })?;
                dst.copy_from_slice(found);
                Ok(())
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Node {
    metadata: Metadata,
    /// First byte of a file's contents, in the archive.
    start: u64,
    /// Where a symbolic link points.
    target: Option<String>,
}

impl Node {
    const DIRECTORY: Self =
        Self { metadata: Metadata { kind: NodeKind::Directory, size: 0 }, start: 0, target: None };
}

/// A mounted archive.
#[derive(Debug)]
pub struct Archive {
    source: Source,
    type_name: &'static str,
    /// By normalised absolute path.
    nodes: BTreeMap<String, Node>,
    open: BTreeMap<u64, Node>,
    next: u64,
}

/// Entries at most, so that a hostile archive cannot take all memory.
const MAX_ENTRIES: usize = 100_000;
/// Symbolic links followed at most, as Linux does.
const MAX_LINKS: usize = 40;
/// The longest name or link target read, in bytes.
const MAX_NAME: u64 = super::PATH_MAX as u64;

impl Archive {
    /// Reads the index of an archive in memory.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`], [`FsError::Corrupt`].
    pub fn in_memory(data: &'static [u8]) -> Result<Self, FsError> {
        Self::mount(Source::Memory(data))
    }
    /// Reads the index of an archive that fills a disk or partition from its start.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`], [`FsError::Corrupt`], [`FsError::Disk`].
    pub fn on_disk(disk: DiskReader) -> Result<Self, FsError> {
        Self::mount(Source::Disk(disk))
    }

    fn mount(source: Source) -> Result<Self, FsError> {
        let mut this = Self {
            source,
            type_name: "",
            nodes: BTreeMap::from([("/".to_string(), Node::DIRECTORY)]),
            open: BTreeMap::new(),
            next: 1,
        };
        let mut head = [0; tar::BLOCK];
        let len = usize::try_from(this.source.size().min(tar::BLOCK as u64)).unwrap_or(0);
        this.source.read(0, head.get_mut(..len).unwrap_or_default())?;
        if head.starts_with(cpio::MAGIC) || head.starts_with(cpio::MAGIC_CRC) {
            this.type_name = "cpio";
            this.index_cpio()?;
        } else if tar::is_header(&head) {
            this.type_name = "tar";
            this.index_tar()?;
        } else {
            return Err(FsError::Unrecognised("neither tar nor cpio (newc)".to_string()));
        }
        Ok(this)
    }

    fn add(&mut self, name: &str, node: Node) -> Result<(), FsError> {
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(FsError::Unsupported(format!("more than {MAX_ENTRIES} entries")));
        }
        let path = normalise(name)?;
        // Archives need not list directories: a file brings its own.
        let mut parent = path.as_str();
        while let Some((up, _)) = parent.rsplit_once('/').filter(|(up, _)| !up.is_empty()) {
            self.nodes.entry(up.to_string()).or_insert(Node::DIRECTORY);
            parent = up;
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    fn text(&mut self, start: u64, len: u64) -> Result<String, FsError> {
        if len > MAX_NAME {
            return Err(FsError::Corrupt(format!("a name of {len} bytes at {start}")));
        }
        let mut bytes = alloc::vec![0; usize::try_from(len).unwrap_or(0)];
        self.source.read(start, &mut bytes)?;
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(bytes.get(..end).unwrap_or(&bytes)).into_owned())
    }

    fn index_cpio(&mut self) -> Result<(), FsError> {
        let mut at = 0;
        loop {
            let mut header = [0; cpio::HEADER];
            self.source.read(at, &mut header)?;
            let entry = cpio::Header::parse(&header)
                .ok_or_else(|| FsError::Corrupt(format!("no cpio header at {at}")))?;
            let name = self.text(at + cpio::HEADER as u64, u64::from(entry.name_len))?;
            let start = (at + cpio::HEADER as u64 + u64::from(entry.name_len)).next_multiple_of(4);
            let size = u64::from(entry.size);
            self.check_extent(start, size)?;
            if name == cpio::TRAILER {
                return Ok(());
            }
            let kind = match entry.mode & 0o170_000 {
                0o100_000 => NodeKind::File,
                0o040_000 => NodeKind::Directory,
                0o120_000 => NodeKind::Symlink,
                _ => NodeKind::Other,
            };
            self.add_entry(&name, kind, start, size, None)?;
            at = (start + size).next_multiple_of(4);
        }
    }

    fn index_tar(&mut self) -> Result<(), FsError> {
        let mut at = 0;
        let (mut long_name, mut long_target) = (None, None);
        while at + (tar::BLOCK as u64) <= self.source.size() {
            let mut block = [0; tar::BLOCK];
            self.source.read(at, &mut block)?;
            if block.iter().all(|&byte| byte == 0) {
                return Ok(());
            }
            if !tar::is_header(&block) {
                return Err(FsError::Corrupt(format!(
                    "no tar header, or a wrong checksum, at {at}"
                )));
            }
            let size = tar::number(&block, tar::SIZE)
                .ok_or_else(|| FsError::Corrupt(format!("bad size in the tar header at {at}")))?;
            let start = at + tar::BLOCK as u64;
            self.check_extent(start, size)?;
            at = (start + size).next_multiple_of(tar::BLOCK as u64);
            match tar::kind(&block) {
                b'L' => long_name = Some(self.text(start, size)?),
                b'K' => long_target = Some(self.text(start, size)?),
                // pax headers: `path` and `linkpath` matter here, the other records do not.
                b'x' => {
                    let records = self.text_of_pax(start, size)?;
                    long_name = tar::pax(&records, "path").or(long_name);
                    long_target = tar::pax(&records, "linkpath").or(long_target);
                }
                b'g' => {}
                flag => {
                    let kind = match flag {
                        b'0' | 0 | b'7' => NodeKind::File,
                        b'5' => NodeKind::Directory,
                        b'2' => NodeKind::Symlink,
                        // A hard link: its contents are those of a file that came before.
                        b'1' => NodeKind::File,
                        _ => NodeKind::Other,
                    };
                    let name = long_name.take().unwrap_or_else(|| tar::name(&block));
                    let target = long_target.take().unwrap_or_else(|| tar::target(&block));
                    if flag == b'1' {
                        let original = normalise(&target)?;
                        let node = self.nodes.get(&original).cloned().ok_or_else(|| {
                            FsError::Corrupt(format!(
                                "{name} is a link to {target}, which is missing"
                            ))
                        })?;
                        self.add(&name, node)?;
                    } else {
                        self.add_entry(&name, kind, start, size, Some(target))?;
                    }
                }
            }
        }
        // GNU tar ends in two blocks of zeroes; a cut that falls between entries is accepted, as tar itself does.
        Ok(())
    }

    fn text_of_pax(&mut self, start: u64, size: u64) -> Result<Vec<u8>, FsError> {
        if size > 16 * MAX_NAME {
            return Err(FsError::Corrupt(format!("a pax header of {size} bytes at {start}")));
        }
        let mut bytes = alloc::vec![0; usize::try_from(size).unwrap_or(0)];
        self.source.read(start, &mut bytes)?;
        Ok(bytes)
    }

    fn check_extent(&self, start: u64, size: u64) -> Result<(), FsError> {
        match start.checked_add(size) {
            Some(end) if end <= self.source.size() => Ok(()),
            _ => Err(FsError::Corrupt(format!(
                "truncated: an entry at {start} of {size} bytes, but the archive has {}",
                self.source.size()
            ))),
        }
    }

    fn add_entry(
        &mut self,
        name: &str,
        kind: NodeKind,
        start: u64,
        size: u64,
        target: Option<String>,
    ) -> Result<(), FsError> {
        let target = match (kind, target) {
            (NodeKind::Symlink, Some(target)) => Some(target),
            // cpio keeps the target as the contents.
            (NodeKind::Symlink, None) => Some(self.text(start, size)?),
            _ => None,
        };
        let size = if kind == NodeKind::File { size } else { 0 };
        self.add(name, Node { metadata: Metadata { kind, size }, start, target })
    }

    /// The node at `path`, following links everywhere in it.
    fn find(&self, path: &str) -> Result<(String, &Node), FsError> {
        let mut rest: Vec<String> = path.split('/').rev().map(String::from).collect();
        let mut at = String::new();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let parent = at.len();
            at.push('/');
            at.push_str(&name);
            let node = self.nodes.get(&at).ok_or(FsError::NotFound)?;
            if let Some(target) = &node.target {
                links += 1;
                if links > MAX_LINKS {
                    return Err(FsError::Corrupt(format!("too many symbolic links in {path}")));
                }
                at.truncate(if target.starts_with('/') { 0 } else { parent });
                rest.extend(target.split('/').rev().map(String::from));
            } else if !rest.is_empty() && node.metadata.kind != NodeKind::Directory {
                return Err(FsError::NotADirectory);
            }
        }
        if at.is_empty() {
            at.push('/');
        }
        let node = self.nodes.get(&at).ok_or(FsError::NotFound)?;
        Ok((at, node))
    }
}

impl FileSystem for Archive {
    fn type_name(&self) -> &'static str {
        self.type_name
    }
    fn label(&mut self) -> String {
        String::new()
    }
    fn metadata(&mut self, path: &str) -> Result<Metadata, FsError> {
        self.find(path).map(|(_, node)| node.metadata)
    }
    fn list(&mut self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let (path, node) = self.find(path)?;
        if node.metadata.kind != NodeKind::Directory {
            return Err(FsError::NotADirectory);
        }
        let prefix = if path == "/" { path } else { format!("{path}/") };
        Ok(self
            .nodes
            .range(prefix.clone()..)
            .take_while(|(name, _)| name.starts_with(&prefix))
            .filter_map(|(name, node)| {
                let name =
                    name.get(prefix.len()..).filter(|n| !n.is_empty() && !n.contains('/'))?;
                Some(DirEntry { name: name.to_string(), metadata: node.metadata })
            })
            .collect())
    }
    fn open(&mut self, path: &str) -> Result<(u64, u64), FsError> {
        let (_, node) = self.find(path)?;
        if node.metadata.kind != NodeKind::File {
            return Err(FsError::NotAFile);
        }
        let (node, handle) = (node.clone(), self.next);
        let size = node.metadata.size;
        self.next += 1;
        self.open.insert(handle, node);
        Ok((handle, size))
    }
    fn read(&mut self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let node = self.open.get(&handle).ok_or(FsError::NotFound)?;
        let left = node.metadata.size.saturating_sub(offset);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (start, buf) = (node.start + offset.min(node.metadata.size), buf.get_mut(..len));
        self.source.read(start, buf.unwrap_or_default())?;
        Ok(len)
    }
    fn close(&mut self, handle: u64) {
        self.open.remove(&handle);
    }
}

/// The newc form of cpio (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).
mod cpio {
    pub(super) const MAGIC: &[u8] = b"070701";
    pub(super) const MAGIC_CRC: &[u8] = b"070702";
    pub(super) const HEADER: usize = 110;
    pub(super) const TRAILER: &str = "TRAILER!!!";

    pub(super) struct Header {
        pub(super) mode: u32,
        pub(super) size: u32,
        pub(super) name_len: u32,
    }

    impl Header {
        pub(super) fn parse(bytes: &[u8; HEADER]) -> Option<Self> {
            if !bytes.starts_with(MAGIC) && !bytes.starts_with(MAGIC_CRC) {
                return None;
            }
            let field = |number: usize| {
                let at = 6 + 8 * number;
                u32::from_str_radix(core::str::from_utf8(bytes.get(at..at + 8)?).ok()?, 16).ok()
            };
            Some(Self { mode: field(1)?, size: field(6)?, name_len: field(11)? })
        }
    }
}

/// ustar and the extensions of GNU and pax (POSIX.1-2017, `pax`, "ustar Interchange Format").
mod tar {
    use alloc::format;
    use alloc::string::String;
    use core::ops::Range;

    pub(super) const BLOCK: usize = 512;
    pub(super) const SIZE: Range<usize> = 124..136;
    const NAME: Range<usize> = 0..100;
    const CHECKSUM: Range<usize> = 148..156;
    const KIND: usize = 156;
    const TARGET: Range<usize> = 157..257;
    const MAGIC: Range<usize> = 257..263;
    const PREFIX: Range<usize> = 345..500;

    pub(super) fn is_header(block: &[u8; BLOCK]) -> bool {
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, &byte)| u64::from(if CHECKSUM.contains(&at) { b' ' } else { byte }))
            .sum();
        number(block, CHECKSUM) == Some(sum) && sum != 8 * u64::from(b' ')
    }

    /// A number: octal text, or GNU's binary form for what does not fit.
    pub(super) fn number(block: &[u8; BLOCK], field: Range<usize>) -> Option<u64> {
        let bytes = block.get(field)?;
        if let [0x80, high @ .., _, _, _, _, _, _, _, _] = bytes {
            let low = bytes.get(bytes.len() - 8..)?;
            return high
                .iter()
                .all(|&b| b == 0)
                .then(|| u64::from_be_bytes(low.try_into().unwrap_or([0xff; 8])));
        }
        let text = core::str::from_utf8(bytes).ok()?;
        let digits = text.trim_matches([' ', '\0']);
        if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
    }

    pub(super) fn kind(block: &[u8; BLOCK]) -> u8 {
        block.get(KIND).copied().unwrap_or(0)
    }

    fn text(block: &[u8; BLOCK], field: Range<usize>) -> String {
        let bytes = block.get(field).unwrap_or_default();
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(bytes.get(..end).unwrap_or(bytes)).into_owned()
    }

    pub(super) fn name(block: &[u8; BLOCK]) -> String {
        let name = text(block, NAME);
        // GNU's older form uses the prefix field for other things.
        if block.get(MAGIC) != Some(b"ustar\0") {
            return name;
        }
        let prefix = text(block, PREFIX);
        if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
    }

    pub(super) fn target(block: &[u8; BLOCK]) -> String {
        text(block, TARGET)
    }

    /// The value of `key` in pax records, each `LENGTH KEY=VALUE\n` with the length of all of it.
    pub(super) fn pax(mut records: &[u8], key: &str) -> Option<String> {
        loop {
            let space = records.iter().position(|&b| b == b' ')?;
            let len: usize = core::str::from_utf8(records.get(..space)?).ok()?.parse().ok()?;
            let record = records.get(space + 1..len.checked_sub(1)?)?;
            let equals = record.iter().position(|&b| b == b'=')?;
            if record.get(..equals)? == key.as_bytes() {
                return Some(String::from_utf8_lossy(record.get(equals + 1..)?).into_owned());
            }
            records = records.get(len..)?;
        }
    }
}
