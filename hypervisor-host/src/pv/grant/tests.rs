//! Grants as a guest writes them and a device maps them, and what must be refused.

use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::machine::ram::FIRST_FRAME;
use crate::memory::GrantMapper as _;

/// Frames 0 to 7 are the guest's; what is referenced is counted.
#[derive(Debug, Default)]
struct Own(AtomicI64);

impl FrameTypes for Own {
    fn get(&self, frame: Mfn, _access: Access) -> bool {
        let own = frame.0 >= FIRST_FRAME.0 && frame.0 < FIRST_FRAME.0 + 8;
        self.0.fetch_add(i64::from(own), SeqCst);
        own
    }
    fn put(&self, _frame: Mfn, _access: Access) {
        self.0.fetch_sub(1, SeqCst);
    }
}

fn frame(index: u64) -> Mfn {
    Mfn(FIRST_FRAME.0 + index)
}

fn table() -> (Arc<GrantTable>, Grants, Arc<Own>) {
    let ram = Arc::new(Ram::new(8 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES).unwrap());
    let types = Arc::new(Own::default());
    let table = Arc::new(GrantTable::new(ram, frame(8), types.clone()));
    (table.clone(), Grants::new(table), types)
}

fn head(table: &GrantTable, reference: u32) -> u32 {
    table.ram.words(frame(8), 1).unwrap()[reference as usize * 2].load(SeqCst)
}

fn write(table: &GrantTable, reference: u32, head: u32, target: u64) {
    let words = table.ram.words(frame(8), 1).unwrap();
    words[reference as usize * 2 + 1].store(u32::try_from(target).unwrap(), SeqCst);
    words[reference as usize * 2].store(head, SeqCst);
}

#[test]
fn a_granted_page_is_the_guests_and_its_use_is_marked_and_counted() {
    let (table, grants, types) = table();
    write(&table, 9, 1, frame(3).0);
    let first = grants.map(&[GrantRef(9)], Access::ReadWrite).unwrap();
    assert_eq!(head(&table, 9), 1 | 8 | 16);
    let second = grants.map(&[GrantRef(9)], Access::ReadOnly).unwrap();
    // The entry is not read again while somebody uses it.
    write(&table, 9, 1 | 8 | 16, frame(4).0);
    first[1].store(77, SeqCst);
    assert_eq!(second[1].load(SeqCst), 77);
    assert_eq!(table.ram.words(frame(3), 1).unwrap()[1].load(SeqCst), 77);
    drop(first);
    assert_eq!(head(&table, 9), 1 | 8);
    assert_eq!(types.0.load(SeqCst), 1);
    drop(second);
    assert_eq!((head(&table, 9), types.0.load(SeqCst), table.in_use()), (1, 0, 0));
}

#[test]
fn what_is_not_granted_is_refused_and_left_unmarked() {
    let (table, grants, types) = table();
    write(&table, 9, 0, frame(3).0);
    write(&table, 10, 1 | 5 << 16, frame(3).0);
    write(&table, 11, 1 | 4, frame(3).0);
    write(&table, 12, 1, 7);
    write(&table, 13, 2, frame(3).0);
    let map = |reference, access| grants.map(&[GrantRef(reference)], access).unwrap_err().0;
    assert_eq!(map(9, Access::ReadOnly), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(10, Access::ReadOnly), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(11, Access::ReadWrite), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(12, Access::ReadWrite), GrantStatus::BAD_PAGE);
    assert_eq!(map(13, Access::ReadOnly), GrantStatus::GENERAL_ERROR);
    for beyond in [512, 1 << 20, u32::MAX] {
        assert_eq!(map(beyond, Access::ReadOnly), GrantStatus::BAD_GNTREF);
    }
    assert_eq!(grants.map(&[], Access::ReadOnly).unwrap_err().0, GrantStatus::GENERAL_ERROR);
    for (reference, want) in [(9, 0), (10, 1 | 5 << 16), (11, 5), (12, 1), (13, 2)] {
        assert_eq!(head(&table, reference), want);
    }
    assert_eq!((types.0.load(SeqCst), table.in_use()), (0, 0));
}

#[test]
fn several_pages_are_contiguous_in_the_order_asked_for_or_not_mapped_at_all() {
    let (table, grants, types) = table();
    for (reference, target) in [(9, 3), (10, 1), (11, 2)] {
        write(&table, reference, 1, frame(target).0);
        let value = u32::try_from(target).unwrap();
        table.ram.words(frame(target), 1).unwrap()[0].store(value, SeqCst);
    }
    let seen = |references: &[u32]| {
        let references: Vec<_> = references.iter().copied().map(GrantRef).collect();
        let pages = grants.map(&references, Access::ReadOnly).map_err(|e| e.0)?;
        Ok(pages.chunks(1024).map(|page| page[0].load(SeqCst)).collect::<Vec<_>>())
    };
    assert_eq!(seen(&[10, 11, 9]), Ok(vec![1, 2, 3]));
    assert_eq!(seen(&[9, 11, 10]), Ok(vec![3, 2, 1]));
    assert_eq!(seen(&[9, 11, 14]), Err(GrantStatus::GENERAL_ERROR));
    assert_eq!((head(&table, 9), types.0.load(SeqCst)), (1, 0));
}
