//! smoltcp's device: one frame in, one frame out, no queue.

use std::num::NonZeroUsize;

use janus_proto::abi::xen_io::netif::GsoType;
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::frames::{self, BROADCAST_MAC, Buffers, ETHERNET, ETHERTYPE_IPV4, LONG_FRAME, Mac};
use crate::netback::{Accepts, Frame, Gso};

/// See the module. smoltcp sees IP packets only.
#[derive(Debug)]
pub(super) struct Phy {
    /// A frame of the guest, and the bytes of IP in it.
    input: Option<(Vec<u8>, usize)>,
    /// Its buffer when smoltcp is done with it.
    used: Option<Vec<u8>>,
    output: Output,
    mtu: u16,
}

#[derive(Debug)]
struct Output {
    frame: Option<Frame>,
    buffers: Buffers,
    accepts: Accepts,
    /// Where the guest is on the wire.
    guest: Mac,
}

impl Phy {
    pub(super) fn new(mtu: u16) -> Self {
        let (buffers, accepts) = (Buffers::default(), Accepts::default());
        let output = Output { frame: None, buffers, accepts, guest: BROADCAST_MAC };
        Self { input: None, used: None, output, mtu }
    }

    pub(super) fn buffers(&mut self) -> &mut Buffers {
        &mut self.output.buffers
    }
    pub(super) fn accepts(&self) -> Accepts {
        self.output.accepts
    }
    pub(super) fn set_accepts(&mut self, accepts: Accepts) {
        self.output.accepts = accepts;
    }
    pub(super) fn set_guest(&mut self, guest: Mac) {
        self.output.guest = guest;
    }

    /// Has smoltcp see a frame, of whose payload `len` bytes are the packet, next.
    pub(super) fn put(&mut self, frame: Vec<u8>, len: usize) {
        self.input = Some((frame, len));
    }

    /// The frame that smoltcp sent.
    pub(super) fn take(&mut self) -> Option<Frame> {
        if let Some(buf) = self.used.take() {
            self.output.buffers.put(buf);
        }
        self.output.frame.take()
    }
}

#[derive(Debug)]
pub(super) struct RxToken<'a> {
    frame: Vec<u8>,
    len: usize,
    used: &'a mut Option<Vec<u8>>,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(self.frame.get(ETHERNET..ETHERNET + self.len).unwrap_or_default());
        *self.used = Some(self.frame);
        result
    }
}

#[derive(Debug)]
pub(super) struct TxToken<'a> {
    output: &'a mut Output,
    mss: Option<u16>,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = self.output.buffers.take();
        // A buffer that was used before is written over: zeroes first would cost as much as the frame.
        bytes.resize(ETHERNET + len, 0);
        if let Some(header) = bytes.first_chunk_mut() {
            *header = frames::header_to(self.output.guest, ETHERTYPE_IPV4);
        }
        let result = f(bytes.get_mut(ETHERNET..).unwrap_or_default());
        let checksum_blank = self.output.accepts.checksum_blank;
        frames::fill_checksum(&mut bytes, checksum_blank);
        let gso = self.mss.map(|size| Gso { size, kind: GsoType::TCPV4 });
        self.output.frame = Some(Frame { bytes, checksum_blank, validated: true, gso });
        result
    }
    fn set_meta(&mut self, meta: PacketMeta) {
        self.mss = meta.segmentation_offload_size.map(std::num::NonZeroU16::get);
    }
}

impl phy::Device for Phy {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        let (frame, len) = self.input.take()?;
        let receive = RxToken { frame, len, used: &mut self.used };
        Some((receive, TxToken { output: &mut self.output, mss: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        let free = self.output.frame.is_none();
        free.then_some(TxToken { output: &mut self.output, mss: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(self.mtu);
        // Nothing is lost or changed between here and the guest; what goes to it gets its checksum in TxToken.
        capabilities.checksum.tcp = Checksum::None;
        if self.output.accepts.gso_tcpv4 {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LONG_FRAME - ETHERNET);
        }
        capabilities
    }
}
