//! Read-only file systems on the images that people make with ordinary tools.
//!
//! - `mounts.rs`: where volumes hang in the one tree that the shell and the web server see;
//! - `volume.rs`: a mounted file system behind an async interface, served by one fiber;
//! - `file_cache.rs`: pieces of files that were read lately, for whoever sends them again;
//! - `disk_reader.rs`: a cached, read-ahead byte view of a disk for the synchronous libraries;
//! - `partition.rs`: MBR and GPT;
//! - `ext.rs` (ext2, ext3, ext4 through `ext4-view`), `fat.rs` (FAT12/16/32 through `hadris-fat`),
//!   `archive.rs` (tar and cpio, for disks and modules that are plain archives).
//!
//! The way of one byte: `volume::File::read_at` → `Ext::read` → `DiskReader::read` → `block::Block::read` → driver.

pub mod archive;
pub mod disk_reader;
pub mod ext;
pub mod fat;
pub mod file_cache;
pub mod mounts;
pub mod partition;
pub mod volume;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::block::BlockError;

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link (seen only in listings: other calls follow it).
    Symlink,
    /// A device node, socket or pipe: listed, never opened.
    Other,
}

/// What is known of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: NodeKind,
    /// Bytes in the file; 0 for anything else.
    pub size: u64,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name, without the directory; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// What it is.
    pub metadata: Metadata,
}

/// Why a file system call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsError {
    /// Nothing has this name.
    NotFound,
    /// A directory was needed, or something in the middle of the path is none.
    NotADirectory,
    /// A file was needed.
    NotAFile,
    /// The path is empty, too long, or has a NUL in it.
    BadPath,
    /// The disk failed.
    Disk(BlockError),
    /// The file system contradicts itself; the text says where.
    Corrupt(String),
    /// The disk holds nothing that this kernel can mount; the text says what was looked for.
    Unrecognised(String),
    /// The file system is sound but uses something that its driver does not read.
    Unsupported(String),
    /// No memory for the request.
    NoMemory,
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("no such file or directory"),
            Self::NotADirectory => f.write_str("not a directory"),
            Self::NotAFile => f.write_str("not a file"),
            Self::BadPath => f.write_str("not a usable path"),
            Self::Disk(error) => write!(f, "disk error: {error}"),
            Self::Corrupt(what) => write!(f, "corrupt file system: {what}"),
            Self::Unrecognised(what) => write!(f, "no file system found: {what}"),
            Self::Unsupported(what) => write!(f, "unsupported file system: {what}"),
            Self::NoMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for FsError {}

/// A mounted file system, as its fiber sees it. Paths are absolute and normalised ([`normalise`]).
pub trait FileSystem {
    /// Its type, for people: `ext4`, `vfat`, `tar`.
    fn type_name(&self) -> &'static str;
    /// Its label; empty if it has none.
    fn label(&mut self) -> String;
    /// What `path` is, following symbolic links.
    ///
    /// # Errors
    /// See [`FsError`].
    fn metadata(&mut self, path: &str) -> Result<Metadata, FsError>;
    /// What is in the directory `path`, without `.` and `..`.
    ///
    /// # Errors
    /// See [`FsError`].
    fn list(&mut self, path: &str) -> Result<Vec<DirEntry>, FsError>;
    /// Opens a file for [`Self::read`]; answers a handle and the file's size in bytes.
    ///
    /// # Errors
    /// See [`FsError`].
    fn open(&mut self, path: &str) -> Result<(u64, u64), FsError>;
    /// Fills `buf` from `offset` on, as far as the file goes; answers how many bytes.
    ///
    /// # Errors
    /// See [`FsError`].
    fn read(&mut self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize, FsError>;
    /// Forgets a handle.
    fn close(&mut self, handle: u64);
}

/// The longest path, in bytes, as Linux has it.
pub const PATH_MAX: usize = 4096;

/// Makes a path absolute and plain: one slash between names, no `.`, and `..` resolved without leaving the root.
///
/// # Errors
/// [`FsError::BadPath`].
pub fn normalise(path: &str) -> Result<String, FsError> {
    if path.len() > PATH_MAX || path.contains('\0') {
        return Err(FsError::BadPath);
    }
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    let mut plain = String::with_capacity(path.len() + 1);
    for name in names {
        plain.push('/');
        plain.push_str(name);
    }
    if plain.is_empty() {
        plain.push('/');
    }
    Ok(plain)
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod path_tests {
    use super::*;

    #[test]
    fn paths_become_plain_and_stay_inside_the_root() {
        for (given, plain) in [
            ("", "/"),
            ("/", "/"),
            ("a//b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/../../etc/passwd", "/etc/passwd"),
        ] {
            assert_eq!(normalise(given).as_deref(), Ok(plain), "{given}");
        }
        assert_eq!(normalise("a\0b"), Err(FsError::BadPath));
        assert_eq!(normalise(&"x".repeat(PATH_MAX + 1)), Err(FsError::BadPath));
    }
}
