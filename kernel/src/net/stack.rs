//! The state of one interface: smoltcp's interface and sockets, listeners, addresses; and one round of it all.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use janus_front::class::{NetDevice, PeerError};
use janus_front::dma::FrameSource;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::{AnySocket, dhcpv4, tcp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};

use super::phy::Phy;
use super::{AddressSource, NetError, NetStatus};
use crate::sync::Notify;

/// Frames taken in one round, before other tasks get a turn.
const RECEIVE_BUDGET: usize = 128;
/// Passes over the sockets in one round.
const SEND_BUDGET: usize = 64;
/// Sockets of all kinds.
const MAX_SOCKETS: usize = 512;
/// Connections that wait for `accept`, for each listener.
const MAX_BACKLOG: usize = 128;
/// Bytes of a TCP socket's receive buffer, for so many sockets: the first connections get a window that keeps a
/// fast host busy, a crowd shares the memory. The transmit buffer is half as long: it stays in the CPU's cache.
const TCP_BUFFERS: [(usize, usize); 3] =
    [(8, 1024 * 1024), (32, 256 * 1024), (usize::MAX, 64 * 1024)];
/// Closed connections whose buffers are kept for the next ones.
const MAX_SPARE: usize = 8;
/// Connections left in TIME-WAIT; beyond that the oldest ends early.
const MAX_TIME_WAIT: usize = 16;
/// How long a dropped connection may take to send the rest and close.
const LINGER: Duration = Duration::from_secs(60);
/// How long a peer may be silent while we wait for it.
const TCP_TIMEOUT: Duration = Duration::from_secs(60);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a DHCP server may take to answer before it is asked again: in the first [`DHCP_HURRY`], and later.
const DHCP_IMPATIENCE: Duration = Duration::from_millis(250);
const DHCP_PATIENCE: Duration = Duration::from_secs(2);
const DHCP_HURRY: Duration = Duration::from_secs(2);
/// How long to wait for the device to make room before looking again.
const CONGESTION_DELAY: Duration = Duration::from_millis(10);
/// How long a handshake may take.
pub(super) const HANDSHAKE: core::time::Duration = core::time::Duration::from_secs(10);

/// A port on which connections are accepted.
struct Listening {
    port: u16,
    /// Sockets that listen, shake hands, or wait for `accept`.
    sockets: Vec<SocketHandle>,
    ready: Arc<Notify>,
}

/// A connection whose owner is gone.
struct Orphan {
    handle: SocketHandle,
    until: Instant,
}

/// What a round found.
pub(super) struct Round {
    /// There is more to do at once.
    pub(super) more: bool,
    /// When to do the next round if nothing happens before.
    pub(super) deadline: Option<Instant>,
    pub(super) address_changed: bool,
}

/// See the module.
pub(super) struct Stack {
    /// `None` once detached.
    phy: Option<Phy>,
    pub(super) iface: Interface,
    pub(super) sockets: SocketSet<'static>,
    socket_count: usize,
    listening: Vec<Listening>,
    orphans: Vec<Orphan>,
    spare: Vec<tcp::Socket<'static>>,
    dhcp: Option<SocketHandle>,
    /// While DHCP asks often: since when, once it does.
    dhcp_hurry: Option<Option<Instant>>,
    source: AddressSource,
    dns: Vec<Ipv4Address>,
    next_port: u16,
    polls: u64,
    last_status: NetStatus,
}

impl Stack {
    pub(super) fn new(
        device: Box<dyn NetDevice>,
        frames: &'static dyn FrameSource,
        seed: u64,
        now: Instant,
    ) -> Self {
        let mut phy = Phy::new(device, frames);
        let mac = EthernetAddress(phy.properties().mac);
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = seed;
        let iface = Interface::new(config, &mut phy, now);
        let last_status = NetStatus {
            properties: phy.properties(),
            tso: phy.tso(),
            link_up: phy.link_up(),
            failure: None,
            address: None,
            gateway: None,
            dns: Vec::new(),
            source: AddressSource::None,
            sockets: 0,
            counters: phy.counters(),
        };
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the seed will do")]
        let next_port = FIRST_PORT + (seed >> 20) as u16 % (u16::MAX - FIRST_PORT);
        Self {
            phy: Some(phy),
            iface,
            sockets: SocketSet::new(Vec::new()),
            socket_count: 0,
            listening: Vec::new(),
            orphans: Vec::new(),
            spare: Vec::new(),
            dhcp: None,
            dhcp_hurry: None,
            source: AddressSource::None,
            dns: Vec::new(),
            next_port,
            polls: 0,
            last_status,
        }
    }

    pub(super) fn is_detached(&self) -> bool {
        self.phy.is_none()
    }

    /// The longest IP packet.
    pub(super) fn mtu(&self) -> u16 {
        self.last_status.properties.mtu
    }

    /// Whether sockets can work; new ones are refused otherwise.
    pub(super) fn check_up(&self) -> Result<(), NetError> {
        match &self.phy {
            Some(phy) if phy.failure().is_none() => Ok(()),
            _ => Err(NetError::Down),
        }
    }

    pub(super) fn status(&mut self) -> NetStatus {
        if let Some(phy) = &self.phy {
            self.last_status.link_up = phy.link_up();
            self.last_status.failure = phy.failure().map(|PeerError(rule)| rule);
            self.last_status.counters = phy.counters();
        } else {
            self.last_status.link_up = false;
            self.last_status.failure = Some("detached");
        }
        self.last_status.counters.polls = self.polls;
        self.last_status.address = self.address();
        let route = self.iface.routes().get_default_ipv4_route();
        self.last_status.gateway = route.and_then(|route| match route.via_router {
            IpAddress::Ipv4(via) => Some(via),
            IpAddress::Ipv6(_) => None,
        });
        self.last_status.dns.clone_from(&self.dns);
        self.last_status.source = self.source;
        self.last_status.sockets = self.socket_count;
        self.last_status.clone()
    }

    pub(super) fn address(&self) -> Option<Ipv4Cidr> {
        self.iface.ip_addrs().iter().find_map(|address| match address {
            IpCidr::Ipv4(address) => Some(*address),
            IpCidr::Ipv6(_) => None,
        })
    }

    /// Ends everything and gives the device back to be dropped.
    pub(super) fn detach(&mut self) -> Option<Phy> {
        let _ = self.status();
        self.abort_all();
        self.set_address(None, None);
        self.phy.take()
    }

    fn abort_all(&mut self) {
        for (_, socket) in self.sockets.iter_mut() {
            if let Some(socket) = tcp::Socket::downcast_mut(socket) {
                socket.abort();
            }
        }
        for listening in &self.listening {
            listening.ready.notify_all();
            // And for who is just about to wait, on another CPU.
            listening.ready.notify();
        }
    }

    // Sockets.

    /// Adds a socket of any kind.
    pub(super) fn add<T: AnySocket<'static>>(
        &mut self,
        socket: T,
    ) -> Result<SocketHandle, NetError> {
        self.check_up()?;
        self.insert(socket)
    }

    fn insert<T: AnySocket<'static>>(&mut self, socket: T) -> Result<SocketHandle, NetError> {
        if self.socket_count >= MAX_SOCKETS {
            return Err(NetError::NoMemory);
        }
        self.socket_count += 1;
        Ok(self.sockets.add(socket))
    }

    /// Removes a socket of any kind.
    pub(super) fn remove(&mut self, handle: SocketHandle) {
        self.socket_count -= 1;
        if let smoltcp::socket::Socket::Tcp(mut socket) = self.sockets.remove(handle)
            && self.spare.len() < MAX_SPARE
        {
            socket.abort();
            self.spare.push(socket);
        }
    }

    /// Adds a TCP socket that is closed.
    pub(super) fn add_tcp(&mut self) -> Result<SocketHandle, NetError> {
        self.check_up()?;
        self.insert_tcp()
    }

    fn insert_tcp(&mut self) -> Result<SocketHandle, NetError> {
        let mut socket = match self.spare.pop() {
            Some(socket) => socket,
            None => tcp::Socket::new(self.buffer(1)?, self.buffer(2)?),
        };
        socket.set_nagle_enabled(false); // the stack sends once a round, which gathers small writes
        socket.set_timeout(Some(Duration::from(HANDSHAKE)));
        socket.set_keep_alive(None);
        self.insert(socket)
    }

    fn buffer(&self, divisor: usize) -> Result<tcp::SocketBuffer<'static>, NetError> {
        let size = TCP_BUFFERS.iter().find(|(sockets, _)| self.socket_count < *sockets);
        let len = size.map_or(0, |(_, len)| *len) / divisor;
        let mut memory = Vec::new();
        memory.try_reserve_exact(len).map_err(|_| NetError::NoMemory)?;
        memory.resize(len, 0);
        Ok(tcp::SocketBuffer::new(memory))
    }

    /// The socket of an open connection.
    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sets the time-outs of an established connection.
    pub(super) fn established(&mut self, handle: SocketHandle) {
        let socket = self.tcp(handle);
        socket.set_timeout(Some(TCP_TIMEOUT));
        socket.set_keep_alive(Some(KEEP_ALIVE));
    }

    /// Closes a connection in good order, in the background.
    pub(super) fn orphan(&mut self, handle: SocketHandle, now: Instant) {
        let socket = self.tcp(handle);
        // Nobody will read what has come or comes: tell the peer (RFC 9293, 3.10.4), unless it has finished.
        if socket.can_recv() {
            socket.abort();
        } else {
            socket.close();
        }
        self.orphans.push(Orphan { handle, until: now + LINGER });
    }

    /// A local port that is not in use.
    pub(super) fn free_port(&mut self) -> u16 {
        loop {
            let port = self.next_port;
            self.next_port = if port == u16::MAX { FIRST_PORT } else { port + 1 };
            let used = self.sockets.iter().any(|(_, socket)| {
                tcp::Socket::downcast(socket)
                    .and_then(tcp::Socket::local_endpoint)
                    .is_some_and(|local| local.port == port)
            });
            if !used {
                return port;
            }
        }
    }

    // Listeners.

    /// Starts to accept connections on a port.
    pub(super) fn listen(&mut self, port: u16) -> Result<Arc<Notify>, NetError> {
        self.check_up()?;
        if port == 0 {
            return Err(NetError::Unreachable);
        }
        if self.listening.iter().any(|listening| listening.port == port) {
            return Err(NetError::PortInUse);
        }
        let ready = Arc::new(Notify::new());
        let listening = Listening { port, sockets: Vec::new(), ready: Arc::clone(&ready) };
        self.listening.push(listening);
        Ok(ready)
    }

    /// Stops accepting on a port; connections that nobody accepted are reset.
    pub(super) fn unlisten(&mut self, port: u16, now: Instant) {
        let Some(at) = self.listening.iter().position(|l| l.port == port) else { return };
        let listening = self.listening.swap_remove(at);
        for handle in listening.sockets {
            self.tcp(handle).abort();
            self.orphans.push(Orphan { handle, until: now });
        }
    }

    /// Takes a connection that is ready from a listener.
    pub(super) fn accept(&mut self, port: u16) -> Option<SocketHandle> {
        let listening = self.listening.iter_mut().find(|l| l.port == port)?;
        let sockets = &self.sockets;
        let is_ready = |handle: &SocketHandle| {
            let state = sockets.get::<tcp::Socket<'_>>(*handle).state();
            matches!(state, tcp::State::Established | tcp::State::CloseWait)
        };
        let at = listening.sockets.iter().position(is_ready)?;
        let handle = listening.sockets.remove(at);
        self.established(handle);
        Some(handle)
    }

    /// Sees to it that a socket listens on `port`, if the port accepts connections at all.
    ///
    /// Sockets are made when a request comes, so that waiting for any number of connections costs no memory.
    /// `false`: no room; the request is better lost than refused, as its sender will repeat it.
    fn prepare(&mut self, port: u16) -> bool {
        let Some(listening) = self.listening.iter_mut().find(|l| l.port == port) else {
            return true;
        };
        let sockets = &mut self.sockets;
        let listens = |handle: &SocketHandle| {
            sockets.get::<tcp::Socket<'_>>(*handle).state() == tcp::State::Listen
        };
        if listening.sockets.iter().any(listens) {
            return true;
        }
        if listening.sockets.len() >= MAX_BACKLOG {
            return false;
        }
        let Ok(handle) = self.insert_tcp() else { return false };
        if self.tcp(handle).listen(port).is_err() {
            self.remove(handle);
            return false;
        }
        if let Some(listening) = self.listening.iter_mut().find(|l| l.port == port) {
            listening.sockets.push(handle);
        }
        true
    }

    /// Tells listeners of connections that are ready, and drops those that came to nothing.
    fn tend_listeners(&mut self) {
        let mut dead = Vec::new();
        for listening in &mut self.listening {
            let mut ready = false;
            listening.sockets.retain(|handle| {
                let state = self.sockets.get::<tcp::Socket<'_>>(*handle).state();
                ready |= matches!(state, tcp::State::Established | tcp::State::CloseWait);
                let gone = matches!(
                    state,
                    tcp::State::Closed | tcp::State::TimeWait | tcp::State::LastAck
                );
                if gone {
                    dead.push(*handle);
                }
                !gone
            });
            if ready {
                listening.ready.notify();
            }
        }
        for handle in dead {
            self.remove(handle);
        }
    }

    /// Ends orphans that are closed, or that took too long.
    fn tend_orphans(&mut self, now: Instant) {
        if self.orphans.is_empty() {
            return;
        }
        let mut waiting = 0;
        let mut dead = Vec::new();
        // Newest first, so that it is the oldest that leave TIME-WAIT early.
        for at in (0..self.orphans.len()).rev() {
            let Some(Orphan { handle, until }) = self.orphans.get(at) else { continue };
            let (handle, until) = (*handle, *until);
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
            let state = socket.state();
            waiting += usize::from(state == tcp::State::TimeWait);
            // A reset that `abort` has to send yet: smoltcp forgets the addresses once it is out.
            let reset_due = socket.remote_endpoint().is_some();
            let ended = match state {
                tcp::State::Closed => !reset_due || now >= until,
                tcp::State::TimeWait => waiting > MAX_TIME_WAIT,
                _ if now >= until => {
                    socket.abort();
                    false
                }
                _ => false,
            };
            if ended {
                dead.push(handle);
                self.orphans.remove(at);
            }
        }
        for handle in dead {
            self.remove(handle);
        }
    }

    // Addresses.

    fn set_address(&mut self, address: Option<Ipv4Cidr>, gateway: Option<Ipv4Address>) {
        self.iface.update_ip_addrs(|addresses| {
            addresses.clear();
            if let Some(address) = address {
                // There is room: it was cleared.
                let _ = addresses.push(IpCidr::Ipv4(address));
            }
        });
        self.iface.routes_mut().remove_default_ipv4_route();
        if let Some(gateway) = gateway {
            // As above.
            let _ = self.iface.routes_mut().add_default_ipv4_route(gateway);
        }
    }

    fn end_dhcp(&mut self) {
        if let Some(handle) = self.dhcp.take() {
            self.remove(handle);
        }
        self.dns.clear();
    }

    pub(super) fn use_dhcp(&mut self) {
        self.end_dhcp();
        self.set_address(None, None);
        let mut socket = dhcpv4::Socket::new();
        // The server is usually on this machine, and its end of the wire may come up a moment after ours: ask again
        // soon, for a while.
        set_dhcp_patience(&mut socket, DHCP_IMPATIENCE);
        self.dhcp_hurry = Some(None);
        self.source = AddressSource::Dhcp;
        self.dhcp = self.add(socket).ok();
    }

    pub(super) fn set_static(
        &mut self,
        address: Ipv4Cidr,
        gateway: Option<Ipv4Address>,
    ) -> Result<(), NetError> {
        let unusable = |a: Ipv4Address| a.is_unspecified() || a.is_multicast() || a.is_broadcast();
        if unusable(address.address()) || gateway.is_some_and(unusable) {
            return Err(NetError::Unreachable);
        }
        self.end_dhcp();
        self.source = AddressSource::Static;
        self.set_address(Some(address), gateway);
        Ok(())
    }

    /// Takes over what DHCP learnt; whether the address changed.
    fn tend_dhcp(&mut self, name: &str, now: Instant) -> bool {
        let Some(handle) = self.dhcp else { return false };
        let socket = self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
        match socket.poll() {
            None => {
                if let Some(since) = &mut self.dhcp_hurry
                    && now >= *since.get_or_insert(now) + DHCP_HURRY
                {
                    set_dhcp_patience(socket, DHCP_PATIENCE);
                    self.dhcp_hurry = None;
                }
                false
            }
            Some(dhcpv4::Event::Deconfigured) => {
                let had = self.address().is_some();
                if had {
                    log::warn!("{name}: the DHCP lease has ended");
                }
                self.dns.clear();
                self.set_address(None, None);
                had
            }
            Some(dhcpv4::Event::Configured(config)) => {
                let (address, router) = (config.address, config.router);
                self.dns = config.dns_servers.iter().copied().collect();
                log::info!("{name}: address {address} by DHCP");
                self.set_address(Some(address), router);
                true
            }
        }
    }

    // The round.

    /// Takes what has arrived, lets the sockets send, kicks the device once, and asks for its next event.
    pub(super) fn advance(&mut self, name: &str, now: Instant) -> Round {
        let ended = Round { more: false, deadline: None, address_changed: false };
        let Some(mut phy) = self.phy.take() else { return ended };
        self.polls += 1;
        let had_failed = phy.failure().is_some();
        phy.reclaim();
        let mut received = 0;
        while received < RECEIVE_BUDGET && phy.fetch() {
            received += 1;
            if let Some(port) = phy.connection_request()
                && !self.prepare(port)
            {
                phy.refuse_current();
                continue;
            }
            self.iface.poll_ingress_single(now, &mut phy, &mut self.sockets);
        }
        self.iface.poll_maintenance(now);
        let mut sent = 0;
        while sent < SEND_BUDGET
            && self.iface.poll_egress(now, &mut phy, &mut self.sockets) != PollResult::None
        {
            sent += 1;
        }
        let address_changed = self.tend_dhcp(name, now);
        self.tend_listeners();
        self.tend_orphans(now);
        phy.kick();
        let budget_used = received == RECEIVE_BUDGET || sent == SEND_BUDGET;
        let more = budget_used || address_changed || phy.arm();
        let mut deadline = self.iface.poll_at(now, &self.sockets);
        if phy.is_congested() {
            // Room comes with an event; should the device not tell, look soon.
            deadline = Some(now + CONGESTION_DELAY);
        } else if deadline.is_some_and(|at| at <= now) {
            // Due again and again without anything to send would be a loop.
            let idle = received + sent == 0;
            deadline = Some(if idle { now + Duration::from_millis(1) } else { now });
        }
        let failed = phy.failure();
        self.phy = Some(phy);
        if let Some(error) = failed {
            if !had_failed {
                log::error!("{name}: {error}");
                self.abort_all();
            }
            return ended;
        }
        Round { more, deadline, address_changed }
    }
}

fn set_dhcp_patience(socket: &mut dhcpv4::Socket<'_>, patience: Duration) {
    let mut retry = socket.get_retry_config();
    retry.discover_timeout = patience;
    retry.initial_request_timeout = patience;
    socket.set_retry_config(retry);
}

/// The first of the ports for connections that we open (RFC 6335, 6).
const FIRST_PORT: u16 = 49_152;
