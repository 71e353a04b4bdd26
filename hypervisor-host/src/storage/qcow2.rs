//! Images in QEMU's format, through the `imago` crate.
//!
//! An image can name other files: one that it is a change of (the backing file), or one that has its data. Whoever made
//! the image chose those names, so they are followed only if the user says so, and never to a file whose format is to
//! be guessed from what is in it.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::StorageOpenOptions;
use imago::{FormatAccess, file};

use super::open::{OpenError, open_backing};
use super::{BlockBackend, SECTOR};

/// Files behind an image at most.
const MOST_BEHIND: usize = 8;

/// How the files of an image are opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    /// Writes are refused, and the file was opened so.
    pub(super) read_only: bool,
    /// The file was opened past the host's cache.
    pub(super) direct: bool,
    /// The backing file that the image names may be read.
    pub(super) backing: bool,
}

/// An image in QEMU's format.
pub struct Qcow2Disk {
    image: FormatAccess<file::File>,
    /// The file of the image, and its length when it was longest.
    file: File,
    longest: u64,
    read_only: bool,
}

impl fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qcow2Disk({} bytes)", self.image.size())
    }
}

impl Qcow2Disk {
    /// The image in `file`, which was opened at `path`.
    pub(super) fn new(path: &Path, file: File, how: How) -> Result<Self, OpenError> {
        let longest = file.metadata().map_err(OpenError::Host)?.len();
        let again = file.try_clone().map_err(OpenError::Host)?;
        let image = qcow2(path, file, how, 0)?;
        Ok(Self { image, file: again, longest, read_only: how.read_only })
    }

    /// Fails if the file was cut off: what is missing would read as zeroes.
    fn check(&mut self) -> io::Result<()> {
        let len = self.file.metadata()?.len();
        if len < self.longest {
            return Err(io::Error::other("the image was cut off"));
        }
        self.longest = len;
        Ok(())
    }
}

fn storage(path: &Path, file: File, how: How) -> io::Result<file::File> {
    let options = StorageOpenOptions::new().filename(path).write(!how.read_only).direct(how.direct);
    file::File::from_open_file(file, options)
}

fn qcow2(
    path: &Path,
    file: File,
    how: How,
    depth: usize,
) -> Result<FormatAccess<file::File>, OpenError> {
    let wrong = OpenError::Image;
    let storage = storage(path, file, how).map_err(OpenError::Host)?;
    let mut image: Qcow2<file::File> = Qcow2::open_image(storage, !how.read_only).map_err(wrong)?;
    if image.requires_external_data_file() {
        return Err(OpenError::DataFile);
    }
    image.set_data_file(None);
    let below = match image.implicit_backing_file() {
        None => None,
        Some(name) => {
            let format = image.implicit_backing_format().cloned();
            Some(behind(path, name, format.as_deref(), how, depth)?)
        }
    };
    image.set_backing(below);
    Ok(FormatAccess::new(image))
}

/// The file behind an image, for reading.
fn behind(
    path: &Path,
    name: &str,
    format: Option<&str>,
    how: How,
    depth: usize,
) -> Result<FormatAccess<file::File>, OpenError> {
    // Relative to the image, as everywhere.
    let file = path.parent().map_or_else(|| PathBuf::from(name), |parent| parent.join(name));
    if !how.backing {
        return Err(OpenError::Backing(file));
    }
    let failed = |error| OpenError::Behind(file.clone(), Box::new(error));
    if depth >= MOST_BEHIND {
        return Err(failed(OpenError::TooDeep(MOST_BEHIND)));
    }
    let how = How { read_only: true, ..how };
    let opened = open_backing(&file, how).map_err(failed)?;
    match format {
        Some("qcow2") => qcow2(&file, opened, how, depth + 1).map_err(failed),
        Some("raw") => storage(&file, opened, how)
            .and_then(|storage| Raw::open_image(storage, false))
            .map(FormatAccess::new)
            .map_err(|error| failed(OpenError::Host(error))),
        Some(other) => Err(failed(OpenError::BackingFormat(Some(other.to_owned())))),
        None => Err(failed(OpenError::BackingFormat(None))),
    }
}

impl BlockBackend for Qcow2Disk {
    fn sectors(&self) -> u64 {
        self.image.size() / SECTOR as u64
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = sector.checked_add((buf.len() / SECTOR) as u64);
        if end.is_none_or(|end| end > self.sectors()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.check()?;
        self.image.read(buf, sector * SECTOR as u64)
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        self.image.write(bytes, sector * SECTOR as u64)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        self.check()?;
        self.image.discard_to_zero(sector * SECTOR as u64, sectors * SECTOR as u64)
    }
}

/// Whether a file, which may be open for direct I/O, begins as such an image does.
pub(super) fn looks_so(file: &File) -> bool {
    let mut magic = [0; MAGIC.len()];
    // A shorter file is none; one that cannot be read fails later.
    super::direct::read_start(file, &mut magic).is_ok() && magic == MAGIC
}

/// What such a file begins with.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

#[cfg(test)]
mod tests;
