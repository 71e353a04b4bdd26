//! ext2, ext3 and ext4, through the `ext4-view` crate.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;
use core::error::Error;

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, FileType};

use super::disk_reader::{DiskReader, ReadError};
use super::volume::read_error;
use super::{DirEntry, FileSystem, FsError, Metadata, NodeKind};

/// Where the superblock's magic number is, in bytes from the start (Linux, `fs/ext4/ext4.h`, `s_magic`).
const MAGIC_AT: u64 = 1024 + 56;
const MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();

/// The disk, shared with the library, so that its own errors can be told from the file system's.
#[derive(Clone, Debug)]
struct Source(Rc<RefCell<DiskReader>>);

impl Ext4Read for Source {
    fn read(
        &mut self,
        start: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.0.borrow_mut().read(start, dst).map_err(|error| Box::new(error) as Box<_>)
    }
}

/// A mounted ext file system.
#[derive(Debug)]
pub struct Ext {
    fs: Ext4,
    source: Source,
    open: BTreeMap<u64, File>,
    next: u64,
}

impl Ext {
    /// Mounts what `disk` holds.
    ///
    /// # Errors
    /// [`FsError::Unrecognised`] without the magic number; [`FsError::Corrupt`] or [`FsError::Unsupported`] with it.
    pub fn mount(mut disk: DiskReader) -> Result<Self, FsError> {
        let mut magic = [0; 2];
        match disk.read(MAGIC_AT, &mut magic) {
            Ok(()) if magic == MAGIC => {}
            Ok(()) | Err(ReadError::OutOfRange { .. }) => {
                return Err(FsError::Unrecognised("no ext superblock".to_string()));
            }
            Err(error) => return Err(read_error(error)),
        }
        let source = Source(Rc::new(RefCell::new(disk)));
        let fs = Ext4::load(Box::new(source.clone())).map_err(|e| explain(&source, e))?;
        Ok(Self { fs, source, open: BTreeMap::new(), next: 1 })
    }
}

/// The library's error in our words; a failed disk comes through as itself.
fn explain(source: &Source, error: Ext4Error) -> FsError {
    match error {
        Ext4Error::NotFound => FsError::NotFound,
        Ext4Error::NotADirectory => FsError::NotADirectory,
        Ext4Error::IsADirectory | Ext4Error::IsASpecialFile => FsError::NotAFile,
        Ext4Error::NotAbsolute | Ext4Error::MalformedPath | Ext4Error::PathTooLong => {
            FsError::BadPath
        }
        Ext4Error::Io(error) => match source.0.borrow_mut().take_error() {
            Some(error) => read_error(error),
            None => FsError::Corrupt(format!("{error}")),
        },
        Ext4Error::Incompatible(what) => FsError::Unsupported(format!("{what}")),
        Ext4Error::Encrypted => FsError::Unsupported("the directory is encrypted".to_string()),
        other => FsError::Corrupt(format!("{other}")),
    }
}

fn kind(file_type: FileType) -> NodeKind {
    if file_type.is_regular_file() {
        NodeKind::File
    } else if file_type.is_dir() {
        NodeKind::Directory
    } else if file_type.is_symlink() {
        NodeKind::Symlink
    } else {
        NodeKind::Other
    }
}

fn metadata(found: &ext4_view::Metadata) -> Metadata {
    let kind = kind(found.file_type());
    Metadata { kind, size: if kind == NodeKind::File { found.len() } else { 0 } }
}

impl FileSystem for Ext {
    fn type_name(&self) -> &'static str {
        "ext2/3/4"
    }
    fn label(&mut self) -> String {
        self.fs.label().to_str().map(String::from).unwrap_or_default()
    }
    fn metadata(&mut self, path: &str) -> Result<Metadata, FsError> {
        self.fs.metadata(path).map(|m| metadata(&m)).map_err(|e| explain(&self.source, e))
    }
    fn list(&mut self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        let failed = |error| explain(&self.source, error);
        let mut entries = Vec::new();
        for entry in self.fs.read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if matches!(name.as_ref(), b"." | b"..") {
                continue;
            }
            entries.push(DirEntry {
                name: name.display().to_string(),
                metadata: metadata(&entry.metadata().map_err(failed)?),
            });
        }
        Ok(entries)
    }
    fn open(&mut self, path: &str) -> Result<(u64, u64), FsError> {
        let found = self.metadata(path)?;
        if found.kind != NodeKind::File {
            return Err(FsError::NotAFile);
        }
        let file = self.fs.open(path).map_err(|e| explain(&self.source, e))?;
        let handle = self.next;
        self.next += 1;
        self.open.insert(handle, file);
        Ok((handle, found.size))
    }
    fn read(&mut self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let source = &self.source;
        let file = self.open.get_mut(&handle).ok_or(FsError::NotFound)?;
        // Seeking walks the block map from the start: only do it when the reader did jump.
        if file.position() != offset {
            file.seek_to(offset).map_err(|e| explain(source, e))?;
        }
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_bytes(rest).map_err(|e| explain(source, e))? {
                0 => break,
                len => filled += len,
            }
        }
        Ok(filled)
    }
    fn close(&mut self, handle: u64) {
        self.open.remove(&handle);
    }
}
