//! Every order of the two ends' memory accesses: no notification is lost, no slot is read early.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;

use super::*;

fn memory() -> Arc<[AtomicU32]> {
    (0..HEADER_WORDS + 2).map(|_| AtomicU32::new(0)).collect()
}

#[test]
fn loom_ring_back_end_never_sleeps_on_a_request() {
    loom::model(|| {
        let memory = memory();
        let mut front = Front::<_, 1>::new(memory.clone()).unwrap();
        let mut back = Back::<_, 1>::attach(memory).unwrap();
        // The back end has seen the first request, so that the second finds no standing notification.
        front.push(&1_u32).unwrap();
        assert!(front.publish());
        assert_eq!(back.pop(), Ok(Some(1_u32)));

        let sender = thread::spawn(move || {
            front.push(&2_u32).unwrap();
            front.publish()
        });
        let mut taken = back.pop::<u32>().unwrap();
        let mut asleep = false;
        if taken.is_none() {
            asleep = !back.final_check_for_requests();
            if !asleep {
                taken = back.pop().unwrap();
            }
        }
        let notified = sender.join().unwrap();
        assert!(taken.is_some() || (asleep && notified), "a request waits and nobody says so");
        assert!(
            taken.is_none_or(|request| request == 2),
            "the slot was read before it was written"
        );
    });
}

#[test]
fn loom_ring_front_end_never_sleeps_on_a_response() {
    loom::model(|| {
        let memory = memory();
        let mut front = Front::<_, 1>::new(memory.clone()).unwrap();
        let mut back = Back::<_, 1>::attach(memory).unwrap();
        for request in [1_u32, 2] {
            front.push(&request).unwrap();
        }
        let _ = front.publish();
        for _ in 0..2 {
            back.pop::<u32>().unwrap();
        }
        back.push(&10_u32).unwrap();
        let _ = back.publish();
        assert_eq!(front.pop(), Ok(Some(10_u32)));

        let sender = thread::spawn(move || {
            back.push(&20_u32).unwrap();
            back.publish()
        });
        let mut taken = front.pop::<u32>().unwrap();
        let mut asleep = false;
        if taken.is_none() {
            asleep = !front.final_check_for_responses();
            if !asleep {
                taken = front.pop().unwrap();
            }
        }
        let notified = sender.join().unwrap();
        assert!(taken.is_some() || (asleep && notified), "a response waits and nobody says so");
        assert!(
            taken.is_none_or(|response| response == 20),
            "the slot was read before it was written"
        );
    });
}
