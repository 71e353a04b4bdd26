//! A stub for gdb: `janus run --gdb`, and `target remote` there (docs/debugging.md).
//!
//! Each virtual CPU is a thread. Breakpoints are `int3` in the guest's frames, whatever its page tables allow; a step is
//! the trap flag, and over hypercalls. Debug registers are not to be had by a process, so that there are no hardware
//! breakpoints; gdb watches memory by stepping.

mod commands;
mod debuggee;
mod link;
mod registers;
mod session;

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::SocketFlags;

use self::debuggee::Debuggee;
use self::link::{Bell, Link};
use self::session::Over;
use crate::pv::domain::Domain;

/// Where gdb comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP address; without one, of this machine alone.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        match port.parse::<u16>() {
            Ok(port) => Ok(Self::Tcp(format!("{host}:{port}"))),
            Err(_) => Err(format!("`{text}` is no address for gdb: [HOST:]PORT, or unix:PATH")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Waits for gdb at an address.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<OwnedFd>,
    place: String,
    path: Option<PathBuf>,
}

impl Listener {
    /// Begins to listen.
    ///
    /// # Errors
    /// The address cannot be had.
    pub fn bind(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Tcp(text) => {
                let socket = TcpListener::bind(text)?;
                let place = socket.local_addr()?.to_string();
                Self { socket: Arc::new(socket.into()), place, path: None }
            }
            Address::Unix(path) => {
                let socket = UnixListener::bind(path)?;
                let place = path.display().to_string();
                Self { socket: Arc::new(socket.into()), place, path: Some(path.clone()) }
            }
        })
    }

    /// What `target remote` wants.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What a session tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// gdb came.
    Attached,
    /// It left, and the guest goes on.
    Detached,
    /// It asks for the guest's end.
    Kill,
}

/// The thread that serves gdb for one domain.
#[derive(Debug)]
pub struct Stub {
    thread: Option<JoinHandle<()>>,
    bell: Arc<Bell>,
}

impl Stub {
    /// Serves a domain that is paused once, which ends when gdb says so.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(
        listener: &Listener,
        domain: &Arc<Domain>,
        hears: impl Fn(Happened) + Send + 'static,
    ) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let rung = Arc::clone(&bell);
        domain.on_end(Box::new(move || rung.ring()));
        let (socket, domain, of_thread) =
            (Arc::clone(&listener.socket), Arc::clone(domain), Arc::clone(&bell));
        let serve = move || sessions(&socket, &domain, &of_thread, &hears);
        let thread = std::thread::Builder::new().name("gdb".into()).spawn(serve)?;
        Ok(Self { thread: Some(thread), bell })
    }

    /// The domain has ended: waits until gdb has seen what it wants of that.
    pub fn finish(mut self) {
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One session after another, until the domain ends.
fn sessions(socket: &OwnedFd, domain: &Arc<Domain>, bell: &Arc<Bell>, hears: &dyn Fn(Happened)) {
    let mut paused = true;
    while domain.ended().is_none() {
        if !bell.or(socket) {
            let _ = bell.heard();
            continue;
        }
        let Ok(client) = rustix::net::accept_with(socket, SocketFlags::CLOEXEC) else { continue };
        // Packets are small; a unix socket has no such option.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&client, true);
        if !std::mem::take(&mut paused) {
            domain.pause();
        }
        let mut debuggee = Debuggee::new(Arc::clone(domain), Arc::clone(bell));
        hears(Happened::Attached);
        let over = session::serve(Link::new(client), &mut debuggee);
        debuggee.detach();
        match over {
            Over::Left => hears(Happened::Detached),
            Over::Kill => hears(Happened::Kill),
            Over::Ended => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ports_hosts_and_sockets() {
        for (text, address) in [
            ("1234", Address::Tcp("127.0.0.1:1234".into())),
            (":0", Address::Tcp("127.0.0.1:0".into())),
            ("0.0.0.0:9", Address::Tcp("0.0.0.0:9".into())),
            ("[::1]:9", Address::Tcp("[::1]:9".into())),
            ("unix:/run/x", Address::Unix("/run/x".into())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        for wrong in ["", "x", "unix:", "host:", "1:99999"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
