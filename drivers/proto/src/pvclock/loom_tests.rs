//! A reader against the hypervisor's update, in every order.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;

use super::*;

#[test]
fn loom_pvclock_copies_no_mixture() {
    // Three words stand for eight: loom's work grows with the power of their number.
    loom::model(|| {
        let words: Arc<[AtomicU32]> = (0..3).map(|_| AtomicU32::new(0)).collect();
        let writer = {
            let words = words.clone();
            thread::spawn(move || replace(&words, [0_u32, 7, 7].as_bytes()))
        };
        let mut copy = [0_u32; 3];
        if try_copy(&words, copy.as_mut_bytes()) {
            assert!(matches!(copy, [0, 0, 0] | [2, 7, 7]), "torn: {copy:?}");
        }
        writer.join().unwrap();
    });
}
