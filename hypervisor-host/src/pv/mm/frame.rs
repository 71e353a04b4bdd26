//! What Xen knows of a frame: whose it is, what it is used as, and how often (`struct page_info`).

use zerocopy::FromZeros;

/// What a frame is used as. A frame is one thing at a time, as long as anybody uses it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros)]
#[repr(u8)]
pub enum Kind {
    /// Nothing in particular.
    None = 0,
    /// A page table whose entries are pages.
    L1 = 1,
    /// A page table of level 2.
    L2 = 2,
    /// A page table of level 3.
    L3 = 3,
    /// A top page table.
    L4 = 4,
    /// Descriptors of a GDT or LDT.
    Segments = 5,
    /// Something that the guest can write.
    Writable = 6,
}

impl Kind {
    /// The page table of a level.
    pub(crate) fn table(level: u8) -> Option<Self> {
        Some(match level {
            1 => Self::L1,
            2 => Self::L2,
            3 => Self::L3,
            4 => Self::L4,
            _ => return None,
        })
    }

    /// Whether it is a page table.
    #[must_use]
    pub fn is_table(self) -> bool {
        self.level().is_some()
    }

    /// The level of a page table.
    pub(crate) fn level(self) -> Option<u8> {
        Some(match self {
            Self::L1 => 1,
            Self::L2 => 2,
            Self::L3 => 3,
            Self::L4 => 4,
            _ => return None,
        })
    }
}

/// Whose a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros)]
#[repr(u8)]
pub(crate) enum Owner {
    /// The guest's.
    Guest = 0,
    /// The guest's still, until its last user is gone; it gave it back.
    Leaving = 1,
    /// Nobody's.
    Free = 2,
    /// Xen's, and the guest may map it writable: shared info, grant table.
    Shared = 3,
    /// Xen's, and nobody else's business.
    Hidden = 4,
}

/// One frame. All zeroes is an unused frame of the guest's, so that a table of them costs nothing until it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromZeros)]
pub(crate) struct Frame {
    /// Everybody who names it: entries, pins, CPUs, grants.
    pub(crate) references: u32,
    /// Of them, those who use it as `kind`.
    pub(crate) uses: u32,
    /// As a page table: entries in it that name another table of its own level, or (negative) such entries that
    /// name it (`linear_pt_count`).
    pub(crate) linear: i32,
    pub(crate) kind: Kind,
    pub(crate) owner: Owner,
    /// The contents were checked; they can only be changed by hypercall.
    pub(crate) validated: bool,
    /// The guest asked for it to stay a page table (`MMUEXT_PIN_*`): one use and one reference.
    pub(crate) pinned: bool,
}
