//! Ending a grant against Xen marking it, in every order.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;

use super::*;

#[test]
fn loom_grant_never_ends_under_its_user() {
    loom::model(|| {
        let memory: Arc<[AtomicU32]> = (0..18).map(|_| AtomicU32::new(0)).collect();
        let mut table = GrantTable::new(memory.clone());
        let reference = table.grant(DomId(1), 5, Access::ReadWrite).unwrap();
        let user = thread::spawn(move || {
            GrantView(memory).acquire(reference, DomId(1), Access::ReadWrite)
        });
        let ended = table.end(reference).is_ok();
        let used = user.join().unwrap();
        assert!(!(ended && used.is_ok()), "ended while in use");
        assert!(ended || used == Ok(5), "neither got it");
        assert_eq!(table.end(reference).is_ok(), false, "ended twice, or ended while in use");
    });
}
