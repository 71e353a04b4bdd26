//! The console (virtio 1.2, 5.3), port 0, in front of the same daemon as Xen's console.
//!
//! That daemon serves a page with two rings of bytes, and an event channel. So the device has a page of its own, and is
//! the guest of the daemon: terminals, files, sockets, bounds and escapes are the daemon's.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use janus_proto::abi::virtio::DeviceId;
use janus_proto::abi::virtio::console::{QUEUE_RECEIVE, QUEUE_TRANSMIT};
use janus_proto::abi::xen::Errno;
use janus_proto::addr::{DomId, GrantRef, PAGE_SIZE, Port};
use janus_proto::byte_ring::{ByteRing, ByteRingError, CONSOLE};
use janus_proto::grant::Access;
use janus_proto::virtqueue::QueueError;

use super::Model;
use super::device::Waker;
use super::queue::{Chain, Queue};
use crate::host::{Guest, Notify};
use crate::memory::{GrantMapper, MapError};
use crate::pv::events::Handler;

/// Entries of a queue.
const SIZES: [u16; 2] = [64; 2];
/// Bytes moved at once.
const STEP: usize = 1024;

/// The page between device and daemon.
#[derive(Clone, Debug)]
pub struct Page(Arc<[AtomicU32]>);

impl Deref for Page {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        &self.0
    }
}

struct Wire {
    page: Page,
    ring: Mutex<ByteRing<Page>>,
    /// Has the daemon look at the page.
    daemon: OnceLock<Handler>,
    waker: OnceLock<Waker>,
}

/// The daemon's side of the device: what it takes for a guest.
#[derive(Clone)]
pub struct ConsoleGuest(Arc<Wire>);

impl fmt::Debug for ConsoleGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleGuest")
    }
}

impl ConsoleGuest {
    /// The page.
    #[must_use]
    pub fn page(&self) -> Page {
        self.0.page.clone()
    }
}

impl GrantMapper for ConsoleGuest {
    type Mapping = Page;
    fn map(&self, _grants: &[GrantRef], _access: Access) -> Result<Page, MapError> {
        Ok(self.page())
    }
}

/// The daemon tells the device that something moved.
pub struct ConsolePort(Arc<Wire>);

impl fmt::Debug for ConsolePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsolePort")
    }
}

impl Notify for ConsolePort {
    fn notify(&self) {
        if let Some(waker) = self.0.waker.get() {
            waker.wake(QUEUE_TRANSMIT);
            waker.wake(QUEUE_RECEIVE);
        }
    }
    fn guest_port(&self) -> Port {
        Port(0)
    }
}

impl Guest for ConsoleGuest {
    type Grants = Self;
    type Port = ConsolePort;
    fn id(&self) -> DomId {
        DomId(0)
    }
    fn grants(&self) -> Self {
        self.clone()
    }
    fn bind(&self, handler: Handler) -> Result<ConsolePort, Errno> {
        self.0.daemon.set(handler).map_err(|_| Errno::EEXIST)?;
        Ok(ConsolePort(Arc::clone(&self.0)))
    }
    fn bind_interdomain(&self, _port: Port, _handler: Handler) -> Result<ConsolePort, Errno> {
        Err(Errno::EINVAL)
    }
}

/// The console device.
pub struct Console {
    wire: Arc<Wire>,
    /// Output that the daemon had no room for, and how much of it is done.
    held: Mutex<Option<(Chain, u32)>>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// A device, and the daemon's side of it.
    ///
    /// # Errors
    /// None that can happen: the page is as long as a ring's has to be.
    pub fn new() -> Result<(Self, ConsoleGuest), ByteRingError> {
        let page = Page((0..PAGE_SIZE / 4).map(|_| AtomicU32::new(0)).collect());
        let ring = Mutex::new(ByteRing::front(page.clone(), CONSOLE)?);
        let wire = Wire { page, ring, daemon: OnceLock::new(), waker: OnceLock::new() };
        let wire = Arc::new(wire);
        Ok((Self { wire: Arc::clone(&wire), held: Mutex::new(None) }, ConsoleGuest(wire)))
    }

    fn ring(&self) -> MutexGuard<'_, ByteRing<Page>> {
        lock(&self.wire.ring)
    }

    fn tell_daemon(&self) {
        if let Some(daemon) = self.wire.daemon.get() {
            daemon();
        }
    }

    /// Hands output on from `done` bytes on; how much is done then.
    fn print(&self, chain: &Chain, mut done: u32) -> u32 {
        let mut bytes = [0; STEP];
        let mut told = false;
        while let Some(left) = chain.readable().checked_sub(done).filter(|left| *left > 0) {
            let part = usize::try_from(left).unwrap_or(STEP).min(STEP);
            let Some(buf) = bytes.get_mut(..part) else { break };
            if chain.read(done, buf).is_err() {
                // A buffer that is no memory prints nothing.
                return chain.readable();
            }
            // A ring that makes no sense cannot be: both ends are ours.
            let written = self.ring().write(buf).unwrap_or(part);
            done += u32::try_from(written).unwrap_or(0);
            if written > 0 {
                told = false;
            } else if told {
                break;
            } else {
                self.tell_daemon();
                told = true;
            }
        }
        done
    }

    fn transmit(&self, queue: &mut Queue) -> Result<(), QueueError> {
        loop {
            let held = lock(&self.held).take();
            let (chain, done) = match held {
                Some(held) => held,
                None => match queue.pop()? {
                    Some(chain) => (chain, 0),
                    None if queue.arm()? => continue,
                    None => break,
                },
            };
            let done = self.print(&chain, done);
            if done < chain.readable() {
                *lock(&self.held) = Some((chain, done));
                break;
            }
            queue.push(chain, 0)?;
        }
        self.tell_daemon();
        Ok(())
    }

    fn receive(&self, queue: &mut Queue) -> Result<(), QueueError> {
        let mut moved = false;
        while self.ring().readable().is_ok_and(|there| there > 0) {
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.arm()? => continue,
                None => break,
            };
            let mut bytes = [0; STEP];
            let room = usize::try_from(chain.writable()).unwrap_or(STEP).min(STEP);
            let count = self.ring().read(bytes.get_mut(..room).unwrap_or_default()).unwrap_or(0);
            let typed = bytes.get(..count).unwrap_or_default();
            chain.write(0, typed).map_err(|_| QueueError::Address)?;
            queue.push(chain, u32::try_from(count).unwrap_or(0))?;
            moved = true;
        }
        if moved {
            self.tell_daemon();
        }
        Ok(())
    }
}

impl Model for Console {
    fn id(&self) -> DeviceId {
        DeviceId::CONSOLE
    }
    fn queues(&self) -> &[u16] {
        &SIZES
    }
    fn attach(&self, waker: Waker) {
        // Called once.
        let _ = self.wire.waker.set(waker);
    }
    fn stop(&self) {
        *lock(&self.held) = None;
    }
    fn serve(&self, index: u16, queue: &mut Queue) -> Result<(), QueueError> {
        match index {
            QUEUE_RECEIVE => self.receive(queue),
            _ => self.transmit(queue),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;

    /// A daemon that reads when it is told to.
    struct Daemon {
        ring: ByteRing<Page>,
        port: ConsolePort,
    }

    fn console() -> (Driver, Daemon) {
        let (console, guest) = Console::new().unwrap();
        let driver = Driver::new(Box::new(console), !(1 << 28) & 0xffff_ffff);
        let ring = ByteRing::back(guest.page(), CONSOLE).unwrap();
        let port = guest.bind(Arc::new(|| ())).unwrap();
        (driver, Daemon { ring, port })
    }

    #[test]
    fn what_is_printed_comes_out_however_long_it_is() {
        let (mut driver, mut daemon) = console();
        let text: Vec<u8> = (0..5000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        driver.put(0, &text);
        driver.send(1, &[(0, 7, false), (7, 4993, false)]);
        driver.send(1, &[(0, 1, false)]);
        let mut out: Vec<u8> = Vec::new();
        assert!(driver.used(1).is_none(), "the daemon has room for less");
        while out.len() < 5001 {
            let mut bytes = [0; 999];
            let count = daemon.ring.read(&mut bytes).unwrap();
            assert!(count > 0);
            out.extend_from_slice(&bytes[..count]);
            daemon.port.notify();
        }
        assert!(out[..5000] == text && out[5000] == 0);
        assert!(driver.used(1).is_some() && driver.used(1).is_some() && driver.used(1).is_none());
    }

    #[test]
    fn what_is_typed_waits_for_buffers() {
        let (mut driver, mut daemon) = console();
        daemon.ring.write(b"hello").unwrap();
        daemon.port.notify();
        driver.send(0, &[(0, 3, true)]);
        assert_eq!(driver.used(0).unwrap().len, 3);
        driver.send(0, &[(8, 100, true)]);
        assert_eq!(driver.used(0).unwrap().len, 2);
        assert_eq!((driver.peek(0, 3), driver.peek(8, 2)), (b"hel".to_vec(), b"lo".to_vec()));
        // Buffers first.
        driver.send(0, &[(0, 100, true)]);
        assert!(driver.used(0).is_none());
        daemon.ring.write(b"!").unwrap();
        daemon.port.notify();
        assert_eq!(driver.used(0).unwrap().len, 1);
    }

    #[test]
    fn buffers_that_are_no_memory_print_nothing() {
        let (mut driver, mut daemon) = console();
        assert_eq!(driver.ask(1, &[(1 << 40, 100, false)]), 0);
        assert_eq!(daemon.ring.read(&mut [0; 10]), Ok(0));
    }
}
