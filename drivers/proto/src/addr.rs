//! The address spaces of a paravirtualised guest, as types that do not mix.
//!
//! A Xen PV guest knows two kinds of frame number: the machine's own, and a pseudo-physical one
//! that makes its memory look contiguous (`xen/include/public/xen.h`, "machine" and "pseudo-physical").

/// Bytes in a page, the unit of every frame number.
pub const PAGE_SIZE: usize = 4096;
/// `log2` of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! number {
    ($(#[$meta:meta])* $name:ident($int:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(transparent)]
        pub struct $name(
            /// The number itself.
            pub $int,
        );
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// A guest (pseudo-physical) frame number: what the guest calls physical memory, in pages.
    Pfn(u64)
}
number! {
    /// A machine frame number: the real machine's memory, in pages. Equal to the [`Pfn`] except under Xen PV.
    Mfn(u64)
}
number! {
    /// A guest physical address in bytes; what a virtio device is given.
    Gpa(u64)
}
number! {
    /// A grant reference: an index into this domain's grant table (`grant_table.h`, `grant_ref_t`).
    GrantRef(u32)
}
number! {
    /// An event channel port of this domain (`event_channel.h`, `evtchn_port_t`).
    Port(u32)
}
number! {
    /// A domain identifier (`xen.h`, `domid_t`).
    DomId(u16)
}

impl DomId {
    /// The calling domain itself (`xen.h`, `DOMID_SELF`).
    pub const SELF: Self = Self(0x7ff0);
}

impl Pfn {
    /// The frame that holds byte address `gpa`.
    #[must_use]
    pub const fn containing(gpa: Gpa) -> Self {
        Self(gpa.0 >> PAGE_SHIFT)
    }
    /// The address of the frame's first byte.
    #[must_use]
    pub const fn start(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}
