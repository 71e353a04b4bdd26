//! Networks for tasks: smoltcp over a [`NetDevice`], with futures for its sockets.
//!
//! One task per interface ([`Net::start`]) runs the stack: it is woken by the device's event, by sockets that
//! have something to send, and by the stack's own timers; each time it takes what has arrived, lets the sockets
//! send, and kicks the device once. Sockets are in [`tcp`], [`udp`] and [`icmp`].

mod checksum;
pub mod icmp;
mod phy;
mod stack;
pub mod tcp;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of the test's own")]
mod tests;
pub mod udp;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::Poll;

use janus_front::class::{NetDevice, NetProperties};
use janus_front::dma::FrameSource;
use spin::mutex::{SpinMutex, SpinMutexGuard};

pub use checksum::sum as internet_sum;
pub use smoltcp::wire::{EthernetAddress, IpAddress, IpEndpoint, Ipv4Address, Ipv4Cidr};

use crate::sync::{Notify, PlatformRelax};
use crate::{task, time};
use stack::Stack;

/// Why the network did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetError {
    /// The other end closed the connection at once, or refused it.
    Reset,
    /// The connection (or our half of it) has been closed.
    Closed,
    /// Nobody answered in time.
    TimedOut,
    /// The port is in use here.
    PortInUse,
    /// No such address can be reached (no address of our own, no route, port 0).
    Unreachable,
    /// No memory, or more sockets than allowed.
    NoMemory,
    /// The message is longer than the socket's buffer.
    TooLong,
    /// The interface is gone, or its other side broke the protocol.
    Down,
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "connection reset or refused",
            Self::Closed => "connection closed",
            Self::TimedOut => "no answer in time",
            Self::PortInUse => "port in use",
            Self::Unreachable => "address not reachable",
            Self::NoMemory => "no memory for another socket",
            Self::TooLong => "message too long",
            Self::Down => "network interface down",
        })
    }
}

impl core::error::Error for NetError {}

/// Counts of an interface, since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Frames received.
    pub received: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Received frames that came in several parts and were copied together.
    pub received_joined: u64,
    /// Received frames dropped for a wrong checksum or length.
    pub received_bad: u64,
    /// Received frames dropped for want of room.
    pub received_dropped: u64,
    /// Frames sent.
    pub sent: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Frames sent that the device cuts into segments.
    pub sent_long: u64,
    /// Frames lost for want of buffers.
    pub sent_dropped: u64,
    /// Frames that had to wait for room in the device's queue.
    pub queue_full: u64,
    /// Kicks: each made any number of frames visible.
    pub kicks: u64,
    /// Events (interrupts) of the device.
    pub events: u64,
    /// Rounds of the stack.
    pub polls: u64,
}

/// Where an interface's address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSource {
    /// No address was configured.
    None,
    /// Asked for by DHCP; it may not have come yet.
    Dhcp,
    /// Given by the command line or a command.
    Static,
}

/// What the shell shows of an interface.
#[derive(Clone, Debug)]
pub struct NetStatus {
    /// The device's facts.
    pub properties: NetProperties,
    /// Whether long frames are cut by the device.
    pub tso: bool,
    /// Whether the peer reports a link.
    pub link_up: bool,
    /// Why the interface no longer works: the rule that its other side broke, or its end.
    pub failure: Option<&'static str>,
    /// The address.
    pub address: Option<Ipv4Cidr>,
    /// The default gateway.
    pub gateway: Option<Ipv4Address>,
    /// Name servers that DHCP told.
    pub dns: Vec<Ipv4Address>,
    /// Where the address comes from.
    pub source: AddressSource,
    /// Sockets of all kinds.
    pub sockets: usize,
    /// The counts.
    pub counters: NetCounters,
}

/// A network interface with its stack.
pub struct Net {
    name: String,
    stack: SpinMutex<Stack, PlatformRelax>,
    /// There is work for the interface's task.
    work: Notify,
    /// The address changed.
    address_changed: Notify,
    events: AtomicU64,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Net({})", self.name)
    }
}

/// smoltcp's clock.
fn stack_now() -> smoltcp::time::Instant {
    let micros = time::now().as_nanos() / 1000;
    smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

fn from_stack(at: smoltcp::time::Instant) -> time::Instant {
    let micros = u64::try_from(at.total_micros()).unwrap_or(0);
    time::Instant::from_nanos(micros.saturating_mul(1000))
}

impl Net {
    /// Takes a connected device over and starts the task that serves it. `seed` makes TCP's initial sequence
    /// numbers and DHCP's transaction ids unpredictable.
    pub fn start(
        name: String,
        device: Box<dyn NetDevice>,
        frames: &'static dyn FrameSource,
        seed: u64,
    ) -> Arc<Self> {
        let net = Arc::new(Self {
            name,
            stack: SpinMutex::new(Stack::new(device, frames, seed, stack_now())),
            work: Notify::new(),
            address_changed: Notify::new(),
            events: AtomicU64::new(0),
        });
        net.work.notify();
        drop(task::spawn("net", Arc::clone(&net).serve()));
        net
    }

    /// To be called on the device's interrupt or event, from interrupt context.
    pub fn interrupt(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
        self.work.notify();
    }

    /// The device is going away: all sockets fail with [`NetError::Down`] or as after a reset.
    pub fn detach(&self) {
        let device = self.lock().detach();
        drop(device);
        self.work.notify();
        self.address_changed.notify_all();
    }

    fn lock(&self) -> SpinMutexGuard<'_, Stack, PlatformRelax> {
        self.stack.lock()
    }

    async fn serve(self: Arc<Self>) {
        loop {
            let deadline = loop {
                let round = {
                    let mut stack = self.lock();
                    let round = stack.advance(&self.name, stack_now());
                    if stack.is_detached() {
                        return;
                    }
                    round
                };
                if round.address_changed {
                    self.address_changed.notify_all();
                }
                if !round.more {
                    break round.deadline;
                }
                task::yield_now().await;
            };
            match deadline {
                None => self.work.notified().await,
                Some(at) => {
                    // Either will do: what there is to do shows in the next round.
                    task::select(self.work.notified(), time::sleep_until(from_stack(at))).await;
                }
            }
        }
    }

    /// The name it was registered under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the shell shows.
    #[must_use]
    pub fn status(&self) -> NetStatus {
        let mut status = self.lock().status();
        status.counters.events = self.events.load(Ordering::Relaxed);
        status
    }

    /// The address, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<Ipv4Cidr> {
        self.lock().address()
    }

    /// Asks for an address by DHCP, now and whenever the lease ends.
    pub fn use_dhcp(&self) {
        self.lock().use_dhcp();
        self.work.notify();
    }

    /// Sets a fixed address.
    ///
    /// # Errors
    /// [`NetError::Unreachable`] for an address that no host can have, or a gateway that is not one.
    pub fn set_static(
        &self,
        address: Ipv4Cidr,
        gateway: Option<Ipv4Address>,
    ) -> Result<(), NetError> {
        self.lock().set_static(address, gateway)?;
        self.work.notify();
        self.address_changed.notify_all();
        Ok(())
    }

    /// Waits until there is an address.
    ///
    /// # Errors
    /// [`NetError::Down`] when there will be none.
    pub async fn configured(&self) -> Result<Ipv4Cidr, NetError> {
        loop {
            let mut signal = pin!(self.address_changed.notified());
            let found = poll_fn(|cx| {
                // First into the queue of waiters, then the look.
                let signalled = signal.as_mut().poll(cx);
                let stack = self.lock();
                if stack.is_detached() {
                    return Poll::Ready(Some(Err(NetError::Down)));
                }
                match stack.address() {
                    Some(address) => Poll::Ready(Some(Ok(address))),
                    None => signalled.map(|()| None),
                }
            })
            .await;
            if let Some(result) = found {
                return result;
            }
        }
    }
}
