//! Faults: what is mapped, with which rights, and what the guest is told.

use super::*;
use crate::pv::grant::FrameTypes as _;
use crate::pv::mm::space::SharedMemory;
use crate::pv::space::{Resolution, Space as _, TableWrite};
use janus_proto::grant::Access;

const READ: u32 = 4;
const WRITE: u32 = 6;
const FETCH: u32 = 0x14;

#[test]
fn a_fault_brings_its_neighbours() {
    let mut guest = Guest::new();
    assert_eq!(guest.fault(0x9123, WRITE), Outcome::Resolved);
    assert_eq!(guest.engine.maps, 1);
    assert_eq!(
        guest.engine.pages.keys().copied().collect::<Vec<_>>(),
        (5..16).map(|page| page * 4096).collect::<Vec<_>>()
    );
    audit(&guest);
    // The tables have other rights, so they come by themselves.
    assert_eq!(guest.fault(0x1000, READ), Outcome::Resolved);
    assert_eq!(guest.engine.pages.len(), 15);
    audit(&guest);
}

#[test]
fn a_read_does_not_make_pages_dirty() {
    let mut guest = Guest::new();
    assert_eq!(guest.fault(0x9000, READ), Outcome::Resolved);
    assert!(guest.engine.pages.values().all(|(_, protection)| !protection.write));
    assert!(!Entry(guest.peek(L1, 9)).has(Entry::DIRTY));
    assert_eq!(guest.fault(0x9000, WRITE), Outcome::Resolved);
    assert!(Entry(guest.peek(L1, 9)).has(Entry::DIRTY));
    assert!(guest.engine.pages[&0x9000].1.write);
    audit(&guest);
}

#[test]
fn a_run_goes_on_in_the_next_table() {
    let pages = 3 * 512;
    let mut memory =
        Memory::new(Size { pages: pages + 8, max_pages: pages + 8, vcpus: 1 }).unwrap();
    let put = |memory: &Memory, table: u64, index: u64, value: u64| {
        memory.write_entry(mfn(table), usize::try_from(index).unwrap(), Entry(value));
    };
    let (root, l3, l2, l1) = (pages, pages + 1, pages + 2, pages + 3);
    put(&memory, root, 0, entry(l3, RW));
    put(&memory, l3, 0, entry(l2, RW));
    for table in 0..3 {
        put(&memory, l2, table, entry(l1 + table, RW));
        for index in 0..512 {
            put(&memory, l1 + table, index, entry(table * 512 + index, RW));
        }
    }
    memory.pin_quietly(mfn(root), Kind::L4).unwrap();
    memory.initialise(0, mfn(root), None).unwrap();
    let mut guest = Guest { memory, engine: Recorder::default() };
    assert_eq!(guest.fault(0x30_0000, WRITE), Outcome::Resolved);
    assert_eq!((guest.engine.maps, guest.engine.pages.len()), (1, 1535), "all but page 0");
    audit(&guest);
    // One page goes alone, one table goes alone.
    guest.map(0x30_0000, 0).unwrap();
    assert_eq!(guest.engine.pages.len(), 1534);
    guest.update(l2, 0, 0).unwrap();
    assert_eq!(guest.engine.pages.len(), 1534 - 511);
    audit(&guest);
    guest.update(l3, 0, 0).unwrap();
    assert!(guest.engine.pages.is_empty());
    audit(&guest);
}

#[test]
fn the_guest_is_told_its_own_faults() {
    let mut guest = Guest::new();
    assert_eq!(guest.fault(0x1_0000, READ), Outcome::NotMapped(0));
    assert_eq!(guest.fault(0x1_0000, WRITE), Outcome::NotMapped(2));
    assert_eq!(guest.fault(1 << 39, FETCH), Outcome::NotMapped(0x10));
    assert_eq!(guest.fault(0x1000, WRITE), Outcome::Protection(3), "a table");
    guest.map(0x6000, entry(6, RW | Entry::NO_EXECUTE)).unwrap();
    assert_eq!(guest.fault(0x6000, FETCH), Outcome::Protection(0x11));
    assert_eq!(guest.fault(0x5000, FETCH), Outcome::Resolved);
    guest.memory.cpus[0].user = true;
    guest.memory.cpus[0].user_root = guest.memory.cpus[0].root;
    assert_eq!(guest.fault(0x1_0000, WRITE), Outcome::NotMapped(6), "in user mode");
    guest.memory.cpus[0].user_root = None;
}

#[test]
fn rights_of_upper_levels_count() {
    let mut guest = Guest::new();
    guest.update(L2, 0, entry(L1, P)).unwrap();
    assert_eq!(guest.fault(0x9000, WRITE), Outcome::Protection(3));
    assert_eq!(guest.memory.copy_to_guest(0, 0x9000, &[1]), Err(Errno::EFAULT));
    assert_eq!(guest.fault(0x9000, READ), Outcome::Resolved);
    guest.update(L2, 0, entry(L1, RW)).unwrap();
    assert_eq!(guest.fault(0x9000, WRITE), Outcome::Resolved);
    guest.update(L3, 0, entry(L2, P | Entry::NO_EXECUTE)).unwrap();
    assert!(guest.engine.pages.is_empty(), "all rights changed at once");
    assert_eq!(guest.fault(0x9000, WRITE), Outcome::Protection(3));
    assert_eq!(guest.fault(0x9000, FETCH), Outcome::Protection(0x11));
    audit(&guest);
}

#[test]
fn what_no_process_can_map_is_left_to_others() {
    let mut guest = Guest::new();
    assert_eq!(guest.fault(0, READ), Outcome::NotMapped(0));
    guest.map(0, entry(6, RW)).unwrap();
    assert_eq!(guest.fault(0x123, READ), Outcome::Unmappable);
    guest.update(ROOT, 511, entry(L3, RW)).unwrap();
    assert_eq!(guest.fault(0xffff_ff80_0000_6000, WRITE), Outcome::Unmappable);
    assert_eq!(guest.fault(0xffff_8000_0000_0000 + mfn(6).0 * 8, READ), Outcome::Unmappable);
    assert_eq!(guest.fault(0xffff_8000_0000_0000 + mfn(6).0 * 8, WRITE), Outcome::Protection(3));
    assert_eq!(guest.fault(0xffff_8000_0000_0000, READ), Outcome::NotMapped(0));
    assert_eq!(guest.fault(0x0000_8000_0000_0000, READ), Outcome::NotMapped(0));
    assert!(guest.engine.pages.is_empty());
}

#[test]
fn less_right_takes_pages_out_and_more_leaves_them() {
    let mut guest = Guest::new();
    let all = RW | Entry::ACCESSED | Entry::DIRTY;
    for restricted in [
        entry(6, all & !Entry::WRITE),
        entry(6, all | Entry::NO_EXECUTE),
        entry(6, all & !Entry::ACCESSED),
        entry(7, all),
        0,
    ] {
        guest.map(0x6000, entry(6, all)).unwrap();
        assert_eq!(guest.fault(0x6000, WRITE), Outcome::Resolved);
        guest.map(0x6000, restricted).unwrap();
        assert!(!guest.engine.pages.contains_key(&0x6000), "{restricted:#x}");
        audit(&guest);
    }
    guest.map(0x6000, entry(6, P | Entry::ACCESSED | Entry::NO_EXECUTE)).unwrap();
    assert_eq!(guest.fault(0x6000, READ), Outcome::Resolved);
    let unmaps = guest.engine.unmaps;
    guest.map(0x6000, entry(6, all)).unwrap();
    assert_eq!(guest.engine.unmaps, unmaps);
    audit(&guest);
}

#[test]
fn a_change_of_what_nobody_touched_costs_the_engine_nothing() {
    let mut guest = Guest::new();
    for page in 5..16 {
        guest.map(page * 4096, entry(page, P)).unwrap();
    }
    guest.update(L2, 0, 0).unwrap();
    assert_eq!(guest.engine.unmaps, 0);
}

#[test]
fn a_table_in_two_places_is_taken_out_of_both() {
    let mut guest = Guest::new();
    guest.update(L2, 1, entry(L1, RW)).unwrap();
    assert_eq!(guest.fault(0x6000, WRITE), Outcome::Resolved);
    assert_eq!(guest.fault(0x20_6000, WRITE), Outcome::Resolved);
    audit(&guest);
    guest.map(0x6000, entry(6, P)).unwrap();
    audit(&guest);
    assert!(!guest.engine.pages.contains_key(&0x20_6000));
}

#[test]
fn the_kernel_may_write_its_tables_of_pages_directly() {
    let guest = Guest::new();
    let shared = SharedMemory::new(guest.memory);
    let mut engine = guest.engine;
    let fault = |address| crate::engine::Fault { vector: 14, error: WRITE | 1, address };
    let at = L1 * 4096 + 6 * 8;
    assert_eq!(shared.fault(0, &mut engine, &fault(at)), Resolution::Emulate);
    assert_eq!(
        shared.fault(0, &mut engine, &fault(L2 * 4096)),
        Resolution::Guest(3),
        "others it may not"
    );
    let write = |engine: &mut Recorder, at, old, new, size| {
        shared.write_table(0, engine, at, old, new, size)
    };
    assert_eq!(write(&mut engine, at, None, entry(7, P), 8), Some(TableWrite::Done));
    let now = shared.lock().read_entry(mfn(L1), 6);
    assert_eq!(now, Entry(entry(7, P)).adjusted(1));
    assert_eq!(write(&mut engine, at, Some(0), 5, 8), Some(TableWrite::Differs(now.0)));
    assert_eq!(write(&mut engine, at, Some(now.0), 0, 8), Some(TableWrite::Done));
    assert_eq!(write(&mut engine, at, None, entry(ROOT, RW), 8), None, "checked as by hypercall");
    assert_eq!(write(&mut engine, at, None, 0, 3), None);
    assert_eq!(write(&mut engine, at + 4, None, 0, 8), None);
    assert_eq!(write(&mut engine, L2 * 4096, None, 0, 8), None);
    // Half an entry at a time: the half that makes it present comes last.
    assert_eq!(write(&mut engine, at + 4, None, entry(7, P) >> 32, 4), Some(TableWrite::Done));
    assert_eq!(write(&mut engine, at, None, entry(7, P) & 0xffff_ffff, 4), Some(TableWrite::Done));
    let now = shared.lock().read_entry(mfn(L1), 6);
    assert_eq!(now.frame(), mfn(7));
    audit(&Guest { memory: std::mem::replace(&mut *shared.lock(), Guest::new().memory), engine });
}

#[test]
fn what_backends_write_to_cannot_become_a_table() {
    let mut guest = Guest::new();
    let swap = |guest: &mut Guest| std::mem::replace(&mut guest.memory, Guest::new().memory);
    let shared = SharedMemory::new(swap(&mut guest));
    assert!(shared.get(mfn(20), Access::ReadWrite) && shared.get(mfn(21), Access::ReadOnly));
    assert!(!shared.get(mfn(L1), Access::ReadWrite) && shared.get(mfn(L1), Access::ReadOnly));
    assert!(!shared.get(Mfn(5), Access::ReadOnly) && !shared.get(mfn(FRAMES), Access::ReadWrite));
    let pin = |pfn| shared.lock().pin_quietly(mfn(pfn), Kind::L1);
    assert_eq!((pin(20), pin(21)), (Err(Errno::EINVAL), Ok(())));
    shared.put(mfn(20), Access::ReadWrite);
    shared.put(mfn(21), Access::ReadOnly);
    shared.put(mfn(L1), Access::ReadOnly);
    assert_eq!(pin(20), Ok(()));
    guest.memory = std::mem::replace(&mut *shared.lock(), Guest::new().memory);
    audit(&guest);
}
