//! File descriptors of a console's endpoints, none of which is ever waited for here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::pty::OpenptFlags;

use super::{Endpoint, OnEscape, Output};
use crate::host::events::Interest;

/// What became of reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many bytes.
    Wrote(usize),
    /// Not now.
    Full,
    /// Never again.
    Failed,
}

/// An endpoint's descriptors.
pub(super) struct Opened {
    /// Where bytes go; `None`: nobody reads.
    pub(super) output: Option<Arc<OwnedFd>>,
    /// Or to whom.
    writer: Option<Output>,
    pub(super) input: Option<Arc<OwnedFd>>,
    pub(super) listener: Option<Arc<OwnedFd>>,
    pub(super) escape: Option<(u8, OnEscape)>,
    pub(super) tty: Option<String>,
    pub(super) last_interest: Interest,
    /// Its client left, and the listener has not taken its place yet.
    pub(super) left: bool,
    /// The other end of a pseudo terminal, so that it survives its readers; and the socket's path.
    _terminal: Option<OwnedFd>,
    path: Option<PathBuf>,
    is_socket: bool,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("output", &self.output)
            .field("input", &self.input)
            .field("listener", &self.listener)
            .field("tty", &self.tty)
            .finish_non_exhaustive()
    }
}

/// A description of our own that does not wait, where there can be one: others share the inherited one.
fn without_waiting(fd: impl AsFd, flags: OFlags) -> io::Result<(Arc<OwnedFd>, bool)> {
    use std::os::fd::AsRawFd as _;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok((Arc::new(own), false));
        }
    }
    let copy = fd.as_fd().try_clone_to_owned()?;
    Ok((Arc::new(copy), kind == FileType::Socket))
}

/// Waits until one of these takes bytes, or is of no more use.
pub(super) fn wait_for_room(fds: &[Arc<OwnedFd>], most: Duration) {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::OUT)).collect();
    let most = Timespec {
        tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(most.subsec_nanos()),
    };
    // It fails when a signal comes: then somebody looks again.
    let _ = poll(&mut fds, Some(&most));
}

impl Opened {
    pub(super) fn open(endpoint: Endpoint) -> io::Result<Self> {
        let mut this = Self {
            output: None,
            writer: None,
            input: None,
            listener: None,
            escape: None,
            tty: None,
            last_interest: Interest::empty(),
            left: false,
            _terminal: None,
            path: None,
            is_socket: false,
        };
        match endpoint {
            Endpoint::Writer(writer) => this.writer = Some(writer),
            Endpoint::Stdio { escape, input } => {
                this.escape = escape;
                let (output, is_socket) = without_waiting(io::stdout(), OFlags::WRONLY)?;
                (this.output, this.is_socket) = (Some(output), is_socket);
                if input {
                    this.input = Some(without_waiting(io::stdin(), OFlags::RDONLY)?.0);
                }
            }
            Endpoint::Pty => {
                let ours = rustix::pty::openpt(
                    OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
                )?;
                rustix::pty::unlockpt(&ours)?;
                let name = rustix::pty::ptsname(&ours, Vec::new())?;
                let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
                let terminal = rustix::fs::open(&name, flags, Mode::empty())?;
                let mut mode = rustix::termios::tcgetattr(&terminal)?;
                mode.make_raw();
                rustix::termios::tcsetattr(
                    &terminal,
                    rustix::termios::OptionalActions::Now,
                    &mode,
                )?;
                rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK)?;
                let ours = Arc::new(ours);
                this.tty = Some(name.to_string_lossy().into_owned());
                (this.output, this.input) = (Some(Arc::clone(&ours)), Some(ours));
                this._terminal = Some(terminal);
            }
            Endpoint::File(path) => {
                let file = File::options().append(true).create(true).open(&path);
                let file = file.map_err(|error| {
                    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
                })?;
                this.output = Some(Arc::new(file.into()));
            }
            Endpoint::Socket(path) => {
                let listener = listen(&path)?;
                this.listener = Some(Arc::new(listener.into()));
                (this.path, this.is_socket) = (Some(path), true);
            }
        }
        Ok(this)
    }

    /// Whether somebody takes the bytes.
    pub(super) fn has_reader(&self) -> bool {
        self.output.is_some() || self.writer.is_some()
    }

    /// Whether this is a listener without a client.
    pub(super) fn awaits_client(&self) -> bool {
        self.listener.is_some() && self.output.is_none()
    }

    /// Whether one descriptor is both input and output.
    pub(super) fn one_descriptor(&self) -> bool {
        self.listener.is_some() || self.tty.is_some()
    }

    /// Takes a client; `false`: there is none.
    pub(super) fn accept(&mut self) -> bool {
        let Some(listener) = &self.listener else { return false };
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        match rustix::net::accept_with(listener, flags) {
            Ok(client) => {
                let client = Arc::new(client);
                (self.output, self.input) = (Some(Arc::clone(&client)), Some(client));
                self.last_interest = Interest::empty();
                true
            }
            Err(_) => false,
        }
    }

    /// The other end left: a client of a socket, or the end of standard input, whose output goes on.
    pub(super) fn hang_up(&mut self) {
        (self.input, self.left) = (None, false);
        self.last_interest = Interest::empty();
        if self.listener.is_some() {
            self.output = None;
        }
    }

    /// The client of a socket takes nothing any more.
    pub(super) fn leave(&mut self) {
        (self.output, self.left) = (None, true);
    }

    /// Output failed for good.
    pub(super) fn fail(&mut self) {
        (self.output, self.writer) = (None, None);
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Outcome {
        if let Some(writer) = &mut self.writer {
            let written = writer.write_all(bytes).and_then(|()| writer.flush());
            return written.map_or(Outcome::Failed, |()| Outcome::Wrote(bytes.len()));
        }
        let Some(fd) = &self.output else { return Outcome::Failed };
        let result = if self.is_socket {
            rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        } else {
            rustix::io::write(fd, bytes)
        };
        outcome(result)
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> Outcome {
        let Some(fd) = &self.input else { return Outcome::Failed };
        if self.is_socket && self.listener.is_some() {
            return outcome(
                rustix::net::recv(fd, buf, RecvFlags::DONTWAIT).map(|(count, _)| count),
            );
        }
        outcome(rustix::io::read(fd, buf))
    }
}

fn outcome(result: Result<usize, Errno>) -> Outcome {
    match result {
        Ok(count) => Outcome::Wrote(count),
        Err(Errno::AGAIN | Errno::INTR) => Outcome::Full,
        Err(_) => Outcome::Failed,
    }
}

/// Listens at a path, in place of a socket that nobody listens at any more.
pub(in crate::host) fn listen(path: &std::path::Path) -> io::Result<UnixListener> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if std::os::unix::net::UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path).map_err(named)?;
    }
    let listener = UnixListener::bind(path).map_err(named)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}
