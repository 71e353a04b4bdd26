//! The page shared with Xen (`xen/include/public/xen.h`, `arch-x86/xen.h`).
//!
//! See `crate::evtchn` and `crate::pvclock` for how to read it: all of it changes at any time.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_flags! {
    /// [`VcpuTimeInfo::flags`].
    pub struct TimeFlags: u8 {
        /// The time is the same on all vCPUs (`XEN_PVCLOCK_TSC_STABLE_BIT`).
        const TSC_STABLE = 1 << 0;
        /// The guest was paused (`XEN_PVCLOCK_GUEST_STOPPED`).
        const GUEST_STOPPED = 1 << 1;
    }
}

/// The clock of a vCPU; KVM uses the same structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuTimeInfo {
    /// Odd while it is being updated.
    pub version: u32,
    /// Zero.
    pub pad0: u32,
    /// TSC at the last update.
    pub tsc_timestamp: u64,
    /// Nanoseconds at the last update.
    pub system_time: u64,
    /// Nanoseconds in a shifted TSC tick, times 2^32.
    pub tsc_to_system_mul: u32,
    /// Shift of TSC ticks, negative to the right.
    pub tsc_shift: i8,
    /// Flags.
    pub flags: TimeFlags,
    /// Zero.
    pub pad1: [u8; 2],
}
assert_layout!(
    VcpuTimeInfo,
    size = 32,
    version = 0,
    pad0 = 4,
    tsc_timestamp = 8,
    system_time = 16,
    tsc_to_system_mul = 24,
    tsc_shift = 28,
    flags = 29,
    pad1 = 30
);

/// Event delivery and clock of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuInfo {
    /// Set by Xen when an event is pending.
    pub evtchn_upcall_pending: u8,
    /// 1: no upcalls (PV).
    pub evtchn_upcall_mask: u8,
    /// Padding; zero.
    pub pad0: [u8; 6],
    /// Which words of `evtchn_pending` to look at.
    pub evtchn_pending_sel: u64,
    /// Fault address (PV).
    pub cr2: u64,
    /// Zero.
    pub arch_pad: u64,
    /// Clock.
    pub time: VcpuTimeInfo,
}
assert_layout!(
    VcpuInfo,
    size = 64,
    evtchn_upcall_pending = 0,
    evtchn_upcall_mask = 1,
    evtchn_pending_sel = 8,
    cr2 = 16,
    arch_pad = 24,
    time = 32
);

/// What tools need to find the memory of a PV guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ArchSharedInfo {
    /// Entries in the p2m.
    pub max_pfn: u64,
    /// Machine frame of the root of the p2m tree.
    pub pfn_to_mfn_frame_list_list: u64,
    /// Why an NMI came (dom0).
    pub nmi_reason: u64,
    /// Page table in which `p2m_vaddr` is valid.
    pub p2m_cr3: u64,
    /// Virtual address of the linear p2m.
    pub p2m_vaddr: u64,
    /// Odd while the p2m mapping changes.
    pub p2m_generation: u64,
}
assert_layout!(
    ArchSharedInfo,
    size = 48,
    max_pfn = 0,
    pfn_to_mfn_frame_list_list = 8,
    nmi_reason = 16,
    p2m_cr3 = 24,
    p2m_vaddr = 32,
    p2m_generation = 40
);

/// The shared info page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SharedInfo {
    /// Of the first 32 vCPUs.
    pub vcpu_info: [VcpuInfo; 32],
    /// Pending bits of the ports.
    pub evtchn_pending: [u64; 64],
    /// Mask bits of the ports.
    pub evtchn_mask: [u64; 64],
    /// Odd while the wall clock is being updated.
    pub wc_version: u32,
    /// Wall clock at system time 0, seconds since 1970, low word.
    pub wc_sec: u32,
    /// Its nanoseconds.
    pub wc_nsec: u32,
    /// Its high word.
    pub wc_sec_hi: u32,
    /// For tools.
    pub arch: ArchSharedInfo,
}
assert_layout!(
    SharedInfo,
    size = 3136,
    vcpu_info = 0,
    evtchn_pending = 2048,
    evtchn_mask = 2560,
    wc_version = 3072,
    wc_sec = 3076,
    wc_nsec = 3080,
    wc_sec_hi = 3084,
    arch = 3088
);
