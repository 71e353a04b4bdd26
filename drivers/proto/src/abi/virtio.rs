//! virtio 1.2: status and feature bits, split virtqueue, PCI capabilities, MMIO registers, device configurations.
//!
//! Everything is little-endian, as is the only architecture of this kernel. Section numbers are those of
//! "Virtual I/O Device (VIRTIO) Version 1.2".

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// Device types (virtio 1.2, 5).
    pub enum DeviceId: u32 {
        /// Nothing here; drivers must ignore the device.
        RESERVED = 0,
        /// Network card.
        NET = 1,
        /// Block device.
        BLOCK = 2,
        /// Console.
        CONSOLE = 3,
        /// Entropy source.
        ENTROPY = 4,
        /// Traditional memory balloon.
        BALLOON = 5,
        /// SCSI host.
        SCSI = 8,
        /// 9P transport.
        NINE_P = 9,
        /// Socket device.
        VSOCK = 19,
    }
}

bitflags::bitflags! {
    /// Device status field (virtio 1.2, 2.1). Writing 0 resets the device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The guest has noticed the device.
        const ACKNOWLEDGE = 1;
        /// The guest knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up.
        const DRIVER_OK = 4;
        /// Feature negotiation is complete.
        const FEATURES_OK = 8;
        /// The device has met an error that it cannot recover from.
        const DEVICE_NEEDS_RESET = 64;
        /// The guest has given up on the device.
        const FAILED = 128;
    }
}

bitflags::bitflags! {
    /// Interrupt status: the PCI ISR register (virtio 1.2, 4.1.4.5) and MMIO `InterruptStatus` (4.2.2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InterruptStatus: u32 {
        /// A buffer was used in at least one queue.
        const QUEUE = 1;
        /// The configuration changed.
        const CONFIG = 2;
    }
}

/// Feature bits that every device type shares (virtio 1.2, 6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` say when to notify.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device complies with virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device reaches memory as the platform says (an IOMMU, encryption).
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// The packed virtqueue layout.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order in which they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// Memory is ordered as the platform says.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// Notifications carry data.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// Queues can be reset one by one.
    pub const RING_RESET: u64 = 1 << 40;
}

/// A descriptor (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VirtqDesc {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`VIRTQ_DESC_F_NEXT`] and the like.
    pub flags: u16,
    /// The next descriptor of the chain, if the flags say so.
    pub next: u16,
}
assert_layout!(VirtqDesc, size = 16, addr = 0, len = 8, flags = 12, next = 14);

/// The chain goes on at `next`.
pub const VIRTQ_DESC_F_NEXT: u16 = 1;
/// The device writes this buffer (otherwise it reads it).
pub const VIRTQ_DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const VIRTQ_DESC_F_INDIRECT: u16 = 4;

/// The head of the available ring (virtio 1.2, 2.7.6); `u16` heads and `used_event` follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VirtqAvail {
    /// [`VIRTQ_AVAIL_F_NO_INTERRUPT`].
    pub flags: u16,
    /// Where the driver will put the next entry, modulo the queue size.
    pub idx: u16,
}
assert_layout!(VirtqAvail, size = 4, flags = 0, idx = 2);
/// The driver wants no interrupt (without event index).
pub const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// The head of the used ring (virtio 1.2, 2.7.8); [`VirtqUsedElem`]s and `avail_event` follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VirtqUsed {
    /// [`VIRTQ_USED_F_NO_NOTIFY`].
    pub flags: u16,
    /// Where the device will put the next element, modulo the queue size.
    pub idx: u16,
}
assert_layout!(VirtqUsed, size = 4, flags = 0, idx = 2);
/// The device wants no notification (without event index).
pub const VIRTQ_USED_F_NO_NOTIFY: u16 = 1;

/// An element of the used ring.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VirtqUsedElem {
    /// Head of the chain that was used.
    pub id: u32,
    /// Bytes written into it.
    pub len: u32,
}
assert_layout!(VirtqUsedElem, size = 8, id = 0, len = 4);

/// Virtio over PCI (virtio 1.2, 4.1).
pub mod pci {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// PCI vendor of every virtio device.
    pub const VENDOR: u16 = 0x1af4;
    /// First and last PCI device id of transitional devices.
    pub const TRANSITIONAL_DEVICES: core::ops::RangeInclusive<u16> = 0x1000..=0x103f;
    /// PCI device ids of modern devices: 0x1040 plus the device type.
    pub const MODERN_DEVICES: core::ops::RangeInclusive<u16> = 0x1040..=0x107f;
    /// "No vector": also what a device answers that could not assign one.
    pub const NO_VECTOR: u16 = 0xffff;

    open_enum! {
        /// What a vendor capability points to (virtio 1.2, 4.1.4).
        pub enum CfgType: u8 {
            /// [`CommonCfg`].
            COMMON = 1,
            /// Notification addresses.
            NOTIFY = 2,
            /// ISR status.
            ISR = 3,
            /// Device-specific configuration.
            DEVICE = 4,
            /// Access to the others through configuration space.
            PCI = 5,
            /// Shared memory regions.
            SHARED_MEMORY = 8,
            /// Vendor data.
            VENDOR = 9,
        }
    }

    /// A vendor-specific capability (virtio 1.2, 4.1.4); for `NOTIFY`, `notify_off_multiplier` follows.
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Cap {
        /// PCI capability id: 0x09, vendor specific.
        pub cap_vndr: u8,
        /// Offset of the next capability.
        pub cap_next: u8,
        /// Bytes in this one.
        pub cap_len: u8,
        /// What it points to.
        pub cfg_type: CfgType,
        /// Which BAR (0 to 5).
        pub bar: u8,
        /// To tell several of one type apart.
        pub id: u8,
        /// Pads to a full word.
        pub padding: [u8; 2],
        /// Byte offset in the BAR.
        pub offset: u32,
        /// Bytes.
        pub length: u32,
    }
    assert_layout!(Cap, size = 16, cfg_type = 3, bar = 4, offset = 8, length = 12);

    /// The common configuration structure (virtio 1.2, 4.1.4.3).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct CommonCfg {
        /// Which 32 feature bits `device_feature` shows.
        pub device_feature_select: u32,
        /// Features offered.
        pub device_feature: u32,
        /// Which 32 feature bits `driver_feature` takes.
        pub driver_feature_select: u32,
        /// Features accepted.
        pub driver_feature: u32,
        /// MSI-X vector of configuration changes.
        pub config_msix_vector: u16,
        /// Queues the device has.
        pub num_queues: u16,
        /// [`super::Status`].
        pub device_status: u8,
        /// Changes whenever the configuration does.
        pub config_generation: u8,
        /// Which queue the rest is about.
        pub queue_select: u16,
        /// Entries: the most possible until the driver writes less; 0: no such queue.
        pub queue_size: u16,
        /// MSI-X vector of this queue.
        pub queue_msix_vector: u16,
        /// 1: in operation.
        pub queue_enable: u16,
        /// Where its notification address is, in units of `notify_off_multiplier`.
        pub queue_notify_off: u16,
        /// Address of the descriptor table.
        pub queue_desc: u64,
        /// Address of the available ring.
        pub queue_driver: u64,
        /// Address of the used ring.
        pub queue_device: u64,
    }
    assert_layout!(
        CommonCfg,
        size = 56,
        config_msix_vector = 16,
        device_status = 20,
        queue_select = 22,
        queue_size = 24,
        queue_msix_vector = 26,
        queue_enable = 28,
        queue_notify_off = 30,
        queue_desc = 32,
        queue_driver = 40,
        queue_device = 48
    );
}

/// Register offsets of virtio over MMIO, version 2 (virtio 1.2, 4.2.2).
pub mod mmio {
    /// "virt".
    pub const MAGIC: u32 = 0x7472_6976;
    /// `MagicValue`, R.
    pub const MAGIC_VALUE: usize = 0x000;
    /// `Version`, R: 2 (1 is legacy).
    pub const VERSION: usize = 0x004;
    /// `DeviceID`, R.
    pub const DEVICE_ID: usize = 0x008;
    /// `DeviceFeatures`, R.
    pub const DEVICE_FEATURES: usize = 0x010;
    /// `DeviceFeaturesSel`, W.
    pub const DEVICE_FEATURES_SEL: usize = 0x014;
    /// `DriverFeatures`, W.
    pub const DRIVER_FEATURES: usize = 0x020;
    /// `DriverFeaturesSel`, W.
    pub const DRIVER_FEATURES_SEL: usize = 0x024;
    /// `QueueSel`, W.
    pub const QUEUE_SEL: usize = 0x030;
    /// `QueueNumMax`, R.
    pub const QUEUE_NUM_MAX: usize = 0x034;
    /// `QueueNum`, W.
    pub const QUEUE_NUM: usize = 0x038;
    /// `QueueReady`, RW.
    pub const QUEUE_READY: usize = 0x044;
    /// `QueueNotify`, W.
    pub const QUEUE_NOTIFY: usize = 0x050;
    /// `InterruptStatus`, R.
    pub const INTERRUPT_STATUS: usize = 0x060;
    /// `InterruptACK`, W.
    pub const INTERRUPT_ACK: usize = 0x064;
    /// `Status`, RW.
    pub const STATUS: usize = 0x070;
    /// `QueueDescLow`, W; the high half follows.
    pub const QUEUE_DESC: usize = 0x080;
    /// `QueueDriverLow`, W; the high half follows.
    pub const QUEUE_DRIVER: usize = 0x090;
    /// `QueueDeviceLow`, W; the high half follows.
    pub const QUEUE_DEVICE: usize = 0x0a0;
    /// `ConfigGeneration`, R.
    pub const CONFIG_GENERATION: usize = 0x0fc;
    /// Device-specific configuration.
    pub const CONFIG: usize = 0x100;
    /// Bytes of registers with the smallest configuration, the size of every window.
    pub const WINDOW: usize = 0x200;
}

/// Block device (virtio 1.2, 5.2).
pub mod blk {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// `size_max` limits a segment.
    pub const F_SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` limits the segments of a request.
    pub const F_SEG_MAX: u64 = 1 << 2;
    /// Read-only.
    pub const F_RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const F_BLK_SIZE: u64 = 1 << 6;
    /// Flush is known.
    pub const F_FLUSH: u64 = 1 << 9;
    /// `num_queues` is valid.
    pub const F_MQ: u64 = 1 << 12;
    /// Discard is known.
    pub const F_DISCARD: u64 = 1 << 13;
    /// Write zeroes is known.
    pub const F_WRITE_ZEROES: u64 = 1 << 14;

    open_enum! {
        /// `type` of a request.
        pub enum RequestType: u32 {
            /// Read.
            IN = 0,
            /// Write.
            OUT = 1,
            /// Flush.
            FLUSH = 4,
            /// Device id string.
            GET_ID = 8,
            /// Discard.
            DISCARD = 11,
            /// Write zeroes.
            WRITE_ZEROES = 13,
        }
    }
    open_enum! {
        /// The status byte at the end of a request.
        pub enum RequestStatus: u8 {
            /// Done.
            OK = 0,
            /// Failed.
            IOERR = 1,
            /// Unknown operation.
            UNSUPP = 2,
        }
    }

    /// The header of a request (virtio 1.2, 5.2.6).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct RequestHeader {
        /// What to do.
        pub request_type: RequestType,
        /// Reserved (was an I/O priority).
        pub reserved: u32,
        /// First 512-byte sector.
        pub sector: u64,
    }
    assert_layout!(RequestHeader, size = 16, request_type = 0, sector = 8);

    /// The data of discard and write zeroes.
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct DiscardWriteZeroes {
        /// First 512-byte sector.
        pub sector: u64,
        /// How many.
        pub num_sectors: u32,
        /// Bit 0: unmap (write zeroes only).
        pub flags: u32,
    }
    assert_layout!(DiscardWriteZeroes, size = 16, sector = 0, num_sectors = 8, flags = 12);

    /// Device configuration (virtio 1.2, 5.2.4).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Config {
        /// Capacity in 512-byte sectors.
        pub capacity: u64,
        /// Most bytes in a segment.
        pub size_max: u32,
        /// Most data segments in a request.
        pub seg_max: u32,
        /// Cylinders of a geometry nobody uses.
        pub cylinders: u16,
        /// Its heads.
        pub heads: u8,
        /// Its sectors.
        pub sectors: u8,
        /// Block size in bytes.
        pub blk_size: u32,
        /// log2 of logical blocks in a physical one.
        pub physical_block_exp: u8,
        /// Offset of the first aligned logical block.
        pub alignment_offset: u8,
        /// Suggested minimum request in blocks.
        pub min_io_size: u16,
        /// Suggested request in blocks.
        pub opt_io_size: u32,
        /// Cache mode.
        pub writeback: u8,
        /// Padding.
        pub unused0: u8,
        /// Request queues.
        pub num_queues: u16,
        /// Most sectors in one discard segment.
        pub max_discard_sectors: u32,
        /// Most segments in a discard.
        pub max_discard_seg: u32,
        /// Alignment of discards in sectors.
        pub discard_sector_alignment: u32,
        /// Most sectors in one write-zeroes segment.
        pub max_write_zeroes_sectors: u32,
        /// Most segments in a write zeroes.
        pub max_write_zeroes_seg: u32,
        /// Whether write zeroes may unmap.
        pub write_zeroes_may_unmap: u8,
        /// Padding.
        pub unused1: [u8; 3],
        /// Most sectors in one secure-erase segment; its further fields are of no use here.
        pub max_secure_erase_sectors: u32,
    }
    assert_layout!(
        Config,
        size = 64,
        size_max = 8,
        seg_max = 12,
        cylinders = 16,
        blk_size = 20,
        physical_block_exp = 24,
        writeback = 32,
        num_queues = 34,
        max_discard_sectors = 36,
        max_write_zeroes_sectors = 48,
        write_zeroes_may_unmap = 56
    );
}

/// Network device (virtio 1.2, 5.1).
pub mod net {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// The device fills in checksums.
    pub const F_CSUM: u64 = 1 << 0;
    /// The driver takes frames with unfilled checksums.
    pub const F_GUEST_CSUM: u64 = 1 << 1;
    /// `mtu` is valid.
    pub const F_MTU: u64 = 1 << 3;
    /// `mac` is valid.
    pub const F_MAC: u64 = 1 << 5;
    /// The driver takes long TCP/IPv4 frames.
    pub const F_GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes long TCP/IPv6 frames.
    pub const F_GUEST_TSO6: u64 = 1 << 8;
    /// The device takes long TCP/IPv4 frames.
    pub const F_HOST_TSO4: u64 = 1 << 11;
    /// The device takes long TCP/IPv6 frames.
    pub const F_HOST_TSO6: u64 = 1 << 12;
    /// A received frame may lie in several buffers.
    pub const F_MRG_RXBUF: u64 = 1 << 15;
    /// `status` is valid.
    pub const F_STATUS: u64 = 1 << 16;

    /// `status`: the link is up.
    pub const S_LINK_UP: u16 = 1;
    /// Receive queue of the first pair.
    pub const QUEUE_RECEIVE: u16 = 0;
    /// Transmit queue of the first pair.
    pub const QUEUE_TRANSMIT: u16 = 1;

    /// Header flag: `csum_start` and `csum_offset` name a checksum to fill in.
    pub const HDR_F_NEEDS_CSUM: u8 = 1;
    /// Header flag: the checksum was verified.
    pub const HDR_F_DATA_VALID: u8 = 2;

    open_enum! {
        /// `gso_type` of a frame.
        pub enum GsoType: u8 {
            /// An ordinary frame.
            NONE = 0,
            /// Long TCP/IPv4.
            TCPV4 = 1,
            /// Long UDP.
            UDP = 3,
            /// Long TCP/IPv6.
            TCPV6 = 4,
            /// Flag beside the others: ECN is in use.
            ECN = 0x80,
        }
    }

    /// The header in front of every frame (virtio 1.2, 5.1.6).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Header {
        /// [`HDR_F_NEEDS_CSUM`], [`HDR_F_DATA_VALID`].
        pub flags: u8,
        /// Kind of segmentation.
        pub gso_type: GsoType,
        /// Bytes of headers in front of the payload.
        pub hdr_len: u16,
        /// Payload bytes in each segment.
        pub gso_size: u16,
        /// Where summing starts.
        pub csum_start: u16,
        /// Where the sum goes, from `csum_start`.
        pub csum_offset: u16,
        /// Receive buffers that the frame takes (mergeable buffers).
        pub num_buffers: u16,
    }
    assert_layout!(
        Header,
        size = 12,
        flags = 0,
        gso_type = 1,
        hdr_len = 2,
        gso_size = 4,
        csum_start = 6,
        csum_offset = 8,
        num_buffers = 10
    );

    /// Device configuration (virtio 1.2, 5.1.4).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Config {
        /// Ethernet address.
        pub mac: [u8; 6],
        /// [`S_LINK_UP`].
        pub status: u16,
        /// Queue pairs at most.
        pub max_virtqueue_pairs: u16,
        /// MTU.
        pub mtu: u16,
    }
    assert_layout!(Config, size = 12, mac = 0, status = 6, max_virtqueue_pairs = 8, mtu = 10);
}

/// Console (virtio 1.2, 5.3).
pub mod console {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// `cols` and `rows` are valid.
    pub const F_SIZE: u64 = 1 << 0;
    /// `emerg_wr` works without queues.
    pub const F_EMERG_WRITE: u64 = 1 << 2;
    /// Input of port 0.
    pub const QUEUE_RECEIVE: u16 = 0;
    /// Output of port 0.
    pub const QUEUE_TRANSMIT: u16 = 1;

    /// Device configuration (virtio 1.2, 5.3.4).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Config {
        /// Columns.
        pub cols: u16,
        /// Rows.
        pub rows: u16,
        /// Ports at most.
        pub max_nr_ports: u32,
        /// A character written here comes out at once.
        pub emerg_wr: u32,
    }
    assert_layout!(Config, size = 12, cols = 0, rows = 2, max_nr_ports = 4, emerg_wr = 8);
}

/// Entropy device (virtio 1.2, 5.4); it has no configuration.
pub mod rng {
    /// The only queue.
    pub const QUEUE_REQUEST: u16 = 0;
}

/// Traditional memory balloon (virtio 1.2, 5.5).
pub mod balloon {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout};

    /// The host must be told before pages are used again.
    pub const F_MUST_TELL_HOST: u64 = 1 << 0;
    /// A queue for statistics.
    pub const F_STATS_VQ: u64 = 1 << 1;
    /// Pages given up.
    pub const QUEUE_INFLATE: u16 = 0;
    /// Pages taken back.
    pub const QUEUE_DEFLATE: u16 = 1;
    /// log2 of the page that balloon page numbers count, whatever the guest's own.
    pub const PFN_SHIFT: u32 = 12;

    /// Device configuration (virtio 1.2, 5.5.4).
    #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Config {
        /// Pages the host wants in the balloon.
        pub num_pages: u32,
        /// Pages that the guest says are in it.
        pub actual: u32,
    }
    assert_layout!(Config, size = 8, num_pages = 0, actual = 4);
}
