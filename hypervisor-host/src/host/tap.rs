//! A network card on a TAP interface of the host, with its offloads (`linux/Documentation/networking/tuntap.rst`).
// UNSAFETY: the ioctls of /dev/net/tun have no wrapper.
#![expect(unsafe_code, reason = "ioctl")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use janus_proto::abi::xen_io::netif::GsoType;
use rustix::io::Errno;

use super::card::Doorbell;
use super::events::{EventLoop, Interest, READ, WRITE, Waiting};
use crate::netback::checksum::{Place, place};
use crate::netback::{Accepts, Frame, Gso, NetBackend};

/// Bytes of `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// The longest frame: 64 KiB of packet behind an Ethernet header.
const MAX_FRAME: usize = 65_536 + 14;
/// Frames that wait for the interface to take them.
const QUEUE: usize = 256;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// A TAP interface.
pub struct Tap {
    file: Arc<OwnedFd>,
    waiting: Waiting,
    /// The loop waits for the interface.
    armed: Arc<AtomicBool>,
    unsent: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    dropped: u64,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tap({:?}, {} dropped)", self.file, self.dropped)
    }
}

impl Tap {
    /// Attaches to the interface `name`, which must exist and be ours unless we may make it. `bell` is rung on the
    /// loop's thread when there are frames.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, or the interface cannot be had.
    pub fn open(name: &str, events: &EventLoop, bell: Doorbell) -> io::Result<Self> {
        let told = |error: io::Error| {
            io::Error::new(error.kind(), format!("TAP interface {name}: {error}"))
        };
        // SAFETY: `ifreq` is plain data, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() {
            return Err(told(io::ErrorKind::InvalidFilename.into()));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
        let file = File::options().read(true).write(true).open("/dev/net/tun").map_err(told)?;
        let fd = file.as_raw_fd();
        // SAFETY: the descriptor is open, and the request is a whole `ifreq`, which the call writes to.
        if unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) } != 0 {
            return Err(told(io::Error::last_os_error()));
        }
        let size = libc::c_int::try_from(HEADER).unwrap_or_default();
        // SAFETY: the call reads one `int`.
        if unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const size) } != 0 {
            return Err(told(io::Error::last_os_error()));
        }
        let file: Arc<OwnedFd> = Arc::new(file.into());
        rustix::fs::fcntl_setfl(&*file, rustix::fs::OFlags::NONBLOCK)?;
        let armed = Arc::new(AtomicBool::new(false));
        let of_callback = Arc::clone(&armed);
        let callback = move |_| {
            of_callback.store(false, Ordering::SeqCst);
            bell.ring();
        };
        let waiting = events.add(Arc::clone(&file), Interest::ONESHOT, Arc::new(callback))?;
        let (unsent, spare) = (VecDeque::new(), Vec::new());
        Ok(Self { file, waiting, armed, unsent, spare, dropped: 0 })
    }

    /// Frames that the interface did not take in time, or that make no sense.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Sends what waits; `false`: some of it still does.
    fn flush(&mut self) -> bool {
        while let Some(bytes) = self.unsent.front() {
            match rustix::io::write(&*self.file, bytes) {
                Err(Errno::AGAIN) => return false,
                Ok(_) => {}
                // The interface is down, or the frame is nonsense to it.
                Err(_) => self.dropped += 1,
            }
            if let Some(bytes) = self.unsent.pop_front() {
                self.keep(bytes);
            }
        }
        true
    }

    /// Has the loop call once, when there is a frame, or room for those that wait.
    fn arm(&self) {
        if !self.armed.swap(true, Ordering::SeqCst) {
            let mut interest = READ | Interest::ONESHOT;
            interest.set(WRITE, !self.unsent.is_empty());
            self.waiting.change(interest);
        }
    }

    fn keep(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < QUEUE {
            self.spare.push(bytes);
        }
    }
}

impl NetBackend for Tap {
    fn send(&mut self, frame: Frame) {
        let Some(header) = header(&frame) else {
            self.dropped += 1;
            return self.keep(frame.bytes);
        };
        if self.flush() {
            let parts = [io::IoSlice::new(&header), io::IoSlice::new(&frame.bytes)];
            match rustix::io::writev(&*self.file, &parts) {
                Err(Errno::AGAIN) => {}
                result => {
                    // The interface is down, or the frame is nonsense to it.
                    self.dropped += u64::from(result.is_err());
                    return self.keep(frame.bytes);
                }
            }
        }
        if self.unsent.len() >= QUEUE {
            self.dropped += 1;
            return self.keep(frame.bytes);
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&frame.bytes);
        self.unsent.push_back(bytes);
        self.keep(frame.bytes);
    }

    fn receive(&mut self) -> Option<Frame> {
        self.flush();
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.reserve(HEADER + MAX_FRAME);
        match rustix::io::read(&*self.file, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(count) if count > HEADER => {
                let header: [u8; HEADER] = *bytes.first_chunk()?;
                bytes.drain(..HEADER);
                let [flags, kind, _, _, size_low, size_high, ..] = header;
                let size = u16::from_ne_bytes([size_low, size_high]);
                let gso = match kind & !0x80 {
                    GSO_TCPV4 => Some(Gso { size, kind: GsoType::TCPV4 }),
                    GSO_TCPV6 => Some(Gso { size, kind: GsoType::TCPV6 }),
                    _ => None,
                };
                let checksum_blank = flags & NEEDS_CSUM != 0;
                Some(Frame { bytes, checksum_blank, validated: flags & DATA_VALID != 0, gso })
            }
            _ => {
                self.keep(bytes);
                self.arm();
                None
            }
        }
    }

    fn connected(&mut self, accepts: Accepts) {
        let mut offloads = 0;
        if accepts.checksum_blank {
            offloads |= libc::TUN_F_CSUM;
            if accepts.gso_tcpv4 {
                offloads |= libc::TUN_F_TSO4;
            }
            if accepts.gso_tcpv6 {
                offloads |= libc::TUN_F_TSO6;
            }
        }
        // SAFETY: the call takes a number; the descriptor is open. An interface that refuses sends plain frames.
        let _ = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) };
    }

    fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    fn recycle(&mut self, bytes: Vec<u8>) {
        self.keep(bytes);
    }
}

/// The header that tells the interface what is left to do for a frame; `None`: it makes no sense.
fn header(frame: &Frame) -> Option<[u8; HEADER]> {
    let mut header = [0; HEADER];
    if !frame.checksum_blank && frame.gso.is_none() {
        header[0] = if frame.validated { DATA_VALID } else { 0 };
        header[1] = GSO_NONE;
        return Some(header);
    }
    let Place { start, offset, header_len } = place(&frame.bytes)?;
    header[0] = NEEDS_CSUM;
    if let Some(gso) = frame.gso {
        header[1] = match gso.kind {
            GsoType::TCPV4 => GSO_TCPV4,
            GsoType::TCPV6 => GSO_TCPV6,
            _ => return None,
        };
        header[2..4].copy_from_slice(&header_len.to_ne_bytes());
        header[4..6].copy_from_slice(&gso.size.to_ne_bytes());
    }
    header[6..8].copy_from_slice(&start.to_ne_bytes());
    header[8..10].copy_from_slice(&offset.to_ne_bytes());
    Some(header)
}

#[cfg(test)]
mod tests;
