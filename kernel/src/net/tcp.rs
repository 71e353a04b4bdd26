//! TCP connections: [`Listener`], [`connect`], [`Stream`].
//!
//! Methods take `&self`: one task may read while another writes the same stream, in an `Arc`.

use alloc::sync::Arc;
use core::fmt;
use core::future::poll_fn;
use core::task::Poll;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::IpEndpoint;

use super::{Net, NetError, stack_now};
use crate::sync::Notify;

/// A port on which connections are accepted; closing it (dropping) resets those that nobody accepted.
#[derive(Debug)]
pub struct Listener {
    net: Arc<Net>,
    port: u16,
    ready: Arc<Notify>,
}

impl Listener {
    /// Starts to accept connections on `port` of all addresses of the interface.
    ///
    /// # Errors
    /// [`NetError::PortInUse`], [`NetError::Unreachable`] for port 0, [`NetError::Down`].
    pub fn bind(net: &Arc<Net>, port: u16) -> Result<Self, NetError> {
        let ready = net.lock().listen(port)?;
        Ok(Self { net: Arc::clone(net), port, ready })
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// [`NetError::Down`].
    pub async fn accept(&self) -> Result<Stream, NetError> {
        loop {
            {
                let mut stack = self.net.lock();
                stack.check_up()?;
                if let Some(handle) = stack.accept(self.port) {
                    drop(stack);
                    self.ready.notify(); // there may be another one, for another task
                    return Ok(Stream { net: Arc::clone(&self.net), handle });
                }
            }
            self.ready.notified().await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.net.lock().unlisten(self.port, stack_now());
        self.net.work.notify();
    }
}

/// Opens a connection.
///
/// # Errors
/// [`NetError`]: refused, no answer, no route.
pub async fn connect(net: &Arc<Net>, remote: impl Into<IpEndpoint>) -> Result<Stream, NetError> {
    let remote = remote.into();
    let stream = {
        let mut stack = net.lock();
        if stack.address().is_none() {
            stack.check_up()?;
            return Err(NetError::Unreachable);
        }
        let handle = stack.add_tcp()?;
        let port = stack.free_port();
        let stack = &mut *stack;
        let socket: &mut tcp::Socket<'_> = stack.sockets.get_mut(handle);
        if socket.connect(stack.iface.context(), remote, port).is_err() {
            stack.remove(handle);
            return Err(NetError::Unreachable);
        }
        Stream { net: Arc::clone(net), handle }
    };
    net.work.notify();
    let start = crate::time::now();
    poll_fn(|cx| {
        let mut stack = stream.net.lock();
        let up = stack.check_up();
        let socket = stack.tcp(stream.handle);
        match socket.state() {
            tcp::State::SynSent | tcp::State::SynReceived => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            tcp::State::Closed => Poll::Ready(Err(match up {
                Err(error) => error,
                // A refusal comes with a packet, silence with the time-out.
                Ok(()) if start.elapsed() >= super::stack::HANDSHAKE => NetError::TimedOut,
                Ok(()) => NetError::Reset,
            })),
            _ => {
                stack.established(stream.handle);
                Poll::Ready(Ok(()))
            }
        }
    })
    .await?;
    Ok(stream)
}

/// A connection. Dropping it sends what is left and closes it in the background.
pub struct Stream {
    net: Arc<Net>,
    handle: SocketHandle,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.handle)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.net.lock().orphan(self.handle, stack_now());
        self.net.work.notify();
    }
}

impl Stream {
    /// The other end.
    #[must_use]
    pub fn peer(&self) -> Option<IpEndpoint> {
        self.net.lock().tcp(self.handle).remote_endpoint()
    }

    /// Reads what has arrived into `buf`, waiting for the first byte; 0: the peer has finished, or `buf` is empty.
    ///
    /// # Errors
    /// [`NetError::Reset`], [`NetError::Down`].
    pub async fn read(&self, buf: &mut [u8]) -> Result<usize, NetError> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.read_with(|data| {
            let len = data.len().min(buf.len());
            if let (Some(to), Some(from)) = (buf.get_mut(..len), data.get(..len)) {
                to.copy_from_slice(from);
            }
            (len, len)
        })
        .await
        .map(|len| len.unwrap_or(0))
    }

    /// Shows `f` the next bytes that have arrived, in place; it answers how many it used, and a result.
    /// `None`: the peer has finished.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_with<R>(
        &self,
        mut f: impl FnMut(&[u8]) -> (usize, R),
    ) -> Result<Option<R>, NetError> {
        poll_fn(|cx| {
            let mut stack = self.net.lock();
            let up = stack.check_up();
            let socket = stack.tcp(self.handle);
            if socket.can_recv() {
                let capacity = socket.recv_capacity();
                let before = socket.recv_queue();
                let result = socket.recv(|data| f(data)).map_err(|_| NetError::Reset)?;
                let after = socket.recv_queue();
                drop(stack);
                // The peer may wait for room: tell it when much has come free.
                if before > capacity / 2 && after <= capacity / 2
                    || after == 0 && before > capacity / 4
                {
                    self.net.work.notify();
                }
                return Poll::Ready(Ok(Some(result)));
            }
            if socket.may_recv() {
                socket.register_recv_waker(cx.waker());
                return Poll::Pending;
            }
            match socket.recv(|_| (0, ())) {
                Err(tcp::RecvError::Finished) => Poll::Ready(Ok(None)),
                // Not `Finished`, yet closed: by a reset, a time-out, or the interface's end.
                _ => Poll::Ready(Err(up.err().unwrap_or(NetError::Reset))),
            }
        })
        .await
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// [`NetError::Closed`] when the peer finishes early; as [`Self::read`].
    pub async fn read_exact(&self, buf: &mut [u8]) -> Result<(), NetError> {
        let mut rest = buf;
        while !rest.is_empty() {
            let len = self.read(rest).await?;
            if len == 0 {
                return Err(NetError::Closed);
            }
            rest = rest.split_at_mut_checked(len).map(|(_, rest)| rest).unwrap_or_default();
        }
        Ok(())
    }

    /// Takes as much of `data` as there is room for, waiting for some; answers how much.
    ///
    /// # Errors
    /// [`NetError::Reset`], [`NetError::Closed`] after [`Self::finish`], [`NetError::Down`].
    pub async fn write(&self, data: &[u8]) -> Result<usize, NetError> {
        self.write_with(|room| {
            let len = room.len().min(data.len());
            if let (Some(to), Some(from)) = (room.get_mut(..len), data.get(..len)) {
                to.copy_from_slice(from);
            }
            (len, len)
        })
        .await
    }

    /// Shows `f` the room for bytes to send, in place; it answers how many it filled in, and a result.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_with<R>(
        &self,
        mut f: impl FnMut(&mut [u8]) -> (usize, R),
    ) -> Result<R, NetError> {
        poll_fn(|cx| {
            let mut stack = self.net.lock();
            let up = stack.check_up();
            let socket = stack.tcp(self.handle);
            if socket.can_send() {
                let result = socket.send(&mut f).map_err(|_| NetError::Closed)?;
                drop(stack);
                self.net.work.notify();
                return Poll::Ready(Ok(result));
            }
            if socket.may_send() {
                socket.register_send_waker(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(Err(up.err().unwrap_or(if socket.is_open() {
                NetError::Closed
            } else {
                NetError::Reset
            })))
        })
        .await
    }

    /// Sends all of `data` (it may still be on its way when this ends: see [`Self::flush`]).
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_all(&self, data: &[u8]) -> Result<(), NetError> {
        let mut rest = data;
        while !rest.is_empty() {
            let len = self.write(rest).await?;
            rest = rest.get(len..).unwrap_or_default();
        }
        Ok(())
    }

    /// Waits until the peer has acknowledged everything.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn flush(&self) -> Result<(), NetError> {
        self.wait_sent(|socket| socket.send_queue() == 0).await
    }

    /// Says that nothing more will be sent; reading goes on.
    pub fn finish(&self) {
        self.net.lock().tcp(self.handle).close();
        self.net.work.notify();
    }

    /// Finishes, and waits until the peer has acknowledged everything and the end.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn close(self) -> Result<(), NetError> {
        self.finish();
        self.wait_sent(|socket| {
            socket.send_queue() == 0
                && matches!(
                    socket.state(),
                    tcp::State::FinWait2 | tcp::State::TimeWait | tcp::State::Closed
                )
        })
        .await
    }

    /// Breaks the connection off with a reset.
    pub fn abort(self) {
        self.net.lock().tcp(self.handle).abort();
    }

    async fn wait_sent(&self, done: impl Fn(&tcp::Socket<'_>) -> bool) -> Result<(), NetError> {
        poll_fn(|cx| {
            let mut stack = self.net.lock();
            let up = stack.check_up();
            let socket = stack.tcp(self.handle);
            if done(socket) {
                return Poll::Ready(up);
            }
            if !socket.is_open() {
                return Poll::Ready(Err(up.err().unwrap_or(NetError::Reset)));
            }
            socket.register_send_waker(cx.waker());
            Poll::Pending
        })
        .await
    }
}
