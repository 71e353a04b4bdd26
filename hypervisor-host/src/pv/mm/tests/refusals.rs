//! What Xen refuses, one test for each reason.

use janus_proto::abi::xen::memory::{Exchange, MemoryOp, Reservation};
use janus_proto::addr::DomId;
use zerocopy::IntoBytes as _;

use super::*;

#[test]
fn a_page_table_cannot_be_mapped_writable() {
    let mut guest = Guest::new();
    for table in [ROOT, L3, L2, L1] {
        assert_eq!(guest.map(0x5000, entry(table, RW)), Err(Errno::EBUSY));
        assert_eq!(guest.update(L1, 5, entry(table, RW)), Err(Errno::EBUSY));
        assert_eq!(guest.map(0x5000, entry(table, P)), Ok(0), "but read-only it can");
    }
    audit(&guest);
}

#[test]
fn a_page_that_is_mapped_writable_cannot_become_a_page_table() {
    let mut guest = Guest::new();
    for (cmd, slot) in [
        (MmuextCmd::PIN_L1_TABLE, L2),
        (MmuextCmd::PIN_L2_TABLE, L3),
        (MmuextCmd::PIN_L3_TABLE, ROOT),
    ] {
        assert_eq!(guest.pin(cmd, 6), Err(Errno::EINVAL));
        assert_eq!(guest.update(slot, 7, entry(6, RW)), Err(Errno::EINVAL), "nor hung in");
    }
    assert_eq!(guest.pin(MmuextCmd::PIN_L4_TABLE, 6), Err(Errno::EINVAL));
    assert_eq!(guest.pin(MmuextCmd::NEW_BASEPTR, 6), Err(Errno::EINVAL));
    guest.map(0x6000, entry(6, P)).unwrap();
    assert_eq!(guest.pin(MmuextCmd::PIN_L1_TABLE, 6), Ok(0), "read-only it can");
    assert_eq!(guest.map(0x6000, entry(6, RW)), Err(Errno::EBUSY), "and then not back");
    audit(&guest);
    guest.pin(MmuextCmd::UNPIN_TABLE, 6).unwrap();
    assert_eq!(guest.map(0x6000, entry(6, RW)), Ok(0));
    audit(&guest);
}

#[test]
fn frames_of_others_cannot_be_mapped() {
    let mut guest = Guest::new();
    for foreign in [0, 5, FIRST_FRAME.0 - 1, 1 << 35, Entry::FRAME >> 12] {
        assert_eq!(guest.map(0x5000, foreign << 12 | P), Err(Errno::EPERM), "{foreign:#x}");
        assert_eq!(guest.update(L2, 5, foreign << 12 | RW), Err(Errno::EINVAL));
    }
    // The machine-to-physical table is Xen's own.
    let (table, _) = guest.memory.machine_to_physical.frames();
    assert_eq!(guest.map(0x5000, table.0 << 12 | P), Err(Errno::EPERM));
    // A frame that nobody has.
    assert_eq!(guest.map(0x5000, entry(FRAMES, P)), Err(Errno::EBUSY));
    audit(&guest);
}

#[test]
fn what_xen_shares_can_be_mapped_and_never_be_a_table() {
    let mut guest = Guest::new();
    for frame in [guest.memory.shared_info(), guest.memory.grant_frames()] {
        assert_eq!(guest.map(0x5000, frame.0 << 12 | RW), Ok(0));
        assert_eq!(guest.extended(MmuextCmd::PIN_L1_TABLE, frame.0, 0), Err(Errno::EINVAL));
        assert_eq!(guest.memory.load_gdt(0, &[frame.0], 1), Err(Errno::EINVAL));
        assert_eq!(guest.memory.remove(frame), Err(Errno::EINVAL), "nor be given back");
        audit(&guest);
    }
}

#[test]
fn bits_that_are_not_the_guests_are_refused_at_every_level() {
    let mut guest = Guest::new();
    for bit in [3, 4, 7] {
        for (table, below) in [(ROOT, L3), (L3, L2), (L2, L1), (L1, 5)] {
            let bits = P | 1 << bit;
            assert_eq!(guest.update(table, 9, entry(below, bits)), Err(Errno::EINVAL));
        }
        // Nor in a table that is only now made one.
        guest.map(0x7000, 0).unwrap();
        guest.poke(7, 3, entry(5, P | 1 << bit));
        assert_eq!(guest.pin(MmuextCmd::PIN_L1_TABLE, 7), Err(Errno::EINVAL));
        guest.poke(7, 3, 0);
        audit(&guest);
    }
    assert_eq!(
        guest.update(L2, 9, entry(L1, RW | 1 << 8)),
        Err(Errno::EINVAL),
        "global, but on pages"
    );
}

#[test]
fn a_table_is_hung_in_at_its_own_level_only() {
    let mut guest = Guest::new();
    for (table, wrong) in [(ROOT, L2), (ROOT, L1), (L3, ROOT), (L3, L1), (L2, ROOT), (L2, L3)] {
        assert_eq!(guest.update(table, 9, entry(wrong, RW)), Err(Errno::EINVAL));
        assert_eq!(guest.update(table, 9, entry(wrong, P)), Err(Errno::EINVAL));
    }
    assert_eq!(guest.pin(MmuextCmd::PIN_L1_TABLE, L2), Err(Errno::EINVAL));
    assert_eq!(guest.pin(MmuextCmd::NEW_BASEPTR, L3), Err(Errno::EINVAL));
    assert_eq!(guest.pin(MmuextCmd::NEW_USER_BASEPTR, L1), Err(Errno::EINVAL));
    audit(&guest);
}

#[test]
fn a_table_may_name_itself_read_only() {
    let mut guest = Guest::new();
    for (table, slot) in [(ROOT, 300), (L3, 301), (L2, 302)] {
        assert_eq!(guest.update(table, slot, entry(table, RW)), Err(Errno::EINVAL));
        assert_eq!(guest.update(table, slot, entry(table, P)), Ok(0));
        audit(&guest);
    }
    // The guest reads its top table through the first of them.
    let address = 0xffff_0000_0000_0000 | 300 << 39 | 300 << 30 | 300 << 21 | 300 << 12;
    let mut word = [0; 8];
    guest.memory.copy_from_guest(0, address, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), guest.peek(ROOT, 0));
    assert_eq!(guest.memory.copy_to_guest(0, address, &[0; 8]), Err(Errno::EFAULT));
    assert_eq!(guest.map(address, 0), Err(Errno::EINVAL), "that is no table of pages");
    for (table, slot) in [(ROOT, 300), (L3, 301), (L2, 302)] {
        assert_eq!(guest.update(table, slot, 0), Ok(0));
        audit(&guest);
    }
}

#[test]
fn tables_that_name_each_other_make_no_chains() {
    let mut guest = Guest::new();
    for pfn in [20, 21, 22] {
        guest.pin(MmuextCmd::PIN_L4_TABLE, pfn).unwrap();
    }
    assert_eq!(guest.update(20, 0, entry(21, RW)), Err(Errno::EINVAL), "writable");
    assert_eq!(guest.update(20, 0, entry(21, P)), Ok(0));
    assert_eq!(guest.update(20, 1, entry(21, P)), Ok(0), "twice is no chain");
    assert_eq!(guest.update(21, 0, entry(22, P)), Err(Errno::EINVAL), "21 is named so itself");
    assert_eq!(guest.update(22, 0, entry(20, P)), Err(Errno::EINVAL), "20 names others");
    audit(&guest);
    // 21 stays a table as long as 20 names it.
    guest.pin(MmuextCmd::UNPIN_TABLE, 21).unwrap();
    assert_eq!(guest.kind(21), (Kind::L4, 2));
    guest.pin(MmuextCmd::UNPIN_TABLE, 20).unwrap();
    assert_eq!(guest.kind(21).1, 0);
    audit(&guest);
}

#[test]
fn a_top_tables_slots_of_xens_cannot_be_set_and_hold_nothing() {
    let mut guest = Guest::new();
    for slot in [256, 260, 271] {
        assert_eq!(guest.update(ROOT, slot, entry(L3, RW)), Err(Errno::EINVAL));
        assert_eq!(guest.update(ROOT, slot, 0), Err(Errno::EINVAL));
    }
    assert_eq!(guest.update(ROOT, 255, entry(L3, RW)), Ok(0));
    assert_eq!(guest.update(ROOT, 272, entry(L3, RW)), Ok(0));
    // What was there before it became a table is gone: a linear entry would show it.
    guest.poke(20, 256, 0x1234 << 12 | P);
    guest.pin(MmuextCmd::PIN_L4_TABLE, 20).unwrap();
    assert_eq!(guest.peek(20, 256), 0);
    audit(&guest);
}

#[test]
fn a_bad_entry_anywhere_below_refuses_the_whole_and_takes_nothing() {
    let mut guest = Guest::new();
    // 20 > 21 > 22 > 23, with many good entries before a bad one at the bottom.
    guest.poke(20, 0, entry(21, RW));
    guest.poke(21, 0, entry(22, RW));
    guest.poke(22, 0, entry(23, RW));
    for index in 0..8 {
        guest.poke(23, usize::try_from(index).unwrap(), entry(24 + index, RW));
    }
    for bad in
        [entry(ROOT, RW), entry(24, RW | 1 << 4), 0x77 << 12 | P, entry(23, RW), entry(22, RW)]
    {
        guest.poke(23, 500, bad);
        assert!(guest.pin(MmuextCmd::PIN_L4_TABLE, 20).is_err(), "{bad:#x}");
        audit(&guest);
        for pfn in 20..FRAMES {
            assert_eq!(guest.kind(pfn).1, 0, "frame {pfn}");
        }
    }
    guest.poke(23, 500, entry(23, P));
    assert_eq!(guest.pin(MmuextCmd::PIN_L4_TABLE, 20), Ok(0));
    audit(&guest);
}

#[test]
fn pins_are_taken_once_and_given_back_once() {
    let mut guest = Guest::new();
    assert_eq!(guest.pin(MmuextCmd::PIN_L4_TABLE, ROOT), Err(Errno::EINVAL), "pinned already");
    assert_eq!(guest.pin(MmuextCmd::UNPIN_TABLE, L1), Err(Errno::EINVAL), "never was");
    assert_eq!(guest.pin(MmuextCmd::UNPIN_TABLE, 6), Err(Errno::EINVAL), "is none");
    assert_eq!(guest.pin(MmuextCmd::UNPIN_TABLE, ROOT), Ok(0));
    assert_eq!(guest.pin(MmuextCmd::UNPIN_TABLE, ROOT), Err(Errno::EINVAL));
    assert_eq!(guest.kind(ROOT), (Kind::L4, 1), "the CPU is still on it");
    for frame in [0, FIRST_FRAME.0 + 10_000, u64::MAX] {
        for cmd in [MmuextCmd::PIN_L1_TABLE, MmuextCmd::UNPIN_TABLE, MmuextCmd::NEW_BASEPTR] {
            assert_eq!(guest.extended(cmd, frame, 0), Err(Errno::EINVAL));
        }
    }
    audit(&guest);
}

#[test]
fn a_new_base_takes_the_place_of_the_old_one() {
    let mut guest = Guest::new();
    guest.poke(20, 0, entry(L3, RW));
    assert_eq!(guest.pin(MmuextCmd::NEW_BASEPTR, 20), Ok(0));
    assert_eq!((guest.kind(ROOT).1, guest.kind(20).1, guest.engine.root), (1, 1, Some(mfn(20))));
    assert_eq!(guest.pin(MmuextCmd::NEW_USER_BASEPTR, ROOT), Ok(0));
    assert_eq!(guest.kind(ROOT).1, 2);
    assert_eq!(guest.extended(MmuextCmd::NEW_USER_BASEPTR, 0, 0), Ok(0), "none at all");
    assert_eq!(guest.kind(ROOT).1, 1);
    audit(&guest);
}

#[test]
fn pages_are_cleared_and_copied_only_where_they_may_be_written() {
    let mut guest = Guest::new();
    guest.poke(6, 1, 77);
    assert_eq!(guest.extended(MmuextCmd::COPY_PAGE, mfn(7).0, mfn(6).0), Ok(0));
    assert_eq!(guest.peek(7, 1), 77);
    assert_eq!(guest.pin(MmuextCmd::CLEAR_PAGE, 7), Ok(0));
    assert_eq!(guest.peek(7, 1), 0);
    assert_eq!(guest.pin(MmuextCmd::CLEAR_PAGE, L1), Err(Errno::EINVAL));
    assert_eq!(guest.extended(MmuextCmd::COPY_PAGE, mfn(L1).0, mfn(6).0), Err(Errno::EINVAL));
    assert_eq!(guest.extended(MmuextCmd::COPY_PAGE, mfn(6).0, 5), Err(Errno::EINVAL));
    assert_eq!(
        guest.extended(MmuextCmd::COPY_PAGE, mfn(6).0, mfn(L1).0),
        Ok(0),
        "a table may be read"
    );
    audit(&guest);
}

#[test]
fn operations_that_a_guest_here_has_not_are_refused() {
    let mut guest = Guest::new();
    for (cmd, error) in [
        (12, Errno::EACCES),
        (18, Errno::EINVAL),
        (19, Errno::EOPNOTSUPP),
        (20, Errno::EOPNOTSUPP),
        (14, Errno::ENOSYS),
        (21, Errno::ENOSYS),
        (u32::MAX, Errno::ENOSYS),
    ] {
        assert_eq!(guest.extended(MmuextCmd(cmd), 0, 0), Err(error), "{cmd}");
    }
    assert_eq!(guest.extended(MmuextCmd::SET_LDT, 0x5001, 1), Err(Errno::EINVAL));
    assert_eq!(guest.extended(MmuextCmd::SET_LDT, 0x5000, 8193), Err(Errno::EINVAL));
    assert_eq!(guest.extended(MmuextCmd::SET_LDT, 0xffff_8000_0000_0000, 1), Err(Errno::EINVAL));
    assert_eq!(guest.extended(MmuextCmd::SET_LDT, 0x5000, 512), Ok(0));
    for flush in [6, 7, 10, 11] {
        assert_eq!(guest.extended(MmuextCmd(flush), 0x5000, 0), Ok(0));
    }
    for flush in [8, 9] {
        assert_eq!(guest.extended(MmuextCmd(flush), 0x5000, 0x5000), Ok(0));
        assert_eq!(
            guest.extended(MmuextCmd(flush), 0x5000, 0x1_0000),
            Err(Errno::EINVAL),
            "no mask"
        );
    }
}

#[test]
fn updates_of_what_is_no_table_need_a_page_that_may_be_written() {
    let mut guest = Guest::new();
    assert_eq!(guest.update(6, 3, 42), Ok(0));
    assert_eq!(guest.peek(6, 3), 42);
    guest.map(0x7000, entry(7, P)).unwrap();
    guest.memory.load_gdt(0, &[mfn(7).0], 1).unwrap();
    assert_eq!(guest.update(7, 3, 42), Err(Errno::EINVAL), "descriptors");
    let unaligned = MmuUpdate { ptr: (mfn(L1).0 << 12) + 5 * 8 + 4, val: 0 };
    // The lower three bits are the operation.
    assert_eq!(guest.memory.update_entry(&mut guest.engine, unaligned), Err(Errno::ENOSYS));
    let untranslated = MmuUpdate { ptr: ((mfn(L1).0 << 12) + 40) | 3, val: 0 };
    assert_eq!(guest.memory.update_entry(&mut guest.engine, untranslated), Ok(0));
    let unknown = MmuUpdate { ptr: mfn(L1).0 << 12 | 4, val: 0 };
    assert_eq!(guest.memory.update_entry(&mut guest.engine, unknown), Err(Errno::ENOSYS));
    let foreign = MmuUpdate { ptr: 0x5000, val: 0 };
    assert_eq!(guest.memory.update_entry(&mut guest.engine, foreign), Err(Errno::EINVAL));
    audit(&guest);
}

#[test]
fn accessed_and_dirty_bits_stay_when_asked() {
    let mut guest = Guest::new();
    guest.map(0x6000, entry(6, RW | Entry::ACCESSED | Entry::DIRTY)).unwrap();
    let update = MmuUpdate { ptr: (mfn(L1).0 << 12) + 6 * 8 + 2, val: entry(6, P) };
    guest.memory.update_entry(&mut guest.engine, update).unwrap();
    let now = Entry(guest.peek(L1, 6));
    assert!(now.has(Entry::ACCESSED | Entry::DIRTY) && !now.is_writable());
    guest.map(0x6000, entry(6, P)).unwrap();
    assert!(!Entry(guest.peek(L1, 6)).has(Entry::ACCESSED));
    audit(&guest);
}

#[test]
fn names_of_frames_are_for_ones_own() {
    let mut guest = Guest::new();
    let name = |frame: Mfn, value| MmuUpdate { ptr: frame.0 << 12 | 1, val: value };
    assert_eq!(guest.memory.update_entry(&mut guest.engine, name(mfn(6), 123)), Ok(0));
    assert_eq!(guest.memory.m2p_load(0xffff_8000_0000_0000 + mfn(6).0 * 8), Some(123));
    for frame in [Mfn(5), mfn(FRAMES), guest.memory.machine_to_physical.frames().0] {
        assert_eq!(
            guest.memory.update_entry(&mut guest.engine, name(frame, 1)),
            Err(Errno::EINVAL)
        );
    }
}

#[test]
fn other_domains_and_arguments_that_are_not_there_are_refused() {
    let mut guest = Guest::new();
    let update = MmuUpdate { ptr: (mfn(L1).0 << 12) + 6 * 8, val: 0 };
    let list = guest.argument([update, update].as_bytes());
    let own = u64::from(DomId::SELF.0);
    let (memory, engine) = (&mut guest.memory, &mut guest.engine);
    // Domain 0 and Xen's own are there, but not for this domain; others are not.
    for (domain, update, extended) in [
        (0, Err(Errno::EPERM), Err(Errno::EPERM)),
        (1, Err(Errno::ESRCH), Err(Errno::ESRCH)),
        (0x7ff1, Err(Errno::EINVAL), Err(Errno::EPERM)),
        (0x7ff2, Err(Errno::EPERM), Err(Errno::EPERM)),
        (own | 1 << 16, Err(Errno::EPERM), Err(Errno::ENOSYS)),
        (own | 2 << 16, Err(Errno::ESRCH), Err(Errno::ENOSYS)),
    ] {
        let arguments = [list, 1, 0, domain, 0, 0];
        assert_eq!(memory.mmu_update(0, engine, arguments), update, "{domain:#x}");
        // Where it is looked at, the list is none of these operations.
        assert_eq!(memory.mmuext_op(0, engine, arguments), extended, "{domain:#x}");
    }
    assert_eq!(memory.mmu_update(0, engine, [0, 0, 0, 1, 0, 0]), Ok(0), "nothing to do");
    assert_eq!(memory.mmu_update(0, engine, [0x1_0000, 1, 0, own, 0, 0]), Err(Errno::EFAULT));
    assert_eq!(memory.mmu_update(0, engine, [u64::MAX - 15, 2, 0, own, 0, 0]), Err(Errno::EFAULT));
    // How many were made is told even when one fails: here the third, in the next page, which is a hole.
    guest.map(0x9000, 0).unwrap();
    let list = 0x9000 - 32;
    guest.memory.copy_to_guest(0, list, [update, update].as_bytes()).unwrap();
    let arguments = [list, 3, 0xa000, own, 0, 0];
    let result = guest.memory.mmu_update(0, &mut guest.engine, arguments);
    assert_eq!(result, Err(Errno::EFAULT));
    let mut made = [0; 4];
    guest.memory.copy_from_guest(0, 0xa000, &mut made).unwrap();
    assert_eq!(made, [2, 0, 0, 0]);
    audit(&guest);
}

#[test]
fn addresses_without_a_table_of_pages_have_no_entry_to_change() {
    let mut guest = Guest::new();
    for address in [0x20_0000, 1 << 39, 0xffff_8000_0000_0000, 0x0000_8000_0000_0000, u64::MAX] {
        assert_eq!(guest.map(address, entry(6, P)), Err(Errno::EINVAL), "{address:#x}");
    }
    let arguments = [0x6000, entry(6, P), 0x1_0000 | 1, 0, 0, 0];
    assert_eq!(
        guest.memory.update_va_mapping(0, &mut guest.engine, arguments),
        Err(Errno::EFAULT),
        "a mask of CPUs that cannot be read"
    );
}

#[test]
fn descriptor_tables_are_checked_and_cannot_be_written() {
    let mut guest = Guest::new();
    assert_eq!(guest.memory.load_gdt(0, &[mfn(6).0], 512), Err(Errno::EINVAL), "mapped writable");
    assert_eq!(guest.memory.load_gdt(0, &[mfn(L1).0], 512), Err(Errno::EINVAL), "a page table");
    assert_eq!(guest.memory.load_gdt(0, &[5], 512), Err(Errno::EINVAL), "another's");
    // A task state segment would be the hypervisor's.
    guest.poke(20, 9, 0x0000_8900_0000_0067);
    assert_eq!(guest.memory.load_gdt(0, &[mfn(20).0], 512), Err(Errno::EINVAL));
    guest.poke(20, 9, 0x00af_9a00_0000_ffff);
    assert_eq!(guest.memory.load_gdt(0, &[mfn(21).0, mfn(20).0], 1024), Ok(()));
    assert_eq!(
        guest.memory.descriptor(0, u16::try_from((512 + 9) * 8).unwrap()),
        Some(0x00af_fa00_0000_ffff)
    );
    assert_eq!(guest.map(0x5000, entry(20, RW)), Err(Errno::EBUSY));
    assert_eq!(guest.map(0x5000, entry(20, P)), Ok(0));
    audit(&guest);
    let mut set = |address: u64, descriptor: u64| {
        guest.memory.update_descriptor(&mut guest.engine, [address, descriptor, 0, 0, 0, 0])
    };
    let place = mfn(20).0 << 12;
    assert_eq!(set(place, 0x00cf_9200_0000_ffff), Ok(0));
    assert_eq!(set(place + 4, 0), Err(Errno::EINVAL));
    assert_eq!(set(place, 0x0000_8900_0000_0067), Err(Errno::EINVAL));
    assert_eq!(set(mfn(L1).0 << 12, 0), Err(Errno::EINVAL));
    assert_eq!(set(0x5000, 0), Err(Errno::EINVAL));
    assert_eq!(set(mfn(7).0 << 12, 0), Ok(0), "an ordinary page");
    assert_eq!(guest.memory.load_gdt(0, &[], 0), Ok(()));
    assert_eq!(guest.kind(20).1, 0);
    assert_eq!(
        guest.memory.set_gdt(0, &mut guest.engine, [0x5000, 7169, 0, 0, 0, 0]),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        guest.memory.set_gdt(0, &mut guest.engine, [0x1_0000, 1, 0, 0, 0, 0]),
        Err(Errno::EFAULT)
    );
    audit(&guest);
}

fn reservation(extents: &[u64], order: u32) -> Reservation {
    Reservation {
        extent_start: 0x9000,
        nr_extents: extents.len() as u64,
        extent_order: order,
        mem_flags: 0,
        domid: DomId::SELF,
        pad0: [0; 6],
    }
}

impl Guest {
    fn reserve(&mut self, operation: MemoryOp, extents: &[u64], order: u32) -> (u64, Vec<u64>) {
        self.memory.copy_to_guest(0, 0x9000, extents.as_bytes()).unwrap();
        let argument = self.argument(reservation(extents, order).as_bytes());
        let done = self.memory_op(operation, argument).unwrap();
        let mut back = extents.to_vec();
        self.memory.copy_from_guest(0, 0x9000, back.as_mut_bytes()).unwrap();
        (done, back)
    }
    fn memory_op(&mut self, operation: MemoryOp, argument: u64) -> Result<u64, Errno> {
        let arguments = [operation.0.into(), argument, 0, 0, 0, 0];
        self.memory.memory_op(0, &mut self.engine, arguments)
    }
}

#[test]
fn memory_is_given_back_when_its_last_user_goes() {
    let mut guest = Guest::new();
    // 20 is nobody's, 6 is still mapped, 5 is no number of a machine frame.
    let (done, _) =
        guest.reserve(MemoryOp::DECREASE_RESERVATION, &[mfn(20).0, mfn(6).0, 5, mfn(21).0], 0);
    assert_eq!(done, 2);
    assert_eq!(guest.memory.pages(), FRAMES - 1, "one is gone, one is going");
    assert_eq!(
        guest.reserve(MemoryOp::DECREASE_RESERVATION, &[mfn(6).0], 0).0,
        0,
        "it has been given"
    );
    guest.poke(6, 0, 99);
    guest.map(0x6000, 0).unwrap();
    assert_eq!(guest.memory.pages(), FRAMES - 2);
    assert_eq!(guest.peek(6, 0), 0, "and wiped");
    assert_eq!(guest.map(0x6000, entry(6, RW)), Err(Errno::EBUSY));
    assert_eq!(guest.memory.m2p_load(0xffff_8000_0000_0000 + mfn(6).0 * 8), Some(u64::MAX));
    audit(&guest);
    let (done, frames) = guest.reserve(MemoryOp::POPULATE_PHYSMAP, &[6, 20, 77], 0);
    assert_eq!(done, 3);
    for (frame, name) in frames.iter().zip([6, 20, 77]) {
        assert_eq!(guest.memory.m2p_load(0xffff_8000_0000_0000 + frame * 8), Some(name));
        assert_eq!(guest.map(0x6000, frame << 12 | RW), Ok(0));
    }
    audit(&guest);
}

#[test]
fn memory_grows_to_the_limit_and_no_further() {
    let mut guest = Guest::new();
    let (done, _) = guest.reserve(MemoryOp::INCREASE_RESERVATION, &[0; 6], 0);
    assert_eq!((done, guest.memory.pages()), (4, FRAMES + 4));
    assert_eq!(guest.reserve(MemoryOp::POPULATE_PHYSMAP, &[3], 0).0, 0);
    assert_eq!(
        guest.reserve(MemoryOp::INCREASE_RESERVATION, &[0], 10).0,
        0,
        "the order is too large"
    );
    assert_eq!(guest.memory_op(MemoryOp::INCREASE_RESERVATION, 0x1_0000), Ok(0), "no argument");
    let mut other = reservation(&[0], 0);
    other.domid = DomId(3);
    let argument = guest.argument(other.as_bytes());
    assert_eq!(guest.memory_op(MemoryOp::DECREASE_RESERVATION, argument), Ok(0));
    audit(&guest);
}

#[test]
fn what_is_asked_of_memory_is_answered_or_refused() {
    let mut guest = Guest::new();
    let this = guest.argument(&DomId::SELF.0.to_le_bytes());
    assert_eq!(guest.memory_op(MemoryOp::CURRENT_RESERVATION, this), Ok(FRAMES));
    assert_eq!(guest.memory_op(MemoryOp::MAXIMUM_RESERVATION, this), Ok(FRAMES + 4));
    assert_eq!(guest.memory_op(MemoryOp::MAXIMUM_GPFN, this), Ok(0));
    assert_eq!(guest.memory_op(MemoryOp::CURRENT_RESERVATION, 0x1_0000), Err(Errno::EFAULT));
    assert!(guest.memory_op(MemoryOp::MAXIMUM_RAM_PAGE, 0).unwrap() >= mfn(FRAMES).0);
    for (operation, error) in [
        (MemoryOp::MACHINE_MEMORY_MAP, Errno::EPERM),
        (MemoryOp::ADD_TO_PHYSMAP, Errno::EACCES),
        (MemoryOp(26), Errno::EOPNOTSUPP),
        (MemoryOp(24), Errno::EPERM),
        (MemoryOp(28), Errno::EOPNOTSUPP),
        (MemoryOp(25), Errno::EOPNOTSUPP),
        (MemoryOp(16), Errno::EINVAL),
        (MemoryOp(23), Errno::EACCES),
        (MemoryOp(63), Errno::ENOSYS),
    ] {
        assert_eq!(guest.memory_op(operation, this), Err(error), "{operation:?}");
    }
    let other = guest.argument(&1u16.to_le_bytes());
    assert_eq!(guest.memory_op(MemoryOp::CURRENT_RESERVATION, other), Err(Errno::ESRCH));
    let zero = guest.argument(&0u16.to_le_bytes());
    assert_eq!(guest.memory_op(MemoryOp::CURRENT_RESERVATION, zero), Err(Errno::EPERM));
    // The map has one range: all that there may be.
    guest.memory.copy_to_guest(0, 0xa000, [9u64, 0xa100].as_bytes()).unwrap();
    assert_eq!(guest.memory_op(MemoryOp::MEMORY_MAP, 0xa000), Ok(0));
    let [count, _]: [u64; 2] = guest.memory.fetch(0, 0xa000).unwrap();
    let [start, size]: [u64; 2] = guest.memory.fetch(0, 0xa100).unwrap();
    let kind: u32 = guest.memory.fetch(0, 0xa110).unwrap();
    assert_eq!((count, start, size, kind), (1, 0, (FRAMES + 4) << 12, 1));
    assert_eq!(guest.memory_op(MemoryOp::MACHPHYS_MAPPING, 0xa000), Ok(0));
    let [start, end, last]: [u64; 3] = guest.memory.fetch(0, 0xa000).unwrap();
    assert_eq!(start + mfn(0).0 * 8, MACHINE_TO_PHYSICAL);
    assert_eq!(end, start + (last + 1) * 8);
    assert_eq!(guest.fault(start + mfn(9).0 * 8, 4), Outcome::Resolved);
    assert_eq!(guest.engine.pages.get(&MACHINE_TO_PHYSICAL).map(|page| page.1.write), Some(false));
    assert_eq!(guest.fault(start + mfn(9).0 * 8, 6), Outcome::Protection(3));
    guest.memory.copy_to_guest(0, 0xa000, [1u64, 0xb000, 0].as_bytes()).unwrap();
    assert_eq!(guest.memory_op(MemoryOp::MACHPHYS_MFN_LIST, 0xa000), Ok(0));
    let list: [u64; 3] = guest.memory.fetch(0, 0xa000).unwrap();
    assert_eq!(list[2], 1);
    audit(&guest);
}

#[test]
fn frames_are_exchanged_when_nobody_uses_them() {
    let mut guest = Guest::new();
    let exchange = |give: u32, gives: u64, take: u32, takes: u64| Exchange {
        give: Reservation { nr_extents: gives, ..reservation(&[], give) },
        take: Reservation { extent_start: 0xa000, nr_extents: takes, ..reservation(&[], take) },
        nr_exchanged: 0,
    };
    let run = |guest: &mut Guest, frames: &[u64], exchange: Exchange| {
        guest.memory.copy_to_guest(0, 0x9000, frames.as_bytes()).unwrap();
        guest.memory.copy_to_guest(0, 0xa000, &77u64.to_le_bytes()).unwrap();
        let argument = guest.argument(exchange.as_bytes());
        let result = guest.memory_op(MemoryOp::EXCHANGE, argument);
        audit(guest);
        result
    };
    let four = [mfn(20).0, mfn(23).0, mfn(25).0, mfn(30).0];
    assert_eq!(run(&mut guest, &four, exchange(0, 4, 2, 1)), Ok(0));
    let first: u64 = guest.memory.fetch(0, 0xa000).unwrap();
    assert!(first.is_multiple_of(4));
    assert_eq!(guest.memory.m2p_load(0xffff_8000_0000_0000 + (first + 3) * 8), Some(80));
    assert_eq!(guest.memory.pages(), FRAMES);
    assert_eq!(guest.map(0x6000, entry(20, RW)), Err(Errno::EBUSY), "given away");
    for (frames, bad) in [
        ([mfn(5).0, mfn(22).0], exchange(0, 2, 1, 1)),
        ([mfn(21).0, mfn(21).0], exchange(0, 2, 1, 1)),
        ([5, mfn(21).0], exchange(0, 2, 1, 1)),
        ([mfn(21).0, mfn(22).0], exchange(0, 2, 2, 1)),
        ([mfn(21).0, mfn(22).0], Exchange { nr_exchanged: 3, ..exchange(0, 2, 1, 1) }),
    ] {
        assert_eq!(run(&mut guest, &frames, bad), Err(Errno::EINVAL));
    }
    assert_eq!(run(&mut guest, &[mfn(21).0], exchange(10, 1, 10, 1)), Err(Errno::EPERM));
    assert_eq!(run(&mut guest, &[mfn(22).0, mfn(24).0], exchange(0, 2, 0, 2)), Ok(0));
}
