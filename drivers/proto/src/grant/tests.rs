//! The life of a grant, from both sides.
#![cfg(not(loom))]

use proptest::prelude::*;

use super::*;

const PEER: DomId = DomId(3);

fn memory(entries: usize) -> Vec<AtomicU32> {
    (0..entries * ENTRY_WORDS).map(|_| AtomicU32::new(0)).collect()
}

#[test]
fn an_entry_is_what_the_header_says() {
    let memory = memory(16);
    let mut table = GrantTable::new(&memory[..]);
    let reference = table.grant(PEER, 0x1234_5678, Access::ReadOnly).unwrap();
    assert_eq!(reference, GrantRef(8), "the first eight are reserved");
    assert_eq!(memory[16].load(Ordering::Relaxed), 0x0003_0005);
    assert_eq!(memory[17].load(Ordering::Relaxed), 0x1234_5678);
}

#[test]
fn a_used_page_is_not_given_back() {
    let memory = memory(16);
    let mut table = GrantTable::new(&memory[..]);
    let view = GrantView(&memory[..]);
    let reference = table.grant(PEER, 7, Access::ReadWrite).unwrap();
    assert_eq!(view.acquire(reference, PEER, Access::ReadWrite), Ok(7));
    assert!(table.is_in_use(reference));
    assert_eq!(table.end(reference), Err(EndError::InUse));
    view.release(reference, Access::ReadWrite);
    assert_eq!(table.end(reference), Err(EndError::InUse), "still mapped for reading");
    view.release(reference, Access::ReadOnly);
    assert_eq!(table.end(reference), Ok(()));
    assert_eq!(table.end(reference), Err(EndError::NotGranted), "ended twice");
    assert_eq!(view.acquire(reference, PEER, Access::ReadOnly), Err(GrantStatus::BAD_GNTREF));
}

#[test]
fn only_the_named_domain_gets_only_what_is_granted() {
    let memory = memory(16);
    let mut table = GrantTable::new(&memory[..]);
    let view = GrantView(&memory[..]);
    let reference = table.grant(PEER, 7, Access::ReadOnly).unwrap();
    for (domain, access) in [(PEER, Access::ReadWrite), (DomId(0), Access::ReadOnly)] {
        assert_eq!(view.acquire(reference, domain, access), Err(GrantStatus::PERMISSION_DENIED));
    }
    for bad in [0, 9, 15, 16, u32::MAX] {
        let status = view.acquire(GrantRef(bad), PEER, Access::ReadOnly);
        assert_eq!(status, Err(GrantStatus::BAD_GNTREF), "{bad}");
        view.release(GrantRef(bad), Access::ReadOnly);
        assert_eq!(table.end(GrantRef(bad)), Err(EndError::NotGranted), "{bad}");
    }
    assert_eq!(table.end(reference), Ok(()));
}

#[test]
fn a_full_table_says_so_and_grows() {
    let (small, large) = (memory(10), memory(12));
    let mut table = GrantTable::new(&small[..]);
    assert_eq!(table.available(), 2);
    let first = table.grant(PEER, 1, Access::ReadOnly).unwrap();
    table.grant(PEER, 2, Access::ReadOnly).unwrap();
    assert_eq!(table.grant(PEER, 3, Access::ReadOnly), None);
    assert_eq!((table.in_use(), table.available()), (2, 0));
    // The same table, seen whole.
    for (new, old) in large.iter().zip(&small) {
        new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    table.grow(&large[..]);
    assert_eq!(table.grant(PEER, 3, Access::ReadOnly), Some(GrantRef(10)));
    assert_eq!(table.end(first), Ok(()));
    assert_eq!(table.grant(PEER, 4, Access::ReadOnly), Some(first));
    assert_eq!(GrantTable::new(&memory(3)[..]).available(), 0, "only reserved entries");
}

proptest! {
    /// References are handed out once until ended, whatever the order.
    #[test]
    fn references_are_never_shared(steps in prop::collection::vec((any::<bool>(), 0_usize..24), 0..300)) {
        let memory = memory(32);
        let mut table = GrantTable::new(&memory[..]);
        let mut held = Vec::new();
        for (grant, pick) in steps {
            if grant {
                match table.grant(PEER, 1, Access::ReadWrite) {
                    Some(reference) => {
                        prop_assert!(!held.contains(&reference) && (8..32).contains(&reference.0));
                        held.push(reference);
                    }
                    None => prop_assert_eq!(held.len(), 24),
                }
            } else if !held.is_empty() {
                let reference = held.swap_remove(pick % held.len());
                prop_assert_eq!(table.end(reference), Ok(()));
            }
            prop_assert_eq!(table.in_use() as usize, held.len());
            prop_assert_eq!(table.available(), 24 - held.len());
        }
    }
}
