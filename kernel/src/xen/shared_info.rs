//! The page that every Xen guest shares with the hypervisor: events, time, the first CPU's event mask.
//!
//! `struct shared_info` (`xen/include/public/xen.h`), seen as atomics because Xen writes it at any
//! time. It lies in a page of the image, so that it can be used before there is an allocator: a PV
//! guest maps the machine frame there, a PVH guest has Xen put the frame under that address
//! ([`crate::platform::xen_pv`], [`crate::platform::xen_pvh`]). Until then it is ordinary memory in
//! which events are masked.
// UNSAFETY: gives the page an unmangled name, for the assembly of the way out of traps.
#![cfg_attr(target_os = "none", expect(unsafe_code, reason = "an unmangled symbol"))]

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use janus_proto::evtchn::{PortBits, VcpuBits};
use janus_proto::pvclock;

/// CPUs whose `vcpu_info` lies in the shared page (`XEN_LEGACY_MAX_VCPUS`).
pub const LEGACY_MAX_VCPUS: usize = 32;
/// Words in each event bitmap of the 2-level ABI.
pub const EVENT_WORDS: usize = 64;

/// `struct vcpu_info`: what Xen and one CPU tell each other.
#[derive(Debug)]
#[repr(C)]
pub struct VcpuInfo {
    /// Set by Xen when some bit of `evtchn_pending_sel` is; cleared by the guest.
    pub evtchn_upcall_pending: AtomicU8,
    /// While not 0, Xen makes no upcall to this CPU (PV only; PVH has the interrupt flag).
    pub evtchn_upcall_mask: AtomicU8,
    _pad: [u8; 6],
    /// Which words of the pending bitmap to look at.
    pub evtchn_pending_sel: AtomicU64,
    /// Fault address of the last page fault (PV).
    pub cr2: AtomicU64,
    _pad_arch: u64,
    /// `struct vcpu_time_info`, as words for [`janus_proto::pvclock`].
    pub time: [AtomicU32; pvclock::TIME_INFO_WORDS],
}
janus_proto::assert_layout!(VcpuInfo, size = 64, evtchn_pending_sel = 8, cr2 = 16, time = 32);

/// `struct shared_info`, in a page of its own.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct SharedInfo {
    /// One for each of the first CPUs.
    pub vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS],
    /// Events that happened.
    pub evtchn_pending: [AtomicU64; EVENT_WORDS],
    /// Events that must not cause an upcall.
    pub evtchn_mask: [AtomicU64; EVENT_WORDS],
    /// The wall clock at system time 0: version, seconds, nanoseconds, high word of the seconds.
    pub wall_clock: [AtomicU32; 4],
}
janus_proto::assert_layout!(
    SharedInfo,
    size = 4096,
    evtchn_pending = 2048,
    evtchn_mask = 2560,
    wall_clock = 3072
);

impl VcpuInfo {
    /// One with events masked.
    pub(crate) const fn new() -> Self {
        Self {
            evtchn_upcall_pending: AtomicU8::new(0),
            evtchn_upcall_mask: AtomicU8::new(1),
            _pad: [0; 6],
            evtchn_pending_sel: AtomicU64::new(0),
            cr2: AtomicU64::new(0),
            _pad_arch: 0,
            time: [const { AtomicU32::new(0) }; pvclock::TIME_INFO_WORDS],
        }
    }
}

/// The page. In a writable section of its own page, since its frame is exchanged.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
pub static SHARED_INFO: SharedInfo = SharedInfo {
    vcpu_info: [const { VcpuInfo::new() }; LEGACY_MAX_VCPUS],
    evtchn_pending: [const { AtomicU64::new(0) }; EVENT_WORDS],
    evtchn_mask: [const { AtomicU64::new(0) }; EVENT_WORDS],
    wall_clock: [const { AtomicU32::new(0) }; 4],
};

impl SharedInfo {
    /// The event bits of all ports.
    #[must_use]
    pub fn ports(&self) -> PortBits<'_> {
        PortBits { pending: &self.evtchn_pending, mask: &self.evtchn_mask }
    }
}

impl VcpuInfo {
    /// The event bits of this CPU.
    #[must_use]
    pub fn bits(&self) -> VcpuBits<'_> {
        VcpuBits { upcall_pending: &self.evtchn_upcall_pending, selector: &self.evtchn_pending_sel }
    }
}

/// The boot CPU's part of the page. Other CPUs have theirs elsewhere: see [`crate::percpu::vcpu`].
#[inline]
#[must_use]
pub fn boot_vcpu() -> &'static VcpuInfo {
    let [boot, ..] = &SHARED_INFO.vcpu_info;
    boot
}
