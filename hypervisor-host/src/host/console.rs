//! The console daemon: between the guest's console page and terminals, files and sockets of the host.
//!
//! What the guest prints goes to every [`Endpoint`]. Each has a buffer with a bound; while that of an endpoint with a
//! reader is full, bytes stay in the guest's ring, so that nothing is lost and the guest's CPUs go on. An endpoint
//! without a reader keeps the latest [`SCROLLBACK`] bytes. What is typed at any endpoint goes to the guest.

mod endpoint;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use janus_proto::addr::Port;
use janus_proto::byte_ring::{ByteRing, ByteRingError, CONSOLE};

pub(super) use self::endpoint::listen;
use self::endpoint::{Opened, Outcome};
use super::devices::HostError;
use super::events::{EventLoop, Interest, READ, WRITE, Waiting};
use super::guest::{Guest, Notify as _};
use crate::memory::GrantMapper;
use crate::virtio::console::ConsoleGuest;

/// Bytes kept for a reader that is slow.
pub const BUFFER: usize = 1 << 20;
/// Bytes kept for a reader that is not there yet.
pub const SCROLLBACK: usize = 64 << 10;
/// How long readers may take for the last words of a guest.
const CLOSING: Duration = Duration::from_secs(2);
/// Bytes typed ahead.
const TYPED: usize = 4096;

/// Is called, on the event loop's thread, when the escape byte was typed.
pub type OnEscape = Arc<dyn Fn() + Send + Sync>;

/// Something of the caller's that takes what the guest prints. It should not wait long: the guest waits with it.
pub type Output = Box<dyn Write + Send>;

/// Somewhere the console goes.
pub enum Endpoint {
    /// Something of the caller's.
    Writer(Output),
    /// This process's standard input and output.
    Stdio {
        /// A byte that does not go to the guest (29 is Ctrl-]), and what it does.
        escape: Option<(u8, OnEscape)>,
        /// Whether standard input goes to the guest.
        input: bool,
    },
    /// A new pseudo terminal; its name is in xenstore.
    Pty,
    /// A file, for output only; it is appended to.
    File(PathBuf),
    /// A socket at this path, for one client at a time.
    Socket(PathBuf),
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio { input, .. } => f.debug_struct("Stdio").field("input", input).finish(),
            Self::Writer(_) => f.write_str("Writer"),
            Self::Pty => f.write_str("Pty"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Socket(path) => f.debug_tuple("Socket").field(path).finish(),
        }
    }
}

/// A virtio console of this daemon's: the device, and the daemon.
pub type VirtioConsole = (crate::virtio::console::Console, Arc<ConsoleCore<ConsoleGuest>>);

/// Makes a virtio console that goes to these places.
///
/// # Errors
/// One of them cannot be had.
pub fn virtio(
    endpoints: Vec<Endpoint>,
    events: &Arc<EventLoop>,
) -> Result<VirtioConsole, HostError> {
    let endpoints = Endpoints::open(endpoints);
    let endpoints = endpoints.map_err(|error| HostError::Host("virtio console".into(), error))?;
    let (device, guest) = crate::virtio::console::Console::new().map_err(HostError::Page)?;
    let daemon = ConsoleCore::start(&guest, endpoints, guest.page(), events)?;
    Ok((device, daemon))
}

/// The endpoints of a console, opened.
#[derive(Debug)]
pub(super) struct Endpoints {
    opened: Vec<Opened>,
}

impl Endpoints {
    pub(super) fn open(endpoints: Vec<Endpoint>) -> io::Result<Self> {
        let opened = endpoints.into_iter().map(Opened::open).collect::<io::Result<_>>()?;
        Ok(Self { opened })
    }

    /// The name of a pseudo terminal among them.
    pub(super) fn tty(&self) -> Option<&str> {
        self.opened.iter().find_map(|endpoint| endpoint.tty.as_deref())
    }
}

/// An endpoint with its buffer.
struct Sink {
    opened: Opened,
    buffer: VecDeque<u8>,
    /// Waits for input and listeners.
    reader: Option<Waiting>,
    /// Waits for room, when output is another descriptor than input.
    writer: Option<Waiting>,
}

struct Inner<M> {
    ring: ByteRing<M>,
    sinks: Vec<Sink>,
    typed: VecDeque<u8>,
    broken: Option<ByteRingError>,
    lost: u64,
    closed: bool,
}

/// The console daemon of one guest.
pub struct ConsoleCore<G: Guest> {
    inner: Mutex<Inner<<G::Grants as GrantMapper>::Mapping>>,
    /// There is room for typing, or the console is closed.
    room: Condvar,
    port: OnceLock<G::Port>,
    events: Arc<EventLoop>,
    this: Weak<Self>,
}

impl<G: Guest> fmt::Debug for ConsoleCore<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        let buffered: Vec<_> = inner.sinks.iter().map(|sink| sink.buffer.len()).collect();
        f.debug_struct("ConsoleCore")
            .field("buffered", &buffered)
            .field("typed", &inner.typed.len())
            .field("broken", &inner.broken)
            .field("lost", &inner.lost)
            .finish_non_exhaustive()
    }
}

impl<G: Guest> ConsoleCore<G> {
    pub(super) fn start(
        guest: &G,
        endpoints: Endpoints,
        page: <G::Grants as GrantMapper>::Mapping,
        events: &Arc<EventLoop>,
    ) -> Result<Arc<Self>, HostError> {
        let ring = ByteRing::back(page, CONSOLE).map_err(HostError::Page)?;
        let sink = |opened| Sink { opened, buffer: VecDeque::new(), reader: None, writer: None };
        let sinks = endpoints.opened.into_iter().map(sink).collect();
        let (typed, broken, lost, closed) = (VecDeque::new(), None, 0, false);
        let this = Arc::new_cyclic(|this| Self {
            inner: Mutex::new(Inner { ring, sinks, typed, broken, lost, closed }),
            room: Condvar::new(),
            port: OnceLock::new(),
            events: Arc::clone(events),
            this: this.clone(),
        });
        let weak = Arc::downgrade(&this);
        let handler = move || {
            if let Some(this) = weak.upgrade() {
                this.serve();
            }
        };
        let port = guest.bind(Arc::new(handler)).map_err(HostError::Port)?;
        let _ = this.port.set(port);
        let count = this.lock().sinks.len();
        for index in 0..count {
            this.listen(index).map_err(|error| HostError::Host("console".into(), error))?;
        }
        this.serve();
        Ok(this)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<<G::Grants as GrantMapper>::Mapping>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's number of the console's port.
    pub(super) fn guest_port(&self) -> Port {
        self.port.get().map_or(Port(0), super::guest::Notify::guest_port)
    }

    /// Bytes that no endpoint could take because it failed.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    /// Types something; answers how much of it fits.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let fits = TYPED.saturating_sub(inner.typed.len()).min(bytes.len());
        inner.typed.extend(bytes.get(..fits).unwrap_or_default());
        drop(inner);
        self.serve();
        fits
    }

    /// Types: waits while the guest has far too much to read already. `false`: the console is closed.
    pub fn type_bytes(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let taken = self.type_in(bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            let mut inner = self.lock();
            while inner.typed.len() >= TYPED && !inner.closed {
                inner = self.room.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            if inner.closed {
                return false;
            }
        }
        true
    }

    /// Takes what the guest printed last, gives slow readers a moment for it, and lets those go who type.
    pub fn close(&self) {
        self.drain(Instant::now() + CLOSING);
        self.lock().closed = true;
        self.room.notify_all();
    }

    /// Writes out what is still in the ring and in buffers, waiting for slow readers at most until `deadline`.
    pub fn drain(&self, deadline: Instant) {
        loop {
            self.serve();
            let mut waits = Vec::new();
            for sink in &mut self.lock().sinks {
                if !sink.buffer.is_empty() && sink.opened.has_reader() {
                    waits.extend(sink.opened.output.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if waits.is_empty() || left.is_zero() {
                return;
            }
            endpoint::wait_for_room(&waits, left);
        }
    }

    /// Moves whatever can be moved in both directions. Never waits.
    fn serve(&self) {
        let mut inner = self.lock();
        let moved = inner.pump();
        for index in 0..inner.sinks.len() {
            self.interest(&mut inner, index);
        }
        drop(inner);
        self.room.notify_all();
        if moved && let Some(port) = self.port.get() {
            port.notify();
        }
    }

    /// Begins to wait for what an endpoint's input or listener may bring.
    fn listen(&self, index: usize) -> io::Result<()> {
        let mut inner = self.lock();
        let Some(sink) = inner.sinks.get_mut(index) else { return Ok(()) };
        let fd = sink.opened.listener.clone().or_else(|| sink.opened.input.clone());
        let Some(fd) = fd else { return Ok(()) };
        match self.wait(fd, READ, index) {
            Ok(waiting) => sink.reader = Some(waiting),
            // A regular file (or /dev/null) as input cannot be waited for: it is there at once.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                while inner.typed.len() < TYPED && inner.take_input(index).is_some() {}
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn wait(&self, fd: Arc<OwnedFd>, interest: Interest, index: usize) -> io::Result<Waiting> {
        let this = self.this.clone();
        let callback = move |_| {
            if let Some(this) = this.upgrade() {
                this.ready(index);
            }
        };
        self.events.add(fd, interest, Arc::new(callback))
    }

    /// Something happened at an endpoint.
    fn ready(&self, index: usize) {
        let mut inner = self.lock();
        let escape = if inner.sinks.get(index).is_some_and(|s| s.opened.awaits_client()) {
            if let Some(sink) = inner.sinks.get_mut(index)
                && sink.opened.accept()
                && let Some(fd) = sink.opened.output.clone()
            {
                // A client takes the listener's place until it leaves.
                sink.reader = None;
                sink.reader = self.wait(fd, READ, index).ok();
            }
            None
        } else if inner.typed.len() < TYPED {
            match inner.take_input(index) {
                Some(escape) => escape,
                None => {
                    self.hang_up(&mut inner, index);
                    None
                }
            }
        } else {
            None
        };
        drop(inner);
        self.serve();
        if let Some(escape) = escape {
            escape();
        }
    }

    /// The reader of an endpoint left.
    fn hang_up(&self, inner: &mut Inner<<G::Grants as GrantMapper>::Mapping>, index: usize) {
        let Some(sink) = inner.sinks.get_mut(index) else { return };
        (sink.reader, sink.writer) = (None, None);
        sink.opened.hang_up();
        if let Some(listener) = sink.opened.listener.clone() {
            sink.reader = self.wait(listener, READ, index).ok();
        }
    }

    /// Waits for room where something is left to write, and for input where it can be taken.
    fn interest(&self, inner: &mut Inner<<G::Grants as GrantMapper>::Mapping>, index: usize) {
        if inner.sinks.get(index).is_some_and(|sink| sink.opened.left) {
            self.hang_up(inner, index);
        }
        let typing = inner.typed.len() < TYPED;
        let Some(sink) = inner.sinks.get_mut(index) else { return };
        let writing = !sink.buffer.is_empty() && sink.opened.has_reader();
        let mut interest = Interest::empty();
        interest.set(READ, typing || sink.opened.awaits_client());
        if sink.opened.one_descriptor() {
            interest.set(WRITE, writing && !sink.opened.awaits_client());
        } else if writing {
            if sink.writer.is_none() {
                let fd = sink.opened.output.clone();
                sink.writer = fd.and_then(|fd| self.wait(fd, WRITE, index).ok());
            }
        } else {
            sink.writer = None;
        }
        if let Some(reader) = &sink.reader
            && sink.opened.last_interest != interest
        {
            reader.change(interest);
            sink.opened.last_interest = interest;
        }
    }
}

impl<M: std::ops::Deref<Target = [std::sync::atomic::AtomicU32]>> Inner<M> {
    /// `true`: notify the guest.
    fn pump(&mut self) -> bool {
        self.flush();
        if self.broken.is_some() {
            return false;
        }
        match self.pump_ring() {
            Ok(moved) => moved,
            Err(error) => {
                self.broken = Some(error);
                false
            }
        }
    }

    fn pump_ring(&mut self) -> Result<bool, ByteRingError> {
        let mut moved = false;
        loop {
            let room = |sink: &Sink| match sink.opened.has_reader() {
                true => BUFFER.saturating_sub(sink.buffer.len()),
                false => BUFFER,
            };
            let room = self.sinks.iter().map(room).min().unwrap_or(BUFFER);
            let mut bytes = [0; 2048];
            let part = bytes.get_mut(..room.min(2048)).unwrap_or_default();
            let count = self.ring.read(part)?;
            let typed = self.ring.write(self.typed.as_slices().0)?;
            self.typed.drain(..typed);
            if count + typed == 0 {
                return Ok(moved);
            }
            moved = true;
            for sink in &mut self.sinks {
                sink.buffer.extend(part.get(..count).unwrap_or_default());
            }
            self.flush();
            // What we wrote, before the next look.
            self.ring.barrier();
        }
    }

    /// Writes what the endpoints take.
    fn flush(&mut self) {
        for sink in &mut self.sinks {
            while sink.opened.has_reader() && !sink.buffer.is_empty() {
                match sink.opened.write(sink.buffer.as_slices().0) {
                    Outcome::Wrote(count) => drop(sink.buffer.drain(..count)),
                    Outcome::Full => break,
                    // The next client gets what this one did not take.
                    Outcome::Failed if sink.opened.listener.is_some() => sink.opened.leave(),
                    Outcome::Failed => {
                        self.lost += sink.buffer.len() as u64;
                        sink.buffer.clear();
                        sink.opened.fail();
                    }
                }
            }
            if !sink.opened.has_reader() {
                let much = sink.buffer.len().saturating_sub(SCROLLBACK);
                sink.buffer.drain(..much);
            }
        }
    }

    /// Reads what was typed at an endpoint; `None`: its end.
    fn take_input(&mut self, index: usize) -> Option<Option<OnEscape>> {
        let mut bytes = [0; 512];
        let sink = self.sinks.get_mut(index)?;
        let count = match sink.opened.read(&mut bytes) {
            Outcome::Wrote(0) | Outcome::Failed => return None,
            Outcome::Wrote(count) => count,
            Outcome::Full => return Some(None),
        };
        let bytes = bytes.get(..count).unwrap_or_default();
        if let Some((byte, escape)) = &sink.opened.escape
            && let Some(place) = bytes.iter().position(|b| b == byte)
        {
            self.typed.extend(bytes.get(..place).unwrap_or_default());
            return Some(Some(Arc::clone(escape)));
        }
        self.typed.extend(bytes);
        Some(None)
    }
}
