//! Device classes: what the kernel asks of a disk, a network card, a console, whoever implements it.
//!
//! Submission and completion are apart, ids are the caller's, and buffers are moved in and come
//! back with the completion, so that no reference to memory exists while a peer may write it.

use alloc::vec::Vec;

use crate::dma::DmaBuf;

/// A peer (backend, device) broke the protocol; the device is unusable until it is reset.
///
/// The text names the rule that was broken; it is for the log and for the caller's error message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerError(pub &'static str);

impl core::fmt::Display for PeerError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "the device's other side broke the protocol: {}", self.0)
    }
}

/// Bytes in the sector that block addresses count, in Xen and virtio alike, whatever the disk's own.
pub const SECTOR_SIZE: usize = 512;

bitflags::bitflags! {
    /// What a disk can do beyond reading.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BlockFeatures: u32 {
        /// Writes are accepted.
        const WRITE = 1 << 0;
        /// [`BlockOp::Flush`] is accepted; without it every write is stable when it completes.
        const FLUSH = 1 << 1;
        /// [`BlockOp::Discard`] is accepted.
        const DISCARD = 1 << 2;
        /// [`BlockOp::WriteZeroes`] is accepted.
        const WRITE_ZEROES = 1 << 3;
    }
}

/// The fixed facts of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity, in sectors of [`SECTOR_SIZE`] bytes.
    pub sectors: u64,
    /// The disk's own block size in bytes, a multiple of [`SECTOR_SIZE`]; requests are aligned to it.
    pub block_size: u32,
    /// The longest request, in bytes; the async layer above splits longer ones.
    pub max_request: u32,
    /// Requests that can be in flight at once.
    pub queue_depth: u16,
    /// What the disk can do.
    pub features: BlockFeatures,
}

/// What to do with a disk; sectors count [`SECTOR_SIZE`] bytes.
#[derive(Debug)]
pub enum BlockOp {
    /// Fills `buf[..len]` from the disk.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes to read, a multiple of the block size.
        len: usize,
        /// Where to.
        buf: DmaBuf,
    },
    /// Stores `buf[..len]` on the disk.
    Write {
        /// First sector.
        sector: u64,
        /// Bytes to write, a multiple of the block size.
        len: usize,
        /// Where from.
        buf: DmaBuf,
    },
    /// Makes completed writes stable.
    Flush,
    /// Gives back the contents of a range, which may read as anything afterwards.
    Discard {
        /// First sector.
        sector: u64,
        /// Sectors to discard.
        sectors: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Sectors to zero.
        sectors: u64,
    },
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// Done.
    Ok,
    /// The medium failed, or the device went away during the request.
    IoError,
    /// The device does not know this operation.
    Unsupported,
}

/// A finished request: the caller's id, how it ended, and its buffer back.
///
/// `buf` is `None` for operations without data, and when the peer still holds the memory, which is
/// then leaked on purpose (and reported) rather than reused.
#[derive(Debug)]
pub struct Completion {
    /// What the caller passed to [`BlockDevice::submit`].
    pub id: u64,
    /// How it ended.
    pub status: BlockStatus,
    /// The buffer of the request.
    pub buf: Option<DmaBuf>,
}

/// Why a request was not taken; the operation comes back unharmed.
#[derive(Debug)]
pub enum SubmitError {
    /// The queue is full: try again after a completion.
    Busy(BlockOp),
    /// The request is outside the geometry, misaligned, or not among the features.
    Invalid(BlockOp),
    /// The device has gone (detached, or broke the protocol).
    Gone(BlockOp),
}

/// A disk. Methods never wait; the device's interrupt (or event) says when to call [`Self::complete`].
pub trait BlockDevice: Send {
    /// The fixed facts; stable while the device is connected.
    fn geometry(&self) -> Geometry;
    /// Queues one request, not yet visible to the peer before [`Self::kick`].
    ///
    /// # Errors
    /// See [`SubmitError`].
    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError>;
    /// Publishes everything submitted and notifies the peer if it asked to be.
    fn kick(&mut self);
    /// Takes one completion.
    ///
    /// # Errors
    /// The peer broke the protocol; later calls drain the outstanding requests as [`BlockStatus::IoError`].
    fn complete(&mut self) -> Result<Option<Completion>, PeerError>;
    /// Asks for an interrupt at the next completion; `true` if one is already there (call `complete` again).
    fn arm(&mut self) -> bool;
}

bitflags::bitflags! {
    /// Work that a network device takes over.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct NetOffloads: u32 {
        /// The device fills in TCP and UDP checksums of frames sent.
        const TX_CHECKSUM = 1 << 0;
        /// The device cuts long TCP/IPv4 frames into segments.
        const TX_TSO4 = 1 << 1;
        /// The device cuts long TCP/IPv6 frames into segments.
        const TX_TSO6 = 1 << 2;
        /// Received frames may have unfilled, but trusted, checksums.
        const RX_CHECKSUM = 1 << 3;
        /// Received frames may be longer than the MTU (coalesced TCP).
        const RX_LARGE = 1 << 4;
    }
}

/// The facts of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetProperties {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// Largest IP packet, in bytes, without offloads.
    pub mtu: u16,
    /// What was negotiated.
    pub offloads: NetOffloads,
}

/// A checksum for the device to fill in, as virtio-net and netif both state it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where summing starts, in bytes from the start of the frame.
    pub start: u16,
    /// Where the sum goes, in bytes from `start`.
    pub offset: u16,
}

/// A long TCP frame for the device to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Payload bytes in each segment.
    pub mss: u16,
    /// Bytes of Ethernet, IP and TCP headers, repeated in each segment.
    pub header_len: u16,
    /// `true`: IPv6; `false`: IPv4.
    pub ipv6: bool,
}

/// A frame to send: `buf[..len]`, from its Ethernet header on, without CRC.
///
/// The first [`TX_HEADROOM`] bytes of `buf` are the driver's (virtio-net puts its header there);
/// the frame starts behind them.
#[derive(Debug)]
pub struct TxFrame {
    /// Headroom, then the frame.
    pub buf: DmaBuf,
    /// Bytes of frame behind the headroom.
    pub len: usize,
    /// Checksum to fill in.
    pub checksum: Option<PartialChecksum>,
    /// Segmentation to do; needs `checksum` too.
    pub segmentation: Option<Segmentation>,
}

/// Bytes at the start of a transmit buffer that belong to the driver.
pub const TX_HEADROOM: usize = 16;

/// What is known of the checksum of a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxChecksum {
    /// Nothing: verify it.
    Unknown,
    /// Verified by the device, or never left this machine (possibly unfilled).
    Trusted,
}

/// A piece of a received frame: `buf[offset..offset + len]`.
#[derive(Debug)]
pub struct RxPart {
    /// The memory.
    pub buf: DmaBuf,
    /// First byte.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// A network card. Methods never wait. The driver keeps its receive queue filled by itself.
pub trait NetDevice: Send {
    /// The facts.
    fn properties(&self) -> NetProperties;
    /// Whether the peer reports a link.
    fn link_up(&self) -> bool;
    /// Queues a frame; gives it back when the queue is full (or the device gone: see [`Self::poll`]).
    ///
    /// # Errors
    /// The frame itself, unharmed.
    fn transmit(&mut self, frame: TxFrame) -> Result<(), TxFrame>;
    /// Publishes everything queued (frames sent and receive buffers) and notifies the peer if it asked to be.
    fn kick(&mut self);
    /// Takes one buffer whose frame was sent, for reuse.
    ///
    /// # Errors
    /// The peer broke the protocol.
    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError>;
    /// Appends the parts of one received frame to `parts` (cleared first); `None` if there is none.
    ///
    /// # Errors
    /// The peer broke the protocol.
    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError>;
    /// Gives a receive buffer back to the driver's pool.
    fn recycle(&mut self, buf: DmaBuf);
    /// Asks for an interrupt at the next event; `true` if something is already there.
    fn arm(&mut self) -> bool;
}

/// A byte stream to a person or a log. Methods never wait.
pub trait ConsoleDevice: Send {
    /// Takes bytes for output; answers how many, 0 when full.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// Fills `buf` with input; answers how many bytes, 0 when there is none.
    fn read(&mut self, buf: &mut [u8]) -> usize;
    /// Whether output was taken that the peer has not seen yet, and would not if the machine ended now.
    fn output_pending(&mut self) -> bool {
        false
    }
}

/// A source of entropy outside the CPU. Methods never wait.
pub trait EntropyDevice: Send {
    /// Starts a request if none is under way, and takes what has arrived; answers how many bytes.
    fn read(&mut self, buf: &mut [u8]) -> usize;
}

/// A memory balloon: the host asks for pages, the guest gives them up or takes them back.
pub trait BalloonDevice: Send {
    /// How many pages of 4 KiB the host wants the guest to give up in all.
    fn target_pages(&mut self) -> u64;
    /// How many pages have been given up so far.
    fn held_pages(&self) -> u64;
    /// Moves toward the target by at most `limit` pages; answers the pages moved (0: reached, or no memory).
    ///
    /// # Errors
    /// The peer broke the protocol.
    fn step(&mut self, limit: usize) -> Result<usize, PeerError>;
}
