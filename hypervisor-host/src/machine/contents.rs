//! A file's contents, read by mapping it: a kernel has far more in it than is ever looked at.
// UNSAFETY: a file in memory is as others leave it.
#![expect(unsafe_code, reason = "maps a file")]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The contents of a file.
#[derive(Debug)]
pub(crate) enum Contents {
    /// As they are in the file.
    Mapped(memmap2::Mmap),
    /// A copy: of what cannot be mapped.
    Read(Vec<u8>),
}

impl Contents {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // Only an ordinary file; others (pipes, devices) have no length.
        if file.metadata()?.is_file() {
            // SAFETY: nobody writes a kernel that is being started, as nobody writes a program that runs. Whoever does
            // so all the same may change what the guest is made of (which was his to choose), or end this process by a
            // signal; each value is read by code that checks it.
            if let Ok(map) = unsafe { memmap2::Mmap::map(&file) } {
                return Ok(Self::Mapped(map));
            }
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut { file }, &mut bytes)?;
        Ok(Self::Read(bytes))
    }
}

impl Deref for Contents {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_every_kind_are_read_whole() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, b"kernel").unwrap();
        assert_eq!(&*Contents::of(file.path()).unwrap(), b"kernel");
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(Contents::of(empty.path()).unwrap().is_empty());
        assert!(Contents::of(Path::new("/dev/null")).unwrap().is_empty());
        assert!(Contents::of(Path::new("/does/not/exist")).is_err());
    }
}
