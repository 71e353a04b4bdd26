//! Both ends over one memory, honest and lying.
#![cfg(not(loom))]

use std::collections::VecDeque;

use proptest::prelude::*;
use zerocopy::FromZeros as _;

use super::*;
use crate::abi::xen_io::blkif::{self, BlkifRequest, BlkifResponse, BlkifStatus};
use crate::abi::xen_io::netif;

type Slot = [u32; 3];

/// Memory for a ring of `slots` slots of 3 words.
fn memory(slots: usize) -> Vec<AtomicU32> {
    (0..HEADER_WORDS + slots * 3).map(|_| AtomicU32::new(0)).collect()
}

fn ends(memory: &[AtomicU32], start: u32) -> (Front<&[AtomicU32], 3>, Back<&[AtomicU32], 3>) {
    (Front::starting_at(memory, start).unwrap(), Back::attach(memory).unwrap())
}

#[test]
fn slots_are_those_of_the_c_macro() {
    // `__CONST_RING_SIZE(blkif, pages * 4096)` and so on; the pages are those that frontends use.
    for (pages, slot, slots) in [
        (1, blkif::SLOT_WORDS, 32),
        (2, blkif::SLOT_WORDS, 64),
        (16, blkif::SLOT_WORDS, 512),
        (1, netif::TX_SLOT_WORDS, 256),
        (1, netif::RX_SLOT_WORDS, 256),
    ] {
        assert_eq!(slots_in(pages * 1024, slot), slots, "{pages} pages of {slot}-word slots");
    }
    for (words, slot) in [(0, 3), (15, 3), (16, 3), (18, 3), (100, 0)] {
        assert_eq!(slots_in(words, slot), 0, "{words} words of {slot}-word slots");
    }
    assert_eq!(slots_in(19, 3), 1);
}

#[test]
fn memory_without_a_slot_is_refused() {
    let memory = memory(0);
    assert_eq!(Front::<_, 3>::new(&memory[..]).unwrap_err(), RingError::TooSmall);
    assert_eq!(Back::<_, 3>::attach(&memory[..]).unwrap_err(), RingError::TooSmall);
    assert_eq!(Back::<_, 3>::attach(&memory[..7]).unwrap_err(), RingError::TooSmall);
}

#[test]
fn typed_messages_survive_the_ring() {
    let memory: Vec<_> = (0..1024).map(|_| AtomicU32::new(!0)).collect();
    let mut front = Front::<_, { blkif::SLOT_WORDS }>::new(&memory[..]).unwrap();
    let mut back = Back::<_, { blkif::SLOT_WORDS }>::attach(&memory[..]).unwrap();
    let mut request = BlkifRequest::new_zeroed();
    (request.id, request.sector_number) = (0x0123_4567_89ab_cdef, 7);
    request.seg[10].last_sect = 7;
    front.push(&request).unwrap();
    assert_eq!(back.pop::<BlkifRequest>(), Ok(None), "published too early");
    assert!(front.publish());
    assert_eq!(back.pop::<BlkifRequest>(), Ok(Some(request)));
    let mut response = BlkifResponse::new_zeroed();
    (response.id, response.status) = (request.id, BlkifStatus::ERROR);
    back.push(&response).unwrap();
    assert!(back.publish());
    assert_eq!(front.pop::<BlkifResponse>(), Ok(Some(response)));
    assert_eq!(front.pop::<BlkifResponse>(), Ok(None));
}

#[test]
fn a_full_ring_takes_no_more_and_empties_in_order() {
    let memory = memory(4);
    let (mut front, mut back) = ends(&memory, u32::MAX - 1);
    for i in 0..4 {
        assert_eq!(front.push(&[i; 3]), Ok((u32::MAX - 1).wrapping_add(i)));
    }
    assert_eq!(front.push(&[9; 3]), Err(RingError::Full));
    assert!(front.publish());
    assert!(!front.publish(), "nothing new");
    assert_eq!(back.push(&[0; 3]), Err(RingError::Full), "no request taken yet");
    for i in 0..4 {
        assert_eq!(back.pop(), Ok(Some([i; 3])));
        back.push(&[100 + i; 3]).unwrap();
    }
    assert_eq!(front.free(), 0);
    assert!(back.publish());
    for i in 0..4 {
        assert_eq!(front.pop(), Ok(Some([100 + i; 3])));
    }
    assert_eq!((front.free(), front.outstanding()), (4, 0));
}

#[test]
fn notifications_are_asked_for_and_held_off() {
    let memory = memory(8);
    let (mut front, mut back) = ends(&memory, 0);
    front.push(&[0; 3]).unwrap();
    assert!(front.publish(), "the first one is asked for by a new ring");
    front.push(&[1; 3]).unwrap();
    assert!(!front.publish(), "the back end has not asked again");
    assert!(back.final_check_for_requests(), "there is work: no sleep");
    assert_eq!(back.pop(), Ok(Some([0; 3])));
    assert_eq!(back.pop(), Ok(Some([1; 3])));
    assert!(!back.final_check_for_requests());
    front.push(&[2; 3]).unwrap();
    assert!(front.publish());

    for i in 0..2_u32 {
        back.push(&[i; 3]).unwrap();
    }
    // A lazy front end hears of the second response only.
    assert!(!front.final_check_after(2));
    let _ = back.publish();
    assert!(front.final_check_after(2));
    assert!(!front.final_check_after(3));
    assert_eq!(back.pop(), Ok(Some([2; 3])));
    back.push(&[2; 3]).unwrap();
    assert!(back.publish());
}

#[test]
fn lying_producers_are_errors_not_panics() {
    for start in [0, 1, u32::MAX, u32::MAX - 3, 1 << 31] {
        for lie in [5, 6, 1 << 31, u32::MAX] {
            let memory = memory(4);
            let (mut front, mut back) = ends(&memory, start);
            memory[REQ_PROD].store(start.wrapping_add(lie), Ordering::Relaxed);
            assert_eq!(back.pop::<Slot>(), Err(RingError::Overrun), "{start} {lie}");
            assert!(back.final_check_for_requests(), "a lie must be looked at, not slept on");
            assert_eq!(Back::<_, 3>::attach(&memory[..]).unwrap_err(), RingError::Overrun);

            memory[REQ_PROD].store(start, Ordering::Relaxed);
            for i in 0..2 {
                front.push(&[i; 3]).unwrap();
            }
            let _ = front.publish();
            // Three responses to two requests, and far more.
            for lie in [3, lie] {
                memory[RSP_PROD].store(start.wrapping_add(lie), Ordering::Relaxed);
                assert_eq!(front.pop::<Slot>(), Err(RingError::Overrun), "{start} {lie}");
                assert!(front.final_check_for_responses());
            }
        }
    }
}

#[test]
fn a_request_index_that_runs_backwards_is_an_error() {
    let memory = memory(4);
    let (mut front, mut back) = ends(&memory, 0);
    for i in 0..3 {
        front.push(&[i; 3]).unwrap();
    }
    let _ = front.publish();
    assert_eq!(back.pop(), Ok(Some([0; 3])));
    memory[REQ_PROD].store(0, Ordering::Relaxed);
    assert_eq!(back.waiting(), Err(RingError::Overrun));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    FrontPush,
    FrontPublish,
    FrontPop,
    FrontSleep,
    BackPop,
    BackPush,
    BackPublish,
    BackSleep,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    use Op::*;
    let all =
        [FrontPush, FrontPublish, FrontPop, FrontSleep, BackPop, BackPush, BackPublish, BackSleep];
    prop::collection::vec(prop::sample::select(all.to_vec()), 0..200)
}

proptest! {
    /// The ring is two queues with a bound, whatever the interleaving; and an end that sleeps by the
    /// rules is always notified when there is something for it.
    #[test]
    fn any_interleaving_equals_two_queues(ops in ops(), start: u32, log2 in 0_u32..4) {
        let slots = 1_usize << log2;
        let memory = memory(slots);
        let (mut front, mut back) = ends(&memory, start);
        let (mut written, mut requests) = (VecDeque::new(), VecDeque::new());
        let (mut answered, mut responses) = (VecDeque::new(), VecDeque::new());
        let (mut taken, mut outstanding, mut next) = (0, 0, 0_u32);
        let (mut front_asleep, mut back_asleep) = (false, false);
        for op in ops {
            match op {
                Op::FrontPush => {
                    next += 1;
                    let full = outstanding == slots;
                    prop_assert_eq!(front.push(&[next; 3]).is_err(), full);
                    if !full {
                        outstanding += 1;
                        written.push_back([next; 3]);
                    }
                }
                Op::FrontPublish => {
                    requests.append(&mut written);
                    back_asleep &= !front.publish();
                }
                Op::FrontPop => {
                    let got = front.pop::<Slot>().unwrap();
                    prop_assert_eq!(got, responses.pop_front());
                    outstanding -= usize::from(got.is_some());
                }
                Op::FrontSleep => front_asleep = !front.final_check_for_responses(),
                Op::BackPop => {
                    let got = back.pop::<Slot>().unwrap();
                    prop_assert_eq!(got, requests.pop_front());
                    taken += usize::from(got.is_some());
                }
                Op::BackPush => {
                    next += 1;
                    prop_assert_eq!(back.push(&[next; 3]).is_err(), taken == 0);
                    if taken > 0 {
                        taken -= 1;
                        answered.push_back([next; 3]);
                    }
                }
                Op::BackPublish => {
                    responses.append(&mut answered);
                    front_asleep &= !back.publish();
                }
                Op::BackSleep => back_asleep = !back.final_check_for_requests(),
            }
            prop_assert!(!back_asleep || requests.is_empty(), "the back end sleeps on requests");
            prop_assert!(!front_asleep || responses.is_empty(), "the front end sleeps on responses");
        }
    }

    /// Whatever the other end writes anywhere, an end neither panics nor hands out more than it may.
    #[test]
    fn nonsense_in_the_memory_is_survived(
        ops in ops(), start: u32, scribbles in prop::collection::vec((0..28_usize, any::<u32>(), any::<bool>()), 200),
    ) {
        let memory = memory(4);
        let (mut front, mut back) = ends(&memory, start);
        let (mut pushed, mut popped, mut taken, mut answered) = (0_u32, 0_u32, 0_u32, 0_u32);
        for (op, (word, value, near)) in ops.into_iter().zip(scribbles) {
            let value = if near { start.wrapping_add(value % 9).wrapping_sub(2) } else { value };
            memory[word].store(value, Ordering::Relaxed);
            match op {
                Op::FrontPush => pushed += u32::from(front.push(&[1; 3]).is_ok()),
                Op::FrontPublish => { let _ = front.publish(); }
                Op::FrontPop => popped += u32::from(matches!(front.pop::<Slot>(), Ok(Some(_)))),
                Op::FrontSleep => { let _ = front.final_check_for_responses(); }
                Op::BackPop => taken += u32::from(matches!(back.pop::<Slot>(), Ok(Some(_)))),
                Op::BackPush => answered += u32::from(back.push(&[1; 3]).is_ok()),
                Op::BackPublish => { let _ = back.publish(); }
                Op::BackSleep => { let _ = back.final_check_for_requests(); }
            }
            prop_assert!(popped <= pushed && pushed - popped <= 4);
            prop_assert!(answered <= taken && taken - answered <= 4);
        }
    }
}
