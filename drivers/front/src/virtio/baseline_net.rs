//! The `virtio-drivers` crate's network card behind our device class: the baseline of the bench, nothing else.
//!
//! It has no offloads, and notifies the device for each frame and each receive buffer.
// UNSAFETY: the crate keeps pointers to buffers that it was lent; here they are moved into tables.
#![expect(unsafe_code, reason = "the crate's requests keep pointers beyond the call")]

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use janus_proto::addr::PAGE_SIZE;
use virtio_drivers::device::net::VirtIONetRaw;

use super::baseline::{Adapter, DeviceFrames, FramesHal, page};
use super::{InitError, Transport};
use crate::class::{
    NetDevice, NetOffloads, NetProperties, PeerError, RxChecksum, RxPart, TX_HEADROOM, TxFrame,
};
use crate::dma::DmaBuf;

/// Slots of each queue.
const SLOTS: usize = 64;
/// `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
const HEADER: usize = 12;

/// The crate's card.
pub struct BaselineNet<S: DeviceFrames> {
    // First, so that it is dropped, and the device reset, before the buffers.
    driver: VirtIONetRaw<FramesHal<S>, Adapter, SLOTS>,
    /// Frames under way with their lengths, by the crate's token.
    sending: [Option<(DmaBuf, usize)>; SLOTS],
    /// Buffers under way, by the crate's token.
    receiving: [Option<DmaBuf>; SLOTS],
    sent: VecDeque<DmaBuf>,
    /// Receive buffers to post.
    spare: Vec<DmaBuf>,
    broken: bool,
}

impl<S: DeviceFrames> core::fmt::Debug for BaselineNet<S> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BaselineNet").field("spare", &self.spare).finish_non_exhaustive()
    }
}

impl<S: DeviceFrames> BaselineNet<S> {
    /// Sets the device up.
    ///
    /// # Errors
    /// [`InitError::Queue`] for whatever the crate does not like.
    pub fn new(transport: Box<dyn Transport>) -> Result<Self, InitError> {
        let adapter = Adapter::new(transport).map_err(|_| InitError::Config("device type"))?;
        let driver = VirtIONetRaw::new(adapter).map_err(|_| InitError::Queue(0))?;
        let mut this = Self {
            driver,
            sending: [const { None }; SLOTS],
            receiving: [const { None }; SLOTS],
            sent: VecDeque::new(),
            spare: (0..SLOTS).map_while(|_| page::<S>()).collect(),
            broken: false,
        };
        this.post();
        Ok(this)
    }

    /// Posts receive buffers while there is room.
    fn post(&mut self) {
        while let Some(mut buf) = self.spare.pop() {
            // SAFETY: the buffer moves into the table below, untouched until the request is complete; its memory
            // does not move with it.
            let token = unsafe { self.driver.receive_begin(&mut buf) };
            match token.ok().and_then(|token| self.receiving.get_mut(usize::from(token))) {
                Some(slot) => *slot = Some(buf),
                // Full, so nothing was queued: tokens are below SLOTS.
                None => return self.spare.push(buf),
            }
        }
    }

    fn fail<T>(&mut self, rule: &'static str) -> Result<T, PeerError> {
        self.broken = true;
        Err(PeerError(rule))
    }
}

/// The header and the frame in a transmit buffer.
fn lent(buf: &mut DmaBuf, len: usize) -> Option<&mut [u8]> {
    buf.get_mut(TX_HEADROOM - HEADER..TX_HEADROOM + len)
}

impl<S: DeviceFrames> NetDevice for BaselineNet<S> {
    fn properties(&self) -> NetProperties {
        let mac = self.driver.mac_address();
        NetProperties { mac, mtu: 1500, offloads: NetOffloads::empty() }
    }

    fn link_up(&self) -> bool {
        !self.broken
    }

    fn transmit(&mut self, mut frame: TxFrame) -> Result<(), TxFrame> {
        let len = frame.len;
        let Some(bytes) = lent(&mut frame.buf, len).filter(|_| !self.broken) else {
            return Err(frame);
        };
        // It fits: `lent` has room for it.
        let _ = self.driver.fill_buffer_header(bytes);
        // SAFETY: the buffer moves into the table below, untouched until the request is complete; its memory does
        // not move with it.
        let token = unsafe { self.driver.transmit_begin(bytes) };
        match token.ok().and_then(|token| self.sending.get_mut(usize::from(token))) {
            Some(slot) => *slot = Some((frame.buf, len)),
            None => return Err(frame),
        }
        Ok(())
    }

    fn kick(&mut self) {
        // The crate does so with each request.
        if !self.broken {
            self.post();
        }
    }

    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError> {
        while !self.broken
            && let Some(token) = self.driver.poll_transmit()
        {
            let sending = self.sending.get_mut(usize::from(token)).and_then(Option::take);
            let Some((mut buf, len)) = sending else {
                return self.fail("used id that is not in flight");
            };
            let bytes = lent(&mut buf, len).unwrap_or_default();
            // SAFETY: the buffer that was queued under this token.
            if unsafe { self.driver.transmit_complete(token, bytes) }.is_err() {
                return self.fail("a transmit queue in disorder");
            }
            self.sent.push_back(buf);
        }
        Ok(self.sent.pop_front())
    }

    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        parts.clear();
        if self.broken {
            return Ok(None);
        }
        let Some(token) = self.driver.poll_receive() else { return Ok(None) };
        let receiving = self.receiving.get_mut(usize::from(token)).and_then(Option::take);
        let Some(mut buf) = receiving else { return self.fail("used id that is not in flight") };
        // SAFETY: the buffer that was queued under this token.
        match unsafe { self.driver.receive_complete(token, &mut buf) } {
            Ok((offset, len)) if offset.saturating_add(len) <= PAGE_SIZE => {
                parts.push(RxPart { buf, offset, len });
                Ok(Some(RxChecksum::Unknown))
            }
            _ => self.fail("a received frame of impossible length"),
        }
    }

    fn recycle(&mut self, buf: DmaBuf) {
        self.spare.push(buf);
    }

    fn arm(&mut self) -> bool {
        // The crate's interrupts are always on.
        let ready = self.driver.poll_receive().is_some() || self.driver.poll_transmit().is_some();
        !self.broken && (ready || !self.sent.is_empty())
    }
}
