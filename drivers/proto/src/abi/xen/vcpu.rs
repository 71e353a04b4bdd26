//! Virtual CPUs (`xen/include/public/vcpu.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// First argument of `Hypercall::VCPU_OP` (`VCPUOP_*`): operation, vCPU, pointer to the structure named.
    pub enum VcpuOp: u32 {
        /// PV: `trap::VcpuGuestContext`.
        INITIALISE = 0,
        /// Starts the vCPU.
        UP = 1,
        /// Stops it.
        DOWN = 2,
        /// Answers 1 or 0.
        IS_UP = 3,
        /// [`RunstateInfo`], OUT.
        GET_RUNSTATE_INFO = 4,
        /// [`RegisterMemoryArea`] with [`RunstateInfo`].
        REGISTER_RUNSTATE_MEMORY_AREA = 5,
        /// Nanoseconds as `u64`.
        SET_PERIODIC_TIMER = 6,
        /// No argument.
        STOP_PERIODIC_TIMER = 7,
        /// [`SetSingleshotTimer`].
        SET_SINGLESHOT_TIMER = 8,
        /// No argument.
        STOP_SINGLESHOT_TIMER = 9,
        /// [`RegisterVcpuInfo`].
        REGISTER_VCPU_INFO = 10,
        /// No argument.
        SEND_NMI = 11,
        /// Physical CPU (dom0 with pinned vCPUs).
        GET_PHYSID = 12,
        /// [`RegisterMemoryArea`] with `VcpuTimeInfo`.
        REGISTER_VCPU_TIME_MEMORY_AREA = 13,
    }
}

open_enum! {
    /// What a vCPU is doing (`RUNSTATE_*`).
    pub enum Runstate: u32 {
        /// On a physical CPU.
        RUNNING = 0,
        /// Waiting for one: stolen time.
        RUNNABLE = 1,
        /// Idle.
        BLOCKED = 2,
        /// Paused or down: stolen time too.
        OFFLINE = 3,
    }
}

/// Time spent in each [`Runstate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RunstateInfo {
    /// Now.
    pub state: Runstate,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Since when, system time; bit 63 says that an update is in progress.
    pub state_entry_time: u64,
    /// Nanoseconds in each state.
    pub time: [u64; 4],
}
assert_layout!(RunstateInfo, size = 48, state = 0, state_entry_time = 8, time = 16);

/// Bit of [`RunstateInfo::state_entry_time`] while Xen updates it.
pub const XEN_RUNSTATE_UPDATE: u64 = 1 << 63;

/// Address of an area that Xen keeps updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegisterMemoryArea {
    /// Guest virtual address.
    pub addr: u64,
}
assert_layout!(RegisterMemoryArea, size = 8, addr = 0);

open_flags! {
    /// Flags of [`SetSingleshotTimer`].
    pub struct SingleshotFlags: u32 {
        /// Answer `ETIME` if the time has passed.
        const FUTURE = 1;
    }
}

/// Arms the one-shot timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetSingleshotTimer {
    /// Absolute system time in nanoseconds.
    pub timeout_abs_ns: u64,
    /// Flags.
    pub flags: SingleshotFlags,
    /// Padding; zero.
    pub pad0: [u8; 4],
}
assert_layout!(SetSingleshotTimer, size = 16, timeout_abs_ns = 0, flags = 8);

/// Moves the `VcpuInfo` of a vCPU out of the shared info page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegisterVcpuInfo {
    /// Frame (machine frame under PV).
    pub mfn: u64,
    /// Offset in the frame.
    pub offset: u32,
    /// Zero.
    pub rsvd: u32,
}
assert_layout!(RegisterVcpuInfo, size = 16, mfn = 0, offset = 8, rsvd = 12);
