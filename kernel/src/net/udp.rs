//! UDP sockets.

use alloc::sync::Arc;
use alloc::vec;
use core::fmt;
use core::future::poll_fn;
use core::task::Poll;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::wire::IpEndpoint;

use super::{Net, NetError};

/// Datagrams that may wait in each direction, and the bytes they may take.
const DATAGRAMS: usize = 64;
const BYTES: usize = 128 * 1024;

/// A port for datagrams.
pub struct Socket {
    net: Arc<Net>,
    handle: SocketHandle,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "udp::Socket({:?})", self.handle)
    }
}

fn buffer() -> udp::PacketBuffer<'static> {
    udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; DATAGRAMS], vec![0; BYTES])
}

impl Socket {
    /// Opens a port of all addresses of the interface.
    ///
    /// # Errors
    /// [`NetError::Unreachable`] for port 0, [`NetError::PortInUse`], [`NetError::NoMemory`], [`NetError::Down`].
    pub fn bind(net: &Arc<Net>, port: u16) -> Result<Self, NetError> {
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).map_err(|_| NetError::Unreachable)?;
        let mut stack = net.lock();
        let used = stack.sockets.iter().any(|(_, other)| {
            smoltcp::socket::AnySocket::downcast(other)
                .is_some_and(|other: &udp::Socket<'_>| other.endpoint().port == port)
        });
        if used {
            return Err(NetError::PortInUse);
        }
        let handle = stack.add(socket)?;
        drop(stack);
        Ok(Self { net: Arc::clone(net), handle })
    }

    /// Sends a datagram, waiting for room for it.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn send_to(&self, data: &[u8], to: impl Into<IpEndpoint>) -> Result<(), NetError> {
        let to = to.into();
        if data.len() > BYTES {
            return Err(NetError::TooLong);
        }
        poll_fn(|cx| {
            let mut stack = self.net.lock();
            stack.check_up()?;
            // IP datagrams are not cut here.
            if data.len() + 28 > usize::from(stack.mtu()) {
                return Poll::Ready(Err(NetError::TooLong));
            }
            let socket: &mut udp::Socket<'_> = stack.sockets.get_mut(self.handle);
            let result = match socket.send_slice(data, to) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(udp::SendError::Unaddressable) => Poll::Ready(Err(NetError::Unreachable)),
                Err(udp::SendError::BufferFull) => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
            };
            drop(stack);
            self.net.work.notify();
            result
        })
        .await
    }

    /// Waits for a datagram; answers its length (cut to `buf`'s) and its sender.
    ///
    /// # Errors
    /// [`NetError::Down`].
    pub async fn recv_from(&self, buf: &mut [u8]) -> Result<(usize, IpEndpoint), NetError> {
        poll_fn(|cx| {
            let mut stack = self.net.lock();
            stack.check_up()?;
            let socket: &mut udp::Socket<'_> = stack.sockets.get_mut(self.handle);
            match socket.recv() {
                Ok((data, meta)) => {
                    let len = data.len().min(buf.len());
                    if let (Some(to), Some(from)) = (buf.get_mut(..len), data.get(..len)) {
                        to.copy_from_slice(from);
                    }
                    Poll::Ready(Ok((len, meta.endpoint)))
                }
                Err(_) => {
                    socket.register_recv_waker(cx.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.net.lock().remove(self.handle);
    }
}
