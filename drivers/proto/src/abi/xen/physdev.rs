//! Physical devices (`xen/include/public/physdev.h`): the few operations a guest without hardware needs.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// First argument of `Hypercall::PHYSDEV_OP` (`PHYSDEVOP_*`).
    pub enum PhysdevOp: u32 {
        /// [`SetIopl`].
        SET_IOPL = 6,
        /// [`SetIobitmap`].
        SET_IOBITMAP = 7,
        /// [`Eoi`].
        EOI = 12,
    }
}

/// Sets the I/O privilege level of this vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetIopl {
    /// 0 to 3.
    pub iopl: u32,
}
assert_layout!(SetIopl, size = 4, iopl = 0);

/// Sets the I/O bitmap of this vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetIobitmap {
    /// Its address.
    pub bitmap: u64,
    /// Ports covered.
    pub nr_ports: u32,
    /// Padding; zero.
    pub pad0: [u8; 4],
}
assert_layout!(SetIobitmap, size = 16, bitmap = 0, nr_ports = 8);

/// Ends a physical interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Eoi {
    /// Which.
    pub irq: u32,
}
assert_layout!(Eoi, size = 4, irq = 0);
