//! From the file that a user names to an image: what kind of file it is, who else uses it, and how it is written.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::qcow2::{How, Qcow2Disk, looks_so};
use super::{BlockBackend, DirectDisk, FileDisk, Snapshot};

/// A disk of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskFile {
    /// The image.
    pub file: PathBuf,
    /// Who may write, and what becomes of it.
    pub writes: Writes,
    /// Its number on the bus; `None`: the next `xvd`.
    pub number: Option<u32>,
    /// How the image is written; `None`: as its name and its first bytes say, which must agree.
    pub format: Option<Format>,
    /// Its protocol.
    pub bus: crate::guest::Bus,
    /// Past the host's page cache.
    pub direct: bool,
    /// Whatever file a qcow2 image names as what it is a change of may be read.
    pub backing: bool,
}

/// What becomes of what a guest writes to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writes {
    /// It goes into the image, which nobody else uses meanwhile.
    #[default]
    Kept,
    /// It is forgotten at the end; others may read the image.
    Forgotten,
    /// It is refused.
    Refused,
}

/// How an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As it is.
    Raw,
    /// QEMU's, version 2 or 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("`{text}` is not a format of images: raw, qcow2")),
        }
    }
}

/// An image cannot be had.
#[derive(Debug)]
pub enum OpenError {
    /// The host refuses.
    Host(io::Error),
    /// Neither a file nor a block device, but this.
    Kind(&'static str),
    /// Somebody else writes it, or (the flag) uses it while we want to write.
    InUse {
        /// We only wanted to read.
        reader: bool,
        /// A process that has it.
        holder: Option<u32>,
    },
    /// Its name says one format and its first bytes another.
    Ambiguous,
    /// It is not the image that it should be.
    Image(io::Error),
    /// The host has no direct I/O for it.
    NoDirect,
    /// It is a change of another file, which nobody said may be read.
    Backing(PathBuf),
    /// It is a change of a file in this format, or in one that it does not name.
    BackingFormat(Option<String>),
    /// Its data is in another file.
    DataFile,
    /// There are more files behind it than so many.
    TooDeep(usize),
    /// A file behind it cannot be had.
    Behind(PathBuf, Box<Self>),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(error) => error.fmt(f),
            Self::Kind(kind) => write!(f, "a disk is a file or a block device, and this is {kind}"),
            Self::InUse { reader, holder } => {
                let other = if *reader { "written" } else { "used" };
                write!(f, "the disk is {other} by another guest")?;
                if let Some(process) = holder {
                    write!(f, " (process {process})")?;
                }
                f.write_str("; end that one, or copy the file")
            }
            Self::Ambiguous => f.write_str(
                "name and contents disagree on whether this is a qcow2 image, and whoever wrote a raw one could have \
                 made it look so; say `,format=raw` or `,format=qcow2`",
            ),
            Self::Image(error) => write!(f, "the qcow2 image cannot be used: {error}"),
            Self::NoDirect => f.write_str("there is no direct I/O here; leave out `,direct`"),
            Self::Backing(file) => write!(
                f,
                "the image is a change of {}, chosen by whoever made it; say `,backing` to let the guest read that",
                file.display()
            ),
            Self::BackingFormat(Some(format)) => {
                write!(f, "not in a format that is known here ({format}): raw, qcow2")
            }
            Self::BackingFormat(None) => f.write_str(
                "the image in front of it does not say in which format it is, and guessing is not safe; \
                 `qemu-img rebase -u -F raw|qcow2` writes it down",
            ),
            Self::DataFile => {
                f.write_str("its data is in another file; `qemu-img convert` makes one file of both")
            }
            Self::TooDeep(most) => write!(f, "there are more than {most} files behind the image"),
            Self::Behind(file, error) => write!(f, "{}: {error}", file.display()),
        }
    }
}

impl std::error::Error for OpenError {}

/// Processes that hold a lock on a file, as far as the host tells.
#[must_use]
pub fn holders(path: &Path) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    path.metadata().map_or_else(|_| Vec::new(), |file| holders_in(&locks, file.dev(), file.ino()))
}

/// The lines of `/proc/locks` about a file: `1: FLOCK ADVISORY WRITE 4711 fe:01:1234 0 EOF`.
fn holders_in(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let holder = |line: &str| {
        let mut words = line.split_whitespace().skip(4);
        let (pid, place) = (words.next()?.parse().ok()?, words.next()?);
        let mut parts = place.split(':');
        let mut number = || u32::from_str_radix(parts.next()?, 16).ok();
        let same = (number()?, number()?) == device && parts.next()?.parse() == Ok(inode);
        same.then_some(pid)
    };
    locks.lines().filter_map(holder).collect()
}

/// Opens a disk for this guest alone, or for readers alone.
///
/// # Errors
/// See [`OpenError`].
pub fn open(disk: &DiskFile) -> Result<Box<dyn BlockBackend + Send>, OpenError> {
    let read_only = disk.writes != Writes::Kept;
    let how = How { read_only, direct: disk.direct, backing: disk.backing };
    let file = open_file(&disk.file, how)?;
    lock(&disk.file, &file, read_only)?;
    let format = format(disk, &file)?;
    let image: Box<dyn BlockBackend + Send> = match format {
        Format::Qcow2 => Box::new(Qcow2Disk::new(&disk.file, file, how)?),
        Format::Raw if disk.direct => {
            let direct = DirectDisk::new(file, read_only).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => OpenError::NoDirect,
                _ => OpenError::Host(error),
            })?;
            Box::new(direct)
        }
        Format::Raw => Box::new(FileDisk::new(file, read_only).map_err(OpenError::Host)?),
    };
    Ok(if disk.writes == Writes::Forgotten { Box::new(Snapshot::new(image)) } else { image })
}

/// Opens a file that an image is a change of: for readers alone.
pub(super) fn open_backing(path: &Path, how: How) -> Result<File, OpenError> {
    let file = open_file(path, How { read_only: true, ..how })?;
    lock(path, &file, true)?;
    Ok(file)
}

fn lock(path: &Path, file: &File, reader: bool) -> Result<(), OpenError> {
    match if reader { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(OpenError::InUse { reader, holder: holders(path).first().copied() })
        }
        Err(TryLockError::Error(error)) => Err(OpenError::Host(error)),
    }
}

fn open_file(path: &Path, how: How) -> Result<File, OpenError> {
    let How { read_only, direct, .. } = how;
    // Without waiting for somebody at the other end of a FIFO.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
    let kind = match &file {
        Ok(file) => file.metadata(),
        // Says better what is wrong than that a directory cannot be written.
        Err(_) => std::fs::metadata(path),
    };
    if let Ok(kind) = kind.map(|data| data.file_type()) {
        let wrong = match () {
            () if kind.is_file() || kind.is_block_device() => None,
            () if kind.is_dir() => Some("a directory"),
            () if kind.is_fifo() => Some("a FIFO"),
            () if kind.is_socket() => Some("a socket"),
            () if kind.is_char_device() => Some("a character device"),
            () => Some("something else"),
        };
        if let Some(wrong) = wrong {
            return Err(OpenError::Kind(wrong));
        }
    }
    file.map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) if direct => OpenError::NoDirect,
        _ => OpenError::Host(error),
    })
}

/// How an image is written. A guest can write whatever it likes to the beginning of a raw image, so the contents alone
/// decide nothing: taken for qcow2 at the next start, they could name other files of the host.
fn format(disk: &DiskFile, file: &File) -> Result<Format, OpenError> {
    if let Some(format) = disk.format {
        return Ok(format);
    }
    let looks = looks_so(file);
    let named = disk.file.extension().is_some_and(|name| name == "qcow2" || name == "qcow");
    match (looks, named) {
        (false, false) => Ok(Format::Raw),
        (true, true) => Ok(Format::Qcow2),
        _ => Err(OpenError::Ambiguous),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_who_holds_a_file() {
        let locks = "1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 12 fe:01:1234 0 EOF\n\
                     2: POSIX  ADVISORY  READ 8 fe:01:1235 0 EOF\nnonsense\n";
        let device = rustix::fs::makedev(0xfe, 1);
        assert_eq!(holders_in(locks, device, 1234), [4711]);
        assert_eq!(holders_in(locks, device, 1235), [8]);
        assert!(holders_in(locks, device, 1).is_empty());
    }

    fn open_as(path: &Path, format: Option<Format>) -> Result<u64, OpenError> {
        let disk = DiskFile { file: path.to_owned(), format, ..DiskFile::default() };
        open(&disk).map(|image| image.sectors())
    }

    #[test]
    fn a_raw_image_that_looks_like_another_format_stays_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (raw, qcow2) = (directory.path().join("a.img"), directory.path().join("a.qcow2"));
        let mut bytes = vec![0; 4096];
        std::fs::write(&raw, &bytes).unwrap();
        assert_eq!(open_as(&raw, None).unwrap(), 8);
        std::fs::write(&qcow2, &bytes).unwrap();
        assert!(matches!(open_as(&qcow2, None), Err(OpenError::Ambiguous)));
        bytes[..4].copy_from_slice(&crate::storage::qcow2::MAGIC);
        std::fs::write(&raw, &bytes).unwrap();
        assert!(matches!(open_as(&raw, None), Err(OpenError::Ambiguous)), "a guest wrote that");
        assert_eq!(open_as(&raw, Some(Format::Raw)).unwrap(), 8);
        std::fs::write(&qcow2, &bytes).unwrap();
        assert_eq!(open_as(&qcow2, Some(Format::Raw)).unwrap(), 8);
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name_and_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for (path, kind) in [
            (fifo.as_path(), "a FIFO"),
            (directory.path(), "a directory"),
            (Path::new("/dev/null"), "a character device"),
        ] {
            let error = open_as(path, None).unwrap_err();
            assert!(matches!(error, OpenError::Kind(found) if found == kind), "{error}");
        }
        let missing = open_as(&directory.path().join("none"), None);
        assert!(matches!(missing, Err(OpenError::Host(_))));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let disk = |writes| DiskFile { file: image.path().into(), writes, ..DiskFile::default() };
        let writer = open(&disk(Writes::Kept)).unwrap();
        for writes in [Writes::Kept, Writes::Forgotten, Writes::Refused] {
            let error = open(&disk(writes)).map(drop).unwrap_err();
            let OpenError::InUse { reader, holder } = error else { panic!("{error}") };
            assert_eq!(reader, writes != Writes::Kept);
            assert_eq!(holder, Some(std::process::id()));
        }
        drop(writer);
        let readers =
            [Writes::Forgotten, Writes::Refused].map(|writes| open(&disk(writes)).unwrap());
        assert!(open(&disk(Writes::Kept)).is_err());
        drop(readers);
        assert!(open(&disk(Writes::Kept)).is_ok());
    }
}
