//! The page that every Xen guest shares with the hypervisor: events, time, this CPU's event mask.
//!
//! `struct shared_info` (`xen/include/public/xen.h`), seen as atomics because Xen writes it at any
//! time. It lies in a page of the image, so that it can be used before there is an allocator: a PV
//! guest maps the machine frame there, a PVH guest has Xen put the frame under that address
//! ([`crate::platform::xen_pv`], [`crate::platform::xen_pvh`]). Until then it is ordinary memory in
//! which events are masked.
// UNSAFETY: gives the page an unmangled name, for the assembly of the way out of traps.
#![cfg_attr(target_os = "none", expect(unsafe_code, reason = "an unmangled symbol"))]

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

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
    /// `struct vcpu_time_info`.
    pub time: VcpuTimeInfo,
}
janus_proto::assert_layout!(VcpuInfo, size = 64, evtchn_pending_sel = 8, cr2 = 16, time = 32);

/// `struct vcpu_time_info`, the same structure as KVM's pvclock.
#[derive(Debug)]
#[repr(C)]
pub struct VcpuTimeInfo {
    /// Odd while Xen writes.
    pub version: AtomicU32,
    _pad0: u32,
    /// Counter value at `system_time`.
    pub tsc_timestamp: AtomicU64,
    /// Nanoseconds since the host booted.
    pub system_time: AtomicU64,
    /// Nanoseconds per (shifted) tick, as a fraction of 2^32.
    pub tsc_to_system_mul: AtomicU32,
    /// `tsc_shift` (a signed byte), `flags`, and two bytes of padding.
    pub shift_and_flags: AtomicU32,
}
janus_proto::assert_layout!(VcpuTimeInfo, size = 32, tsc_timestamp = 8, system_time = 16, tsc_to_system_mul = 24);

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
    /// Odd while Xen writes the wall clock.
    pub wc_version: AtomicU32,
    /// Wall clock at system time 0: seconds since the UNIX epoch, low half.
    pub wc_sec: AtomicU32,
    /// And nanoseconds.
    pub wc_nsec: AtomicU32,
    /// And the high half of the seconds.
    pub wc_sec_hi: AtomicU32,
}
janus_proto::assert_layout!(SharedInfo, size = 4096, evtchn_pending = 2048, evtchn_mask = 2560, wc_version = 3072);

impl VcpuInfo {
    const fn new() -> Self {
        Self {
            evtchn_upcall_pending: AtomicU8::new(0),
            evtchn_upcall_mask: AtomicU8::new(1),
            _pad: [0; 6],
            evtchn_pending_sel: AtomicU64::new(0),
            cr2: AtomicU64::new(0),
            _pad_arch: 0,
            time: VcpuTimeInfo {
                version: AtomicU32::new(0),
                _pad0: 0,
                tsc_timestamp: AtomicU64::new(0),
                system_time: AtomicU64::new(0),
                tsc_to_system_mul: AtomicU32::new(0),
                shift_and_flags: AtomicU32::new(0),
            },
        }
    }
}

/// The page. In a writable section of its own page, since its frame is exchanged.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
pub static SHARED_INFO: SharedInfo = SharedInfo {
    vcpu_info: [const { VcpuInfo::new() }; LEGACY_MAX_VCPUS],
    evtchn_pending: [const { AtomicU64::new(0) }; EVENT_WORDS],
    evtchn_mask: [const { AtomicU64::new(0) }; EVENT_WORDS],
    wc_version: AtomicU32::new(0),
    wc_sec: AtomicU32::new(0),
    wc_nsec: AtomicU32::new(0),
    wc_sec_hi: AtomicU32::new(0),
};

/// The boot CPU's part of the page. Other CPUs find theirs by number.
#[inline]
#[must_use]
pub fn boot_vcpu() -> &'static VcpuInfo {
    let [boot, ..] = &SHARED_INFO.vcpu_info;
    boot
}
