//! A guest made of smoltcp, directly on the backend: no card, no kernel.

use std::net::Ipv4Addr;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use janus::netback::{Accepts, Frame, Gso, NetBackend};
use janus::usernet::{Config, GATEWAY, LEASE, UserNet, UserNetBackend};
use janus_proto::abi::xen_io::netif::GsoType;
use smoltcp::iface::{Config as InterfaceConfig, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

/// The longest that anything may take: only what would never end runs into it.
const FOREVER: Duration = Duration::from_secs(150);
/// The guest's address on the wire.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Bytes of a guest's TCP buffers.
const BUFFER: usize = 512 * 1024;

/// A guest that can do everything.
pub(crate) const OFFLOADS: Accepts =
    Accepts { long: true, checksum_blank: true, gso_tcpv4: true, gso_tcpv6: true };

/// Rung when there may be frames.
#[derive(Default)]
pub(crate) struct Bell(Mutex<bool>, Condvar);

impl Bell {
    fn ring(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
    fn wait(&self, most: Duration) {
        let rung = self.0.lock().unwrap();
        let (mut rung, _) = self.1.wait_timeout_while(rung, most, |rung| !*rung).unwrap();
        *rung = false;
    }
}

/// The guest's card.
pub(crate) struct Wire {
    pub(crate) backend: UserNetBackend,
    accepts: Accepts,
    mtu: usize,
    /// Frames longer than a page that came and went.
    pub(crate) long: (u64, u64),
}

pub(crate) struct Received<'a>(Frame, &'a mut UserNetBackend);
pub(crate) struct Sending<'a>(&'a mut Wire, Option<u16>);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.0.bytes);
        self.1.recycle(self.0.bytes);
        result
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = self.0.backend.buffer();
        bytes.resize(len, 0);
        let result = f(&mut bytes);
        let gso = self.1.map(|size| Gso { size, kind: GsoType::TCPV4 });
        assert!(gso.is_some() || len <= self.0.mtu + 14, "a long frame that nobody cuts");
        self.0.long.1 += u64::from(gso.is_some());
        let checksum_blank = self.0.accepts.checksum_blank;
        self.0.backend.send(Frame { bytes, checksum_blank, validated: false, gso });
        result
    }
    fn set_meta(&mut self, meta: PacketMeta) {
        self.1 = meta.segmentation_offload_size.map(core::num::NonZeroU16::get);
    }
}

/// smoltcp wants both tokens at once; the second one is for answers, which go through a copy of the backend's end.
pub(crate) struct Answer<'a>(std::marker::PhantomData<&'a ()>, Arc<Mutex<Vec<Vec<u8>>>>);

impl TxToken for Answer<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.1.lock().unwrap().push(bytes);
        result
    }
}

pub(crate) enum Either<'a> {
    Now(Sending<'a>),
    Later(Answer<'a>),
}

impl TxToken for Either<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        match self {
            Self::Now(token) => token.consume(len, f),
            Self::Later(token) => token.consume(len, f),
        }
    }
    fn set_meta(&mut self, meta: PacketMeta) {
        if let Self::Now(token) = self {
            token.set_meta(meta);
        }
    }
}

/// The card with the answers that wait.
pub(crate) struct Card {
    pub(crate) wire: Wire,
    answers: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Device for Card {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Either<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received<'_>, Either<'_>)> {
        for bytes in std::mem::take(&mut *self.answers.lock().unwrap()) {
            let checksum_blank = self.wire.accepts.checksum_blank;
            self.wire.backend.send(Frame { bytes, checksum_blank, ..Frame::default() });
        }
        let frame = self.wire.backend.receive()?;
        let accepts = self.wire.accepts;
        assert!(!frame.checksum_blank || accepts.checksum_blank, "a checksum is missing");
        assert!(frame.gso.is_none() || accepts.gso_tcpv4, "nobody asked for a long frame");
        assert!(frame.gso.is_some() || frame.bytes.len() <= self.wire.mtu + 14, "too long");
        self.wire.long.0 += u64::from(frame.gso.is_some());
        let answer = Answer(std::marker::PhantomData, Arc::clone(&self.answers));
        Some((Received(frame, &mut self.wire.backend), Either::Later(answer)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Either<'_>> {
        Some(Either::Now(Sending(&mut self.wire, None)))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.wire.mtu + 14;
        if self.wire.accepts.checksum_blank {
            capabilities.checksum.tcp = Checksum::None;
            capabilities.checksum.udp = Checksum::None;
        }
        if self.wire.accepts.gso_tcpv4 {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(65_535);
        }
        capabilities
    }
}

/// See the module.
pub(crate) struct Guest {
    pub(crate) net: UserNet,
    pub(crate) card: Card,
    pub(crate) iface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    bell: Arc<Bell>,
    start: Instant,
}

impl Guest {
    /// A guest without an address.
    pub(crate) fn bare(config: Config, accepts: Accepts) -> Self {
        let bell = Arc::new(Bell::default());
        let ring = Arc::clone(&bell);
        let mtu = usize::from(config.mtu);
        let (net, mut backend) = UserNet::start(config, Arc::new(move || ring.ring())).unwrap();
        backend.connected(accepts);
        let wire = Wire { backend, accepts, mtu, long: (0, 0) };
        let mut card = Card { wire, answers: Arc::default() };
        let (iface, sockets) = (interface(&mut card), SocketSet::new(Vec::new()));
        Self { net, card, iface, sockets, bell, start: Instant::now() }
    }

    /// A guest with the address that DHCP would give.
    pub(crate) fn new(config: Config, accepts: Accepts) -> Self {
        let mut guest = Self::bare(config, accepts);
        guest.set_address(LEASE);
        guest
    }

    pub(crate) fn set_address(&mut self, address: Ipv4Addr) {
        self.iface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address, 24))).unwrap();
        });
        self.iface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
    }

    /// Starts over, as a guest that was switched off and on.
    pub(crate) fn restart(&mut self) {
        self.card.wire.backend.connected(self.card.wire.accepts);
        self.iface = interface(&mut self.card);
        self.sockets = SocketSet::new(Vec::new());
        self.set_address(LEASE);
    }

    pub(crate) fn now(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(
            i64::try_from(self.start.elapsed().as_micros()).unwrap(),
        )
    }

    /// Does all that can be done: frames that were sent may have brought answers.
    fn poll(&mut self) -> bool {
        let mut any = false;
        loop {
            let now = self.now();
            if self.iface.poll(now, &mut self.card, &mut self.sockets) == PollResult::None {
                return any;
            }
            any = true;
        }
    }

    /// Runs the guest until `done` says something.
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            let before = self.poll();
            if let Some(result) = done(self) {
                self.poll();
                return result;
            }
            // What `done` did may have made room.
            let after = self.poll();
            assert!(start.elapsed() < FOREVER, "it never happens: {what}");
            if before || after {
                continue;
            }
            let now = self.now();
            let delay = self.iface.poll_delay(now, &self.sockets);
            let most = Duration::from_millis(50);
            self.bell.wait(delay.map_or(most, |delay| most.min(delay.into())));
        }
    }

    pub(crate) fn add_tcp(&mut self) -> SocketHandle {
        self.add_tcp_with(BUFFER)
    }

    pub(crate) fn add_tcp_with(&mut self, size: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; size]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub(crate) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Begins a connection.
    pub(crate) fn connect(&mut self, to: (Ipv4Addr, u16), from: u16) -> SocketHandle {
        let handle = self.add_tcp();
        self.connect_with(handle, to, from);
        handle
    }

    pub(crate) fn connect_with(&mut self, handle: SocketHandle, to: (Ipv4Addr, u16), from: u16) {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.iface.context(), to, from).unwrap();
    }

    /// A frame of any content.
    pub(crate) fn send_raw(&mut self, bytes: Vec<u8>) {
        self.card.wire.backend.send(Frame { bytes, ..Frame::default() });
    }
}

fn interface(card: &mut Card) -> Interface {
    let mut config = InterfaceConfig::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
    config.random_seed =
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |t| t.subsec_nanos().into());
    Interface::new(config, card, smoltcp::time::Instant::ZERO)
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(start: usize, buf: &mut [u8]) {
    for (index, byte) in (start..).zip(buf.iter_mut()) {
        [_, _, *byte, ..] = index.wrapping_mul(0x9E37_79B1).to_le_bytes();
    }
}

/// An IPv4 packet in a frame.
pub(crate) fn frame(source: [u8; 4], to: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x52, 0x55, 10, 0, 2, 2];
    bytes.extend(MAC);
    bytes.extend([8, 0]);
    let len = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    ip.extend(source);
    ip.extend(to);
    let sum = !smoltcp::wire::checksum::data(&ip);
    ip.splice(10..12, sum.to_be_bytes());
    bytes.extend(ip);
    bytes.extend(payload);
    bytes
}

/// A TCP header.
pub(crate) fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut bytes = from.to_be_bytes().to_vec();
    bytes.extend(to.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, flags, 255, 255, 0, 0, 0, 0]);
    bytes
}
