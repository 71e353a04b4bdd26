//! One entry of a page table, and what Xen lets be in it (`xen/arch/x86/include/asm/x86_64/page.h`).

use janus_proto::addr::Mfn;

/// Page table levels, from the one whose entries are pages.
pub(crate) const LEVELS: u8 = 4;
/// Entries of a table.
pub(crate) const ENTRIES: usize = 512;

/// An entry of a page table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry(pub u64);

impl Entry {
    pub(crate) const PRESENT: u64 = 1 << 0;
    pub(crate) const WRITE: u64 = 1 << 1;
    pub(crate) const USER: u64 = 1 << 2;
    pub(crate) const ACCESSED: u64 = 1 << 5;
    pub(crate) const DIRTY: u64 = 1 << 6;
    const GLOBAL: u64 = 1 << 8;
    /// Xen's mark of a page without `USER`: all pages of a 64-bit guest have that bit in truth.
    const GUEST_KERNEL: u64 = 1 << 52;
    pub(crate) const NO_EXECUTE: u64 = 1 << 63;
    /// The bits of the frame number.
    pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;
    /// Write-through, uncached, large or PAT, global (`BASE_DISALLOW_MASK`).
    const DISALLOWED: u64 = 0x198;
    /// Bits whose change takes no new reference (`FASTPATH_FLAG_WHITELIST`).
    const SOFT: u64 = Self::NO_EXECUTE
        | (0x7ff << 52)
        | 0xe00
        | Self::GLOBAL
        | Self::DIRTY
        | Self::ACCESSED
        | Self::USER;

    pub(crate) fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }
    pub(crate) fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
    pub(crate) fn frame(self) -> Mfn {
        Mfn((self.0 & Self::FRAME) >> 12)
    }

    /// Whether it has bits that a guest may not set at this level.
    pub(crate) fn is_disallowed(self, level: u8) -> bool {
        let mask = if level == 1 { Self::DISALLOWED & !Self::GLOBAL } else { Self::DISALLOWED };
        self.0 & mask != 0
    }

    /// Whether it can replace `old` without new references.
    pub(crate) fn same_page(self, old: Self) -> bool {
        old.is_present() && (self.0 ^ old.0) & !Self::SOFT == 0
    }

    /// Whether the CPU may do less with it than with `old`, or must be asked again: bits taken away.
    pub(crate) fn restricts(self, old: Self) -> bool {
        let grants = Self::PRESENT | Self::WRITE | Self::ACCESSED | Self::DIRTY;
        old.is_present()
            && (self.frame() != old.frame()
                || old.0 & !self.0 & grants != 0
                || self.0 & !old.0 & Self::NO_EXECUTE != 0)
    }

    /// As Xen writes it (`adjust_guest_l1e` and its like): everything of a 64-bit guest is `USER`.
    pub(crate) fn adjusted(self, level: u8) -> Self {
        if !self.is_present() {
            return self;
        }
        match level {
            // Xen copies top tables for its CPUs, and cannot see which entries those use.
            4 => return Self(self.0 | Self::USER | Self::ACCESSED),
            2 | 3 => return Self(self.0 | Self::USER),
            _ => {}
        }
        let mut bits = self.0;
        if bits & Self::USER == 0 {
            bits |= Self::GUEST_KERNEL | Self::USER;
        }
        if bits & Self::GUEST_KERNEL == 0 {
            bits |= Self::GLOBAL | Self::USER;
        }
        Self(bits)
    }
}

/// Whether an entry of the top table is the guest's: not one of Xen's 16 (`is_guest_l4_slot`).
pub(crate) fn is_guest_slot(slot: usize) -> bool {
    !(256..272).contains(&slot)
}

/// Whether an address lies outside Xen's part and is canonical (`__addr_ok`).
pub(crate) fn is_guest_address(address: u64) -> bool {
    !(0x0000_8000_0000_0000..0xffff_8800_0000_0000).contains(&address)
}

/// The index of `address` in its table of `level`.
pub(crate) fn index(address: u64, level: u8) -> usize {
    usize::try_from((address >> (12 + 9 * (u32::from(level) - 1))) & 511).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xen_marks_what_is_the_kernels() {
        let kernel = Entry(0x1000 | Entry::PRESENT).adjusted(1);
        assert_eq!(kernel.0, 0x1000 | Entry::PRESENT | Entry::USER | Entry::GUEST_KERNEL);
        assert_eq!(kernel.adjusted(1), kernel);
        let user = Entry(0x1000 | Entry::PRESENT | Entry::USER).adjusted(1);
        assert_eq!(user.0, 0x1000 | Entry::PRESENT | Entry::USER | Entry::GLOBAL);
        assert_eq!(Entry(0x1000).adjusted(1).0, 0x1000);
    }

    #[test]
    fn large_and_uncached_pages_are_disallowed() {
        for bit in [3, 4, 7] {
            for level in 1..=LEVELS {
                assert!(Entry(1 << bit | 1).is_disallowed(level), "bit {bit} at level {level}");
            }
        }
        assert!(!Entry(Entry::GLOBAL).is_disallowed(1) && Entry(Entry::GLOBAL).is_disallowed(2));
        assert!(!Entry(Entry::NO_EXECUTE | 0xe67).is_disallowed(1));
    }
}
