//! The bytes between gdb and us, and whatever else a session waits for.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use gdbstub::conn::Connection;
use rustix::event::{PollFd, PollFlags, poll};

/// A connection of gdb's.
#[derive(Debug)]
pub(super) struct Link {
    file: File,
    input: VecDeque<u8>,
    output: Vec<u8>,
}

/// What came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// A byte of gdb's.
    Byte(u8),
    /// Something happened to the guest.
    Bell,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { file: socket.into(), input: VecDeque::new(), output: Vec::new() }
    }

    /// Waits for a byte, or for `bell`, which comes first if both are there.
    pub(super) fn wait(&mut self, bell: &Bell) -> io::Result<Came> {
        loop {
            if bell.heard() {
                return Ok(Came::Bell);
            }
            if let Some(byte) = self.input.pop_front() {
                return Ok(Came::Byte(byte));
            }
            let mut fds =
                [PollFd::new(&self.file, PollFlags::IN), PollFd::new(&bell.0, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if fds.first().is_some_and(|fd| !fd.revents().is_empty()) {
                let mut buf = [0; 4096];
                match self.file.read(&mut buf)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => self.input.extend(buf.get(..count).unwrap_or_default()),
                }
            }
        }
    }
}

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let output = std::mem::take(&mut self.output);
        self.file.write_all(&output)
    }
}

/// Something that other threads ring, once for any number of times.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn ring(&self) {
        // It fails only when it has been rung already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Whether it was rung since the last call.
    pub(super) fn heard(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }

    /// Waits for it, or for something at `fd`; `true`: `fd`.
    pub(super) fn or(&self, fd: &OwnedFd) -> bool {
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
        // It fails when a signal comes: then somebody looks again.
        let _ = poll(&mut fds, None);
        fds.first().is_some_and(|fd| !fd.revents().is_empty())
    }
}
