//! The first state of the first CPU, as each door has it.
//!
//! Ref: `xen/include/public/arch-x86/hvm/start_info.h` (PVH); Linux `Documentation/arch/x86/boot.rst`, 64-bit protocol.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout;

/// CR0: protection, and the extension type that is always on.
const PROTECTED: u64 = 1 << 0 | 1 << 4;
const PAGING: u64 = 1 << 31;
/// CR4: physical address extension.
const PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const LONG: u64 = 1 << 8 | 1 << 10;

/// How the guest is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit, by the PVH note, with the address of `hvm_start_info`.
    Pvh {
        /// Where.
        rip: u64,
        /// What it is told.
        start_info: u64,
    },
    /// 64-bit, by Linux's protocol, with the address of `boot_params`.
    Linux {
        /// Where.
        rip: u64,
        /// What it is told.
        boot_params: u64,
    },
}

/// Descriptors of the Linux entry: code at 0x10 and data at 0x18, as its protocol wants.
pub(crate) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..kvm_segment::default()
    }
}

/// Changes the state after a reset into that of `entry`.
pub(crate) fn set_special(registers: &mut kvm_sregs, entry: Entry) {
    let long = matches!(entry, Entry::Linux { .. });
    let (code, data) = if long { (0x10, 0x18) } else { (0x8, 0x10) };
    registers.cs = flat(code, 0xb, long);
    let data = flat(data, 0x3, false);
    (registers.ds, registers.es, registers.ss) = (data, data, data);
    (registers.fs, registers.gs) = (data, data);
    // A 32-bit busy task segment, as PVH asks for.
    registers.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..kvm_segment::default() };
    registers.cr0 = PROTECTED;
    if long {
        registers.gdt.base = layout::GDT;
        registers.gdt.limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(0);
        registers.cr0 |= PAGING;
        registers.cr3 = layout::PAGE_TABLES;
        registers.cr4 = PAE;
        registers.efer = LONG;
    }
}

/// The general registers of `entry`.
pub(crate) fn general(entry: Entry) -> kvm_regs {
    let start = kvm_regs { rflags: 2, ..kvm_regs::default() };
    match entry {
        Entry::Pvh { rip, start_info } => kvm_regs { rip, rbx: start_info, ..start },
        Entry::Linux { rip, boot_params } => kvm_regs { rip, rsi: boot_params, ..start },
    }
}

/// The page tables of the Linux entry, page by page from [`layout::PAGE_TABLES`]: the first 4 GiB at their own
/// addresses.
pub(crate) fn page_tables() -> Vec<u64> {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 1 << 1;
    const HUGE: u64 = 1 << 7;
    let page = |index: u64| (layout::PAGE_TABLES + index * 4096) | PRESENT | WRITE;
    let mut words = vec![0; 2 * 512];
    if let Some(first) = words.first_mut() {
        *first = page(1);
    }
    for (word, index) in words.iter_mut().skip(512).zip(2..6) {
        *word = page(index);
    }
    words.extend((0..4 * 512).map(|index| index << 21 | PRESENT | WRITE | HUGE));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_map_four_gibibytes_at_their_own_addresses() {
        let words = page_tables();
        let walk = |address: u64| {
            let table =
                |entry: u64| usize::try_from(((entry & !0xfff) - layout::PAGE_TABLES) / 8).unwrap();
            let index = |shift: u32| usize::try_from(address >> shift & 0x1ff).unwrap();
            let middle = words[table(words[index(39)]) + index(30)];
            words[table(middle) + index(21)] & !0x1f_ffff
        };
        for address in [0, 0x20_0000, 0x4000_0000, 0xffff_ffff] {
            assert_eq!(walk(address), address & !0x1f_ffff, "{address:#x}");
        }
    }
}
