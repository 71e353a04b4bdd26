//! The runtime directory of a user, and the names of guests in it.
//!
//! A guest's socket is `NAME.sock`; it is the name's owner as long as somebody listens. A socket that nobody listens at
//! is what a killed process left, and is removed by whoever finds it, under the directory's lock.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// Names the directory instead of the usual ones.
pub const VARIABLE: &str = "JANUS_RUNTIME_DIR";
const SUFFIX: &str = ".sock";

/// The directory, or a name in it, cannot be had.
#[derive(Debug)]
pub enum RuntimeError {
    /// The host refused something about this path.
    Host(PathBuf, io::Error),
    /// The directory is not this user's alone.
    Foreign(PathBuf),
    /// A guest of this name runs.
    Taken(String, Option<u32>),
    /// No guest has this name, a name that begins so, or this process number.
    Unknown(String, Vec<String>),
    /// Several begin so.
    Ambiguous(String, Vec<String>),
}

impl fmt::Display for RuntimeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Foreign(path) => write!(
                f,
                "{}: this directory is not yours alone (owner, or mode not 0700); remove it, or set {VARIABLE}",
                path.display()
            ),
            Self::Taken(name, pid) => {
                write!(f, "a guest named {name} runs already")?;
                if let Some(pid) = pid {
                    write!(f, " (process {pid})")?;
                }
                f.write_str("; choose another --name, or end that one")
            }
            Self::Unknown(name, guests) if guests.is_empty() => {
                write!(f, "no guest `{name}`: none runs")
            }
            Self::Unknown(name, guests) => {
                write!(f, "no guest `{name}`: there are {}", guests.join(", "))
            }
            Self::Ambiguous(name, guests) => {
                write!(f, "`{name}` may be any of {}", guests.join(", "))
            }
        }
    }
}

impl std::error::Error for RuntimeError {}

/// A guest that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
    /// Its process.
    pub pid: u32,
}

/// The runtime directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    file: File,
}

/// A name, as long as this lives.
#[derive(Debug)]
pub struct Claim {
    /// Where its clients come.
    pub listener: UnixListener,
    name: String,
    path: PathBuf,
    /// Whose process it is: a copy of it after a fork is not.
    owner: u32,
}

impl Claim {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Where the directory is: see [`VARIABLE`]; else `$XDG_RUNTIME_DIR/janus`, else `/tmp/janus-UID`.
#[must_use]
pub fn usual_path() -> PathBuf {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        Some(path) if Path::new(&path).is_dir() => Path::new(&path).join("janus"),
        _ => format!("/tmp/janus-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// Whoever listens at a socket: `None` when nobody does.
fn listener_of(path: &Path) -> io::Result<Option<u32>> {
    match UnixStream::connect(path) {
        Ok(stream) => {
            let peer = rustix::net::sockopt::socket_peercred(&stream)?;
            Ok(Some(peer.pid.as_raw_nonzero().get().unsigned_abs()))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
        Err(error) => Err(error),
    }
}

impl Directory {
    /// Opens the usual directory, and makes it if there is none.
    ///
    /// # Errors
    /// It cannot be made, or is another's.
    pub fn open() -> Result<Self, RuntimeError> {
        Self::open_at(&usual_path())
    }

    /// Opens this directory, and makes it if there is none.
    ///
    /// # Errors
    /// It cannot be made, or is another's.
    pub fn open_at(path: &Path) -> Result<Self, RuntimeError> {
        let failed = |error| RuntimeError::Host(path.to_owned(), error);
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let open = || rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from);
        let opened = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match std::fs::DirBuilder::new().mode(0o700).create(path) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                    _ => open(),
                }
            }
            opened => opened,
        };
        let file = File::from(opened.map_err(failed)?);
        let meta = file.metadata().map_err(failed)?;
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
            return Err(RuntimeError::Foreign(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), file })
    }

    fn failed(&self) -> impl Fn(io::Error) -> RuntimeError {
        let path = self.path.clone();
        move |error| RuntimeError::Host(path.clone(), error)
    }

    /// One process at a time looks whether sockets are stale, and makes new ones.
    fn locked<R>(
        &self,
        action: impl FnOnce() -> Result<R, RuntimeError>,
    ) -> Result<R, RuntimeError> {
        let lock = |operation| rustix::fs::flock(&self.file, operation).map_err(io::Error::from);
        lock(FlockOperation::LockExclusive).map_err(self.failed())?;
        let result = action();
        lock(FlockOperation::Unlock).map_err(self.failed())?;
        result
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }

    /// Takes a name, of which the caller has checked that it can be a file's.
    ///
    /// # Errors
    /// A guest has it, or the socket cannot be made.
    pub fn claim(&self, name: &str) -> Result<Claim, RuntimeError> {
        let path = self.socket(name);
        let failed = |error| RuntimeError::Host(path.clone(), error);
        self.locked(|| {
            let listener = match UnixListener::bind(&path) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if let Some(pid) = listener_of(&path).map_err(failed)? {
                        return Err(RuntimeError::Taken(name.to_owned(), Some(pid)));
                    }
                    std::fs::remove_file(&path).map_err(failed)?;
                    UnixListener::bind(&path)
                }
                bound => bound,
            };
            let listener = listener.map_err(failed)?;
            // The directory keeps others out; this says it of the socket itself.
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&path, mode).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            let owner = std::process::id();
            Ok(Claim { listener, name: name.to_owned(), path: path.clone(), owner })
        })
    }

    /// The guests that run, by name. Sockets that were left behind are removed.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn guests(&self) -> Result<Vec<Entry>, RuntimeError> {
        let mut guests = Vec::new();
        for file in std::fs::read_dir(&self.path).map_err(self.failed())? {
            let file = file.map_err(self.failed())?;
            let file_name = file.file_name();
            let Some(name) = file_name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) else {
                continue;
            };
            let socket = file.path();
            match listener_of(&socket) {
                Ok(Some(pid)) => guests.push(Entry { name: name.to_owned(), socket, pid }),
                Ok(None) => self.remove_stale(&socket)?,
                // It went away meanwhile, or is no socket.
                Err(_) => {}
            }
        }
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(guests)
    }

    fn remove_stale(&self, socket: &Path) -> Result<(), RuntimeError> {
        self.locked(|| {
            // Somebody may have taken the name since.
            if matches!(listener_of(socket), Ok(None)) {
                let _ = std::fs::remove_file(socket);
            }
            Ok(())
        })
    }

    /// The guest of this name, of the only name that begins so, or of this process.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn find(&self, name: &str) -> Result<Entry, RuntimeError> {
        let guests = self.guests()?;
        if let Some(exact) = guests.iter().find(|guest| guest.name == name) {
            return Ok(exact.clone());
        }
        if let Some(process) = guests.iter().find(|guest| guest.pid.to_string() == name) {
            return Ok(process.clone());
        }
        let begin: Vec<&Entry> = guests.iter().filter(|g| g.name.starts_with(name)).collect();
        let names = |guests: &[&Entry]| guests.iter().map(|guest| guest.name.clone()).collect();
        match begin.as_slice() {
            [only] => Ok((*only).clone()),
            [] => Err(RuntimeError::Unknown(
                name.to_owned(),
                names(&guests.iter().collect::<Vec<_>>()),
            )),
            several => Err(RuntimeError::Ambiguous(name.to_owned(), names(several))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_by_beginning_and_process() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open_at(&place.path().join("janus")).unwrap();
        assert_eq!(directory.guests().unwrap(), []);
        let first = directory.claim("web").unwrap();
        let _second = directory.claim("worker").unwrap();
        let taken = directory.claim("web").unwrap_err();
        let pid = std::process::id();
        assert!(
            matches!(&taken, RuntimeError::Taken(name, Some(by)) if name == "web" && *by == pid)
        );
        assert_eq!(directory.find("web").unwrap().name, "web");
        assert_eq!(directory.find("wo").unwrap().name, "worker");
        assert_eq!(directory.find("web").unwrap().pid, pid);
        assert!(matches!(directory.find("w"), Err(RuntimeError::Ambiguous(..))));
        assert!(matches!(directory.find("x"), Err(RuntimeError::Unknown(..))));
        assert!(directory.find(&pid.to_string()).is_ok());
        let mode = std::fs::metadata(first.path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(first);
        assert_eq!(directory.guests().unwrap().len(), 1);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_its_name_is_free() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open_at(&place.path().join("janus")).unwrap();
        for remains in ["a", "b"] {
            drop(UnixListener::bind(directory.socket(remains)).unwrap());
        }
        assert!(directory.claim("a").is_ok());
        assert_eq!(directory.guests().unwrap(), []);
        assert!(!directory.socket("b").exists());
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let open = place.path().join("open");
        std::fs::DirBuilder::new().mode(0o755).create(&open).unwrap();
        assert!(matches!(Directory::open_at(&open), Err(RuntimeError::Foreign(_))));
        let link = place.path().join("link");
        std::os::unix::fs::symlink(place.path(), &link).unwrap();
        assert!(Directory::open_at(&link).is_err(), "a link may lead anywhere");
    }
}
