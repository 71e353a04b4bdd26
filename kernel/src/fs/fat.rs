//! FAT12, FAT16 and FAT32, through the `hadris-fat` crate.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hadris_fat::sync::FatFs;
use hadris_fs::{DirCursor, Error, ErrorKind, FileType, MountOptions, NodeId, OpenMode, Resolve};
use hadris_io::ErrorType;
use hadris_storage::sync::BlockDevice;
use hadris_storage::{BlockIndex, BlockSize};

use super::disk_reader::{DiskReader, ReadError};
use super::volume::read_error;
use super::{DirEntry, FileSystem, FsError, Metadata, NodeKind};

/// Bytes in the blocks that the library sees.
const BLOCK: u32 = 512;

/// A [`DiskReader`] as the library's block device.
#[derive(Debug)]
struct Source(DiskReader);

impl ErrorType for Source {
    type Error = ReadError;
}

impl BlockDevice for Source {
    fn block_size(&self) -> BlockSize {
        BlockSize::new(BLOCK).expect("512 is a power of two")
    }
    fn block_count(&self) -> u64 {
        self.0.size() / u64::from(BLOCK)
    }
    fn read_blocks(&mut self, first: BlockIndex, buf: &mut [u8]) -> Result<(), Error<ReadError>> {
        let start = first.get().saturating_mul(u64::from(BLOCK));
        self.0.read(start, buf).map_err(|error| Error::device(error, "the disk failed"))
    }
}

/// A mounted FAT file system.
pub struct Fat {
    fs: FatFs<Source>,
    open: BTreeMap<u64, NodeId>,
    next: u64,
}

impl core::fmt::Debug for Fat {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Fat")
    }
}

impl Fat {
    /// Mounts what `disk` holds.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`] if there is no FAT boot sector; others if there is one that lies.
    pub fn mount(mut disk: DiskReader) -> Result<Self, FsError> {
        // A boot sector of FAT starts with a jump and ends in 55 aa (Microsoft FAT specification, 3.1); a
        // partition table has only the second. The library checks the rest.
        let mut sector = [0; BLOCK as usize];
        match disk.read(0, &mut sector) {
            Ok(()) => {}
            Err(ReadError::OutOfRange { .. }) => {
                return Err(FsError::Unrecognised("too small for FAT".to_string()));
            }
            Err(error) => return Err(read_error(error)),
        }
        if !matches!(sector, [0xeb | 0xe9, .., 0x55, 0xaa]) {
            return Err(FsError::Unrecognised("no FAT boot sector".to_string()));
        }
        let options = MountOptions::new().read_only();
        let fs = FatFs::mount(Source(disk), options).map_err(|failed| explain(failed.error()))?;
        Ok(Self { fs, open: BTreeMap::new(), next: 1 })
    }

    /// Runs `work` on the node at `path`, pinned for as long.
    fn with_node<T>(
        &mut self,
        path: &str,
        work: impl FnOnce(&mut FatFs<Source>, NodeId) -> Result<T, FsError>,
    ) -> Result<T, FsError> {
        let resolved = self.fs.resolve(path.as_bytes(), Resolve::Lexical);
        let node = resolved.map_err(|e| explain(&e))?;
        let result = work(&mut self.fs, node);
        self.fs.forget(node, 1);
        result
    }
}

/// The library's error in our words; a failed disk comes through as itself.
fn explain(error: &Error<ReadError>) -> FsError {
    if let Some(disk) = error.device_error() {
        return read_error(*disk);
    }
    match error.kind() {
        ErrorKind::NotFound => FsError::NotFound,
        ErrorKind::NotADirectory => FsError::NotADirectory,
        ErrorKind::IsADirectory => FsError::NotAFile,
        ErrorKind::InvalidInput | ErrorKind::NameTooLong => FsError::BadPath,
        ErrorKind::NotRecognized => FsError::Unrecognised(error.message().to_string()),
        ErrorKind::Unsupported => FsError::Unsupported(error.message().to_string()),
        ErrorKind::LimitExceeded => FsError::NoMemory,
        _ => FsError::Corrupt(format!("{error}")),
    }
}

fn metadata(found: &hadris_fs::Metadata) -> Metadata {
    let kind = match found.file_type() {
        FileType::File => NodeKind::File,
        FileType::Dir => NodeKind::Directory,
        FileType::Symlink => NodeKind::Symlink,
        _ => NodeKind::Other,
    };
    Metadata { kind, size: if kind == NodeKind::File { found.len() } else { 0 } }
}

impl FileSystem for Fat {
    fn type_name(&self) -> &'static str {
        "vfat"
    }
    fn label(&mut self) -> String {
        // 384 bytes hold the label of every format, says the library.
        let mut text = [0; 384];
        self.fs.label(&mut text).ok().flatten().unwrap_or_default().to_string()
    }
    fn metadata(&mut self, path: &str) -> Result<Metadata, FsError> {
        self.with_node(path, |fs, node| {
            fs.stat(node).map(|m| metadata(&m)).map_err(|e| explain(&e))
        })
    }
    fn list(&mut self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        self.with_node(path, |fs, node| {
            let mut entries = Vec::new();
            let mut cursor = DirCursor::START;
            while let Some(entry) = fs.readdir(node, cursor).map_err(|e| explain(&e))? {
                let name = String::from_utf8_lossy(entry.name().as_bytes()).into_owned();
                entries.push(DirEntry { name, metadata: metadata(entry.metadata()) });
                cursor = entry.next_cursor();
            }
            entries.retain(|entry| entry.name != "." && entry.name != "..");
            Ok(entries)
        })
    }
    fn open(&mut self, path: &str) -> Result<(u64, u64), FsError> {
        let found = self.metadata(path)?;
        if found.kind != NodeKind::File {
            return Err(FsError::NotAFile);
        }
        let node = self.fs.resolve(path.as_bytes(), Resolve::Lexical).map_err(|e| explain(&e))?;
        if let Err(error) = self.fs.open(node, OpenMode::Read) {
            self.fs.forget(node, 1);
            return Err(explain(&error));
        }
        let handle = self.next;
        self.next += 1;
        self.open.insert(handle, node);
        Ok((handle, found.size))
    }
    fn read(&mut self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let node = *self.open.get(&handle).ok_or(FsError::NotFound)?;
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.fs.read(node, offset + filled as u64, rest).map_err(|e| explain(&e))? {
                0 => break,
                len => filled += len,
            }
        }
        Ok(filled)
    }
    fn close(&mut self, handle: u64) {
        if let Some(node) = self.open.remove(&handle) {
            // Nothing was written, so there is nothing to lose in a failed close.
            drop(self.fs.close(node));
            self.fs.forget(node, 1);
        }
    }
}
