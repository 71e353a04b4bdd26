//! Scheduling and shutdown (`xen/include/public/sched.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// First argument of `Hypercall::SCHED_OP` (`SCHEDOP_*`).
    pub enum SchedOp: u32 {
        /// Gives up the time slice. No argument.
        YIELD = 0,
        /// Unmasks events and sleeps until one is pending. No argument.
        BLOCK = 1,
        /// Ends the domain; the argument points at [`Shutdown`].
        SHUTDOWN = 2,
        /// Sleeps until one of some ports is pending, masked or not; the argument points at [`Poll`].
        POLL = 3,
        /// Latches the reason of a later shutdown; the argument points at [`Shutdown`].
        SHUTDOWN_CODE = 5,
        /// Arms a watchdog; the argument points at [`Watchdog`].
        WATCHDOG = 6,
    }
}

open_enum! {
    /// Why a domain shuts down (`SHUTDOWN_*`).
    pub enum ShutdownReason: u32 {
        /// A normal end.
        POWEROFF = 0,
        /// End and start anew.
        REBOOT = 1,
        /// Save the domain.
        SUSPEND = 2,
        /// The guest has crashed.
        CRASH = 3,
        /// A watchdog expired.
        WATCHDOG = 4,
        /// Keep memory, reset everything else.
        SOFT_RESET = 5,
    }
}

/// Argument of [`SchedOp::SHUTDOWN`]: passed by pointer, never by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Shutdown {
    /// Why.
    pub reason: ShutdownReason,
}
assert_layout!(Shutdown, size = 4, reason = 0);

/// Argument of [`SchedOp::POLL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Poll {
    /// Address of an array of ports.
    pub ports: u64,
    /// Its length.
    pub nr_ports: u32,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Absolute system time in nanoseconds; 0 for none.
    pub timeout: u64,
}
assert_layout!(Poll, size = 24, ports = 0, nr_ports = 8, timeout = 16);

/// Argument of [`SchedOp::WATCHDOG`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Watchdog {
    /// 0 allocates one; else the one to change.
    pub id: u32,
    /// Seconds; 0 destroys it.
    pub timeout: u32,
}
assert_layout!(Watchdog, size = 8, id = 0, timeout = 4);
