//! Event channels (`xen/include/public/event_channel.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::abi::xen::Virq;
use crate::addr::{DomId, Port};

open_enum! {
    /// First argument of `Hypercall::EVENT_CHANNEL_OP` (`EVTCHNOP_*`); the second points at the structure named.
    pub enum EventChannelOp: u32 {
        /// [`BindInterdomain`].
        BIND_INTERDOMAIN = 0,
        /// [`BindVirq`].
        BIND_VIRQ = 1,
        /// [`BindPirq`].
        BIND_PIRQ = 2,
        /// [`Close`].
        CLOSE = 3,
        /// [`Send`].
        SEND = 4,
        /// [`Status`].
        STATUS = 5,
        /// [`AllocUnbound`].
        ALLOC_UNBOUND = 6,
        /// [`BindIpi`].
        BIND_IPI = 7,
        /// [`BindVcpu`].
        BIND_VCPU = 8,
        /// [`Unmask`].
        UNMASK = 9,
        /// [`Reset`].
        RESET = 10,
        /// [`InitControl`].
        INIT_CONTROL = 11,
        /// [`ExpandArray`].
        EXPAND_ARRAY = 12,
        /// [`SetPriority`].
        SET_PRIORITY = 13,
    }
}

/// Makes a port that `remote_dom` may bind to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AllocUnbound {
    /// Whose port: normally `DomId::SELF`.
    pub dom: DomId,
    /// Who may bind.
    pub remote_dom: DomId,
    /// OUT: the port.
    pub port: Port,
}
assert_layout!(AllocUnbound, size = 8, dom = 0, remote_dom = 2, port = 4);

/// Connects to a port that another domain allocated for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindInterdomain {
    /// Whose port.
    pub remote_dom: DomId,
    /// Padding; zero.
    pub pad0: [u8; 2],
    /// Its port.
    pub remote_port: Port,
    /// OUT: ours.
    pub local_port: Port,
}
assert_layout!(BindInterdomain, size = 12, remote_dom = 0, remote_port = 4, local_port = 8);

/// Binds a virtual interrupt of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVirq {
    /// Which.
    pub virq: Virq,
    /// Of which vCPU.
    pub vcpu: u32,
    /// OUT: the port.
    pub port: Port,
}
assert_layout!(BindVirq, size = 12, virq = 0, vcpu = 4, port = 8);

/// Binds a physical interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindPirq {
    /// Which.
    pub pirq: u32,
    /// 1: shared.
    pub flags: u32,
    /// OUT: the port.
    pub port: Port,
}
assert_layout!(BindPirq, size = 12, pirq = 0, flags = 4, port = 8);

/// Makes a port for signals to a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindIpi {
    /// Which.
    pub vcpu: u32,
    /// OUT: the port.
    pub port: Port,
}
assert_layout!(BindIpi, size = 8, vcpu = 0, port = 4);

/// Closes a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Close {
    /// Which.
    pub port: Port,
}
assert_layout!(Close, size = 4, port = 0);

/// Signals the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Send {
    /// Our end.
    pub port: Port,
}
assert_layout!(Send, size = 4, port = 0);

open_enum! {
    /// State of a channel (`EVTCHNSTAT_*`).
    pub enum ChannelStatus: u32 {
        /// Not in use.
        CLOSED = 0,
        /// Waiting for the other domain.
        UNBOUND = 1,
        /// Connected.
        INTERDOMAIN = 2,
        /// A physical interrupt.
        PIRQ = 3,
        /// A virtual interrupt.
        VIRQ = 4,
        /// A signal between vCPUs.
        IPI = 5,
    }
}

/// Asks for the state of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Status {
    /// Whose port.
    pub dom: DomId,
    /// Padding; zero.
    pub pad0: [u8; 2],
    /// Which.
    pub port: Port,
    /// OUT: its state.
    pub status: ChannelStatus,
    /// OUT: the vCPU it signals.
    pub vcpu: u32,
    /// OUT: remote domain (low 16 bits; unbound, interdomain), pirq or virq.
    pub arg0: u32,
    /// OUT: remote port (interdomain).
    pub arg1: u32,
}
assert_layout!(Status, size = 24, dom = 0, port = 4, status = 8, vcpu = 12, arg0 = 16, arg1 = 20);

/// Moves a port to another vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVcpu {
    /// Which.
    pub port: Port,
    /// To which vCPU.
    pub vcpu: u32,
}
assert_layout!(BindVcpu, size = 8, port = 0, vcpu = 4);

/// Unmasks a port, and delivers it if it is pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Unmask {
    /// Which.
    pub port: Port,
}
assert_layout!(Unmask, size = 4, port = 0);

/// Closes all ports of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reset {
    /// Whose.
    pub dom: DomId,
}
assert_layout!(Reset, size = 2, dom = 0);

/// Registers the control block of the FIFO interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitControl {
    /// Its frame.
    pub control_gfn: u64,
    /// Offset in the frame.
    pub offset: u32,
    /// Of which vCPU.
    pub vcpu: u32,
    /// OUT: bits of a link.
    pub link_bits: u8,
    /// Padding; zero.
    pub pad0: [u8; 7],
}
assert_layout!(InitControl, size = 24, control_gfn = 0, offset = 8, vcpu = 12, link_bits = 16);

/// Adds a page of event words (FIFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExpandArray {
    /// Its frame.
    pub array_gfn: u64,
}
assert_layout!(ExpandArray, size = 8, array_gfn = 0);

/// Sets a priority (FIFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetPriority {
    /// Which.
    pub port: Port,
    /// 0 highest to 15 lowest; 7 by default.
    pub priority: u32,
}
assert_layout!(SetPriority, size = 8, port = 0, priority = 4);

/// Ports of the two-level interface on a 64-bit guest.
pub const EVTCHN_2L_NR_CHANNELS: u32 = 4096;

/// Ports of the FIFO interface.
pub const EVTCHN_FIFO_NR_CHANNELS: u32 = 1 << 17;
