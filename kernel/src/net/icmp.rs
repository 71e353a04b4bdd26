//! Ping: ICMP echo (RFC 792). Requests from others are answered by the stack itself.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::future::poll_fn;
use core::sync::atomic::{AtomicU16, Ordering};
use core::task::Poll;
use core::time::Duration;

use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, Ipv4Address};

use super::{Net, NetError};
use crate::time;

static NEXT_IDENT: AtomicU16 = AtomicU16::new(0x4A61);

/// Echo requests to one host, answers matched by sequence number.
#[derive(Debug)]
pub struct Ping {
    net: Arc<Net>,
    handle: SocketHandle,
    to: Ipv4Address,
    ident: u16,
    next_sequence: u16,
}

/// The longest data of a request that fits the usual MTU.
const MAX_DATA: usize = 1472;

impl Ping {
    /// Prepares to ping `to`.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(net: &Arc<Net>, to: Ipv4Address) -> Result<Self, NetError> {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 16 * 1024]);
        let ident = NEXT_IDENT.fetch_add(1, Ordering::Relaxed);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(ident)).map_err(|_| NetError::Unreachable)?;
        let mut stack = net.lock();
        stack.check_up()?;
        if stack.address().is_none() || to.is_unspecified() {
            return Err(NetError::Unreachable);
        }
        let handle = stack.add(socket)?;
        drop(stack);
        Ok(Self { net: Arc::clone(net), handle, to, ident, next_sequence: 0 })
    }

    /// Sends one request with `len` bytes of data (cut to 1472) and waits for its answer; answers the time between.
    ///
    /// # Errors
    /// [`NetError::TimedOut`], [`NetError::Down`].
    pub async fn send(&mut self, len: usize, limit: Duration) -> Result<Duration, NetError> {
        let sequence = self.next_sequence;
        self.next_sequence = sequence.wrapping_add(1);
        let data: Vec<u8> = (0..=u8::MAX).cycle().take(len.min(MAX_DATA)).collect();
        let request = Icmpv4Repr::EchoRequest { ident: self.ident, seq_no: sequence, data: &data };
        let checksums = ChecksumCapabilities::default();
        let start = time::now();
        {
            let mut stack = self.net.lock();
            stack.check_up()?;
            let socket: &mut icmp::Socket<'_> = stack.sockets.get_mut(self.handle);
            let packet = socket
                .send(request.buffer_len(), IpAddress::Ipv4(self.to))
                .map_err(|_| NetError::NoMemory)?;
            request.emit(&mut Icmpv4Packet::new_unchecked(packet), &checksums);
        }
        self.net.work.notify();
        let answer = poll_fn(|cx| {
            let mut stack = self.net.lock();
            stack.check_up()?;
            let socket: &mut icmp::Socket<'_> = stack.sockets.get_mut(self.handle);
            while let Ok((packet, from)) = socket.recv() {
                let reply = Icmpv4Packet::new_checked(packet)
                    .and_then(|packet| Icmpv4Repr::parse(&packet, &checksums));
                if let Ok(Icmpv4Repr::EchoReply { ident, seq_no, data: answered }) = reply
                    && (ident, seq_no, from) == (self.ident, sequence, IpAddress::Ipv4(self.to))
                    && answered == data
                {
                    return Poll::Ready(Ok(start.elapsed()));
                }
            }
            socket.register_recv_waker(cx.waker());
            Poll::Pending
        });
        time::timeout(limit, answer).await.unwrap_or(Err(NetError::TimedOut))
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        self.net.lock().remove(self.handle);
    }
}
