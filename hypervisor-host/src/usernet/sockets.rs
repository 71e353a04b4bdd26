//! The host's side: epoll with one-shot interest, and non-blocking sockets.
//!
//! Interest is one-shot and armed only when a socket has nothing to give or no room: while data flows, frames of the
//! guest drive the sockets and the event thread sleeps.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use super::slab::{Key, Kind, Token};
use super::timers::Time;

/// What a socket is waited for.
pub(super) type Interest = epoll::EventFlags;
/// It has something to read, or ended.
pub(super) const READ: Interest = epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP);
/// It has room.
pub(super) const WRITE: Interest = epoll::EventFlags::OUT;

/// Events taken at once.
const BATCH: usize = 64;

/// epoll, and what wakes it from elsewhere.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
}

const WAKE: Token = Token { kind: Kind::Wake, key: Key { index: 0, generation: 0 } };

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(WAKE.to_u64());
        epoll::add(&epoll, &wake, data, epoll::EventFlags::IN)?;
        Ok(Self { epoll, wake })
    }

    /// Ends a [`Self::wait`].
    pub(super) fn wake(&self) {
        // It fails only when it is woken already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Waits, at most so long. An empty answer: the time is over, or somebody called [`Self::wake`].
    pub(super) fn wait(&self, most: Option<Duration>, found: &mut Vec<(Token, Interest)>) {
        found.clear();
        let most = most.map(|most| Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(most.subsec_nanos()),
        });
        let mut events = Vec::with_capacity(BATCH);
        let spare = rustix::buffer::spare_capacity(&mut events);
        // It fails when a signal comes, and then there is nothing.
        let _ = epoll::wait(&self.epoll, spare, most.as_ref());
        for epoll::Event { flags, data, .. } in events {
            match Token::from_u64(data.u64()) {
                Some(Token { kind: Kind::Wake, .. }) => {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                }
                Some(token) => found.push((token, flags)),
                None => {}
            }
        }
    }

    /// Adds a socket that is waited for `interest`, once.
    pub(super) fn add(
        &self,
        socket: impl AsFd,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.to_u64());
        Ok(epoll::add(&self.epoll, socket, data, interest | epoll::EventFlags::ONESHOT)?)
    }

    /// Waits for `interest` again, once.
    pub(super) fn arm(&self, socket: impl AsFd, token: Token, interest: Interest) {
        let data = epoll::EventData::new_u64(token.to_u64());
        // It fails only for a socket that was not added.
        let _ = epoll::modify(&self.epoll, socket, data, interest | epoll::EventFlags::ONESHOT);
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connecting {
    Done,
    Underway,
}

/// Begins a TCP connection.
pub(super) fn connect_tcp(to: SocketAddr) -> Result<(OwnedFd, Connecting), Errno> {
    let kind = SocketType::STREAM;
    let socket = rustix::net::socket_with(family(to.ip()), kind, FLAGS, Some(ipproto::TCP))?;
    prepare_tcp(&socket);
    let state = match rustix::net::connect(&socket, &to) {
        // On the loopback interface it is done by now, but the first call cannot know.
        Err(Errno::INPROGRESS) => resume_connect(&socket, to)?,
        Err(error) => return Err(error),
        Ok(()) => Connecting::Done,
    };
    Ok((socket, state))
}

/// Looks how a connection is getting on.
pub(super) fn resume_connect(socket: &OwnedFd, to: SocketAddr) -> Result<Connecting, Errno> {
    match rustix::net::connect(socket, &to) {
        Ok(()) | Err(Errno::ISCONN) => Ok(Connecting::Done),
        Err(Errno::ALREADY | Errno::INPROGRESS) => Ok(Connecting::Underway),
        Err(error) => Err(error),
    }
}

/// What every TCP socket gets.
pub(super) fn prepare_tcp(socket: &OwnedFd) {
    // The guest decides what it sends together. Without the option it is only slower.
    let _ = sockopt::set_tcp_nodelay(socket, true);
}

/// Closes a TCP socket such that its peer sees a reset.
pub(super) fn reset(socket: OwnedFd) {
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    drop(socket);
}

/// A UDP socket that talks with one peer.
pub(super) fn connect_udp(to: SocketAddr) -> Result<OwnedFd, Errno> {
    let kind = SocketType::DGRAM;
    let socket = rustix::net::socket_with(family(to.ip()), kind, FLAGS, Some(ipproto::UDP))?;
    rustix::net::connect(&socket, &to)?;
    Ok(socket)
}

/// A socket for ICMP echo, where `net.ipv4.ping_group_range` lets us have one.
pub(super) fn connect_ping(to: IpAddr) -> Result<OwnedFd, Errno> {
    let kind = SocketType::DGRAM;
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, FLAGS, Some(ipproto::ICMP))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
    Ok(socket)
}

/// Connections that the host holds for us until we accept them.
const BACKLOG: i32 = 128;

/// A listening TCP socket.
pub(super) fn listen_tcp(at: SocketAddr) -> Result<OwnedFd, Errno> {
    let kind = SocketType::STREAM;
    let socket = rustix::net::socket_with(family(at.ip()), kind, FLAGS, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &at)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A bound UDP socket.
pub(super) fn bind_udp(at: SocketAddr) -> Result<OwnedFd, Errno> {
    let kind = SocketType::DGRAM;
    let socket = rustix::net::socket_with(family(at.ip()), kind, FLAGS, Some(ipproto::UDP))?;
    rustix::net::bind(&socket, &at)?;
    Ok(socket)
}

/// Where a socket is bound.
pub(super) fn local_address(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    SocketAddr::try_from(rustix::net::getsockname(socket)?)
}

/// The next connection of a listener.
pub(super) fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::net::accept_with(listener, FLAGS)
}

/// Whether an operation would have to wait.
pub(super) fn would_wait(error: Errno) -> bool {
    error == Errno::AGAIN || error == Errno::INTR
}

/// What is left until `time`.
pub(super) fn until(time: Time, now: Time) -> Duration {
    Duration::from_micros(time.saturating_sub(now))
}
