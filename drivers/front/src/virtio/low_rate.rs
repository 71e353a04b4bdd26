//! Console and entropy over the `virtio-drivers` crate's queue, on our transports.
//!
//! The crate's own console and entropy drivers wait inside (and the console one asserts what the device
//! says), so only its queue is used, without waiting. Every addition is notified: the crate's test
//! whether to notify can lose a kick ([`super::baseline`]), and at this rate it saves nothing.
// UNSAFETY: the crate's queue takes borrowed buffers that it keeps; here they are moved into a table first.
#![expect(unsafe_code, reason = "the crate's queue keeps pointers to buffers beyond the call")]

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use janus_proto::abi::virtio::{console, feature, rng};
use janus_proto::addr::PAGE_SIZE;
use virtio_drivers::queue::VirtQueue;

use super::baseline::{Adapter, DeviceFrames, FramesHal, page};
use super::{InitError, Transport};
use crate::class::{ConsoleDevice, EntropyDevice, PeerError};
use crate::dma::DmaBuf;

/// Entries of each queue: as many as QEMU's entropy source has, the smallest of these devices.
const SIZE: usize = 8;
/// Event index is left out: see the module's header.
const FEATURES: u64 = feature::VERSION_1 | feature::ACCESS_PLATFORM;

/// A queue of the crate, and the pages that are in it, by token.
#[derive(Debug)]
struct PageQueue<S: DeviceFrames> {
    queue: VirtQueue<FramesHal<S>, SIZE>,
    index: u16,
    pages: [Option<(DmaBuf, usize)>; SIZE],
    direction: Direction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    ToDevice,
    FromDevice,
}

impl<S: DeviceFrames> PageQueue<S> {
    fn new(adapter: &mut Adapter, index: u16, direction: Direction) -> Result<Self, InitError> {
        let queue =
            VirtQueue::new(adapter, index, false, false).map_err(|_| InitError::Queue(index))?;
        Ok(Self { queue, index, pages: [const { None }; SIZE], direction })
    }

    /// Gives a page to the device, of which `len` bytes count.
    fn add(&mut self, mut page: DmaBuf, len: usize, adapter: &mut Adapter) -> Result<(), DmaBuf> {
        let len = len.min(page.len());
        let Some(bytes) = page.get_mut(..len) else { return Err(page) };
        let token = match self.direction {
            // SAFETY: the page moves into the table below, where nobody reads or writes it until `pop`.
            Direction::ToDevice => unsafe { self.queue.add(&[bytes], &mut []) },
            // SAFETY: as above.
            Direction::FromDevice => unsafe { self.queue.add(&[], &mut [bytes]) },
        };
        match token.ok().and_then(|token| self.pages.get_mut(usize::from(token))) {
            Some(entry) => *entry = Some((page, len)),
            None => return Err(page), // Full, so nothing was added: tokens are below SIZE.
        }
        virtio_drivers::transport::Transport::notify(adapter, self.index);
        Ok(())
    }

    /// Takes a page back, with the number of bytes that the device wrote.
    fn pop(&mut self) -> Result<Option<(DmaBuf, usize)>, PeerError> {
        let Some(token) = self.queue.peek_used() else { return Ok(None) };
        let entry = self.pages.get_mut(usize::from(token)).and_then(Option::take);
        let Some((mut page, len)) = entry else {
            return Err(PeerError("used id that is not in flight"));
        };
        let Some(bytes) = page.get_mut(..len) else {
            return Err(PeerError("used id that is not in flight"));
        };
        let used = match self.direction {
            // SAFETY: the same buffer as was added under this token, and it has been the table's since.
            Direction::ToDevice => unsafe { self.queue.pop_used(token, &[bytes], &mut []) },
            // SAFETY: as above.
            Direction::FromDevice => unsafe { self.queue.pop_used(token, &[], &mut [bytes]) },
        };
        match used {
            Ok(written) if written as usize <= len => Ok(Some((page, written as usize))),
            Ok(_) => Err(PeerError("used length beyond the buffer")),
            Err(_) => {
                page.leak(); // The device changed its mind; it may still own the page.
                Err(PeerError("used id changed while it was read"))
            }
        }
    }
}

fn set_up(transport: Box<dyn Transport>, features: u64) -> Result<(Adapter, u64), InitError> {
    let mut adapter = Adapter::new(transport).map_err(|_| InitError::Config("device type"))?;
    let features = adapter.transport().negotiate(features)?;
    Ok((adapter, features))
}

/// A virtio console, port 0.
#[derive(Debug)]
pub struct VirtioConsole<S: DeviceFrames> {
    // Before the queues, so that the device is reset before their memory is freed.
    adapter: Reset,
    receive: PageQueue<S>,
    transmit: PageQueue<S>,
    /// Pages for output.
    idle: Vec<DmaBuf>,
    /// Received and not yet read.
    input: VecDeque<u8>,
    size: Option<(u16, u16)>,
    dead: Option<PeerError>,
}

/// Pages in each queue of a console.
const CONSOLE_PAGES: usize = 4;
/// Input that is kept while nobody reads it; more is dropped, as a terminal does.
const INPUT_LIMIT: usize = 64 * 1024;

impl<S: DeviceFrames> VirtioConsole<S> {
    /// Sets the device up.
    ///
    /// # Errors
    /// See [`InitError`].
    pub fn new(transport: Box<dyn Transport>) -> Result<Self, InitError> {
        let (mut adapter, features) = set_up(transport, FEATURES | console::F_SIZE)?;
        let receive = PageQueue::new(&mut adapter, console::QUEUE_RECEIVE, Direction::FromDevice)?;
        let transmit = PageQueue::new(&mut adapter, console::QUEUE_TRANSMIT, Direction::ToDevice)?;
        adapter.transport().start();
        let size = (features & console::F_SIZE != 0).then(|| {
            let mut read = |offset| adapter.transport().config_read16(offset);
            (
                read(core::mem::offset_of!(console::Config, cols)),
                read(core::mem::offset_of!(console::Config, rows)),
            )
        });
        let mut this = Self {
            adapter: Reset(adapter),
            receive,
            transmit,
            idle: Vec::new(),
            input: VecDeque::new(),
            size,
            dead: None,
        };
        for _ in 0..CONSOLE_PAGES {
            let empty = page::<S>().ok_or(InitError::Memory)?;
            if this.receive.add(empty, PAGE_SIZE, &mut this.adapter.0).is_err() {
                return Err(InitError::Queue(console::QUEUE_RECEIVE));
            }
            this.idle.push(page::<S>().ok_or(InitError::Memory)?);
        }
        Ok(this)
    }

    /// Columns and rows, if the device knows them.
    #[must_use]
    pub fn size(&self) -> Option<(u16, u16)> {
        self.size
    }

    /// How the device broke the protocol, if it did; it is not used any more then.
    #[must_use]
    pub fn failure(&self) -> Option<PeerError> {
        self.dead
    }

    /// Takes back the pages whose output the device has seen.
    fn reclaim(&mut self) {
        while self.dead.is_none() {
            match self.transmit.pop() {
                Ok(Some((page, _))) => self.idle.push(page),
                Ok(None) => break,
                Err(error) => self.broken(error),
            }
        }
    }

    /// Not logged: the log may end in this very console.
    fn broken(&mut self, error: PeerError) {
        self.dead = Some(error);
    }
}

impl<S: DeviceFrames> ConsoleDevice for VirtioConsole<S> {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        self.reclaim();
        while self.dead.is_none()
            && let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty())
            && let Some(mut page) = self.idle.pop()
        {
            let len = rest.len().min(page.len());
            if let (Some(to), Some(from)) = (page.get_mut(..len), rest.get(..len)) {
                to.copy_from_slice(from);
            }
            if let Err(page) = self.transmit.add(page, len, &mut self.adapter.0) {
                self.idle.push(page);
                break;
            }
            taken += len;
        }
        taken
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        while self.dead.is_none() {
            match self.receive.pop() {
                Ok(Some((page, len))) => {
                    let room = INPUT_LIMIT - self.input.len().min(INPUT_LIMIT);
                    self.input.extend(page.iter().take(len.min(room)));
                    drop(self.receive.add(page, PAGE_SIZE, &mut self.adapter.0));
                }
                Ok(None) => break,
                Err(error) => self.broken(error),
            }
        }
        let len = buf.len().min(self.input.len());
        for (to, from) in buf.iter_mut().zip(self.input.drain(..len)) {
            *to = from;
        }
        len
    }

    fn output_pending(&mut self) -> bool {
        self.reclaim();
        self.dead.is_none() && self.idle.len() < CONSOLE_PAGES
    }
}

/// A virtio entropy source.
#[derive(Debug)]
pub struct VirtioRng<S: DeviceFrames> {
    // Before the queue, so that the device is reset before its memory is freed.
    adapter: Reset,
    queue: PageQueue<S>,
    idle: Option<DmaBuf>,
    dead: bool,
}

/// Bytes asked for at a time.
const ENTROPY_REQUEST: usize = 64;

impl<S: DeviceFrames> VirtioRng<S> {
    /// Sets the device up and asks for the first bytes.
    ///
    /// # Errors
    /// See [`InitError`].
    pub fn new(transport: Box<dyn Transport>) -> Result<Self, InitError> {
        let (mut adapter, _) = set_up(transport, FEATURES)?;
        let mut queue = PageQueue::new(&mut adapter, rng::QUEUE_REQUEST, Direction::FromDevice)?;
        adapter.transport().start();
        let page = page::<S>().ok_or(InitError::Memory)?;
        let idle = queue.add(page, ENTROPY_REQUEST, &mut adapter).err();
        Ok(Self { adapter: Reset(adapter), queue, idle, dead: false })
    }
}

impl<S: DeviceFrames> EntropyDevice for VirtioRng<S> {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        if self.dead {
            return 0;
        }
        let mut taken = 0;
        match self.queue.pop() {
            Ok(Some((mut page, len))) => {
                for (to, from) in buf.iter_mut().zip(page.iter_mut().take(len)) {
                    *to = core::mem::take(from); // No second reader of the same bytes.
                    taken += 1;
                }
                self.idle = Some(page);
            }
            // Asked for only when somebody comes and finds nothing: a request that followed each
            // completion would keep device and guest busy for ever.
            Ok(None) => {
                if let Some(page) = self.idle.take() {
                    self.idle = self.queue.add(page, ENTROPY_REQUEST, &mut self.adapter.0).err();
                }
            }
            Err(error) => {
                log::error!("virtio-rng: {error}");
                self.dead = true;
            }
        }
        taken
    }
}

/// An adapter whose device is reset before the memory of its queues is freed.
#[derive(Debug)]
struct Reset(Adapter);

impl Drop for Reset {
    fn drop(&mut self) {
        if self.0.transport().reset().is_err() {
            log::error!("virtio: a device did not finish its reset before its memory was freed");
        }
    }
}
