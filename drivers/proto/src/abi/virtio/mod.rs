//! virtio 1.2: status and feature bits, split virtqueue, PCI capabilities, MMIO registers, device configurations.
//!
//! Everything is little-endian, as is the only architecture of this kernel. Section numbers are those of
//! "Virtual I/O Device (VIRTIO) Version 1.2".

pub mod balloon;
pub mod blk;
pub mod console;
pub mod net;
pub mod rng;

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
    /// `VendorID`, R.
    pub const VENDOR_ID: usize = 0x00c;
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
    /// `SHMSel`, W.
    pub const SHM_SEL: usize = 0x0ac;
    /// `SHMLenLow`, R; the high half follows.
    pub const SHM_LEN: usize = 0x0b0;
    /// `SHMBaseLow`, R; the high half follows.
    pub const SHM_BASE: usize = 0x0b8;
    /// `ConfigGeneration`, R.
    pub const CONFIG_GENERATION: usize = 0x0fc;
    /// Device-specific configuration.
    pub const CONFIG: usize = 0x100;
    /// Bytes of registers with the smallest configuration, the size of every window.
    pub const WINDOW: usize = 0x200;
}
