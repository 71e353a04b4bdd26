//! From a virtual address to a physical one, by the guest's page tables (Intel SDM volume 3, 4.5).

use std::sync::atomic::Ordering;

use janus_proto::addr::{Mfn, PAGE_SHIFT};

use crate::machine::ram::Ram;

const PRESENT: u64 = 1;
const HUGE: u64 = 1 << 7;
/// The frame in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where an address leads; `None`: nowhere, or to tables that are not in memory.
pub(super) fn translate(ram: &Ram, cr3: u64, levels: u32, address: u64) -> Option<u64> {
    let mut table = cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = usize::try_from(address >> shift & 0x1ff).ok()?;
        let entry = ram.frame(Mfn(table >> PAGE_SHIFT))?.get(index)?.load(Ordering::Relaxed);
        if entry & PRESENT == 0 {
            return None;
        }
        let is_page = level == 0 || (level < 3 && entry & HUGE != 0);
        if is_page {
            let inside = (1 << shift) - 1;
            return Some(entry & ADDRESS & !inside | address & inside);
        }
        table = entry & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ram::Numbering;

    #[test]
    fn pages_of_every_size_are_found_and_nothing_else() {
        let numbering = Numbering { first: Mfn(0), below: u64::MAX, above: Mfn(u64::MAX) };
        let ram = Ram::with_numbering(8, numbering, 0).unwrap();
        let set = |frame: u64, index: usize, entry: u64| {
            ram.frame(Mfn(frame)).unwrap()[index].store(entry, Ordering::Relaxed);
        };
        set(1, 0, 0x2001);
        set(2, 0, 0x3001);
        set(2, 1, 0x1_4000_0000 | HUGE | PRESENT);
        set(3, 0, 0x4001);
        set(3, 1, 0x60_0000 | HUGE | PRESENT);
        set(4, 5, 0x8000_0000_0000_7000 | PRESENT);
        set(1, 9, 0x7_0000_0001);
        let walk = |address| translate(&ram, 0x1000, 4, address);
        assert_eq!(walk(0x5123), Some(0x7123));
        assert_eq!(walk(0x20_0000 + 0x1_2345), Some(0x61_2345));
        assert_eq!(walk(0x4000_0000 + 0x123_4567), Some(0x1_4123_4567));
        for nowhere in [0x6000, 0x40_0000, 0x8000_0000, 9 << 39, 1 << 40] {
            assert_eq!(walk(nowhere), None, "{nowhere:#x}");
        }
        assert_eq!(translate(&ram, 0x100_0000, 4, 0), None);
    }
}
