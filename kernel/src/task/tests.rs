//! The runtime on host threads: each test thread is a CPU of its own.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::sync::{Channel, Mutex, Notify};
use crate::time;

#[test]
fn tasks_run_and_give_their_result() {
    let sum = block_on(async {
        let handles: Vec<_> = (0..100_u64)
            .map(|i| {
                spawn("adder", async move {
                    yield_now().await;
                    i
                })
            })
            .collect();
        let mut sum = 0;
        for handle in handles {
            sum += handle.await;
        }
        sum
    });
    assert_eq!(sum, 4950);
}

#[test]
fn a_detached_task_runs_on() {
    let done = Arc::new(Notify::new());
    let theirs = Arc::clone(&done);
    drop(spawn("detached", async move {
        yield_now().await;
        theirs.notify();
    }));
    block_on(done.notified());
}

#[test]
fn a_cancelled_task_stops() {
    let ran = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&ran);
    let output = block_on(async move {
        let handle = spawn("endless", async move {
            loop {
                theirs.fetch_add(1, Ordering::Relaxed);
                yield_now().await;
            }
        });
        yield_now().await;
        handle.cancel().await
    });
    assert_eq!(output, None::<()>);
    let count = ran.load(Ordering::Relaxed);
    block_on(yield_now());
    assert_eq!(ran.load(Ordering::Relaxed), count);
}

#[test]
fn sleeping_blocks_the_cpu_and_keeps_time() {
    block_on(async {
        let before = statistics();
        let start = time::now();
        let long = spawn("long", time::sleep(Duration::from_millis(60)));
        time::sleep(Duration::from_millis(20)).await;
        let slept = start.elapsed();
        assert!(slept >= Duration::from_millis(20), "{slept:?}");
        long.await;
        assert!(start.elapsed() >= Duration::from_millis(60));
        let after = statistics();
        // Two deadlines: a handful of waits, not a spin.
        assert!((1..20).contains(&(after.idles - before.idles)), "{after:?}");
        assert!(after.passes - before.passes < 60 && after.idle > before.idle, "{after:?}");
    });
}

#[test]
fn a_timeout_ends_what_does_not() {
    let never = Notify::new();
    block_on(async {
        assert_eq!(
            time::timeout(Duration::from_millis(5), never.notified()).await,
            Err(time::Elapsed)
        );
        assert_eq!(time::timeout(Duration::from_secs(60), async { 7 }).await, Ok(7));
    });
}

/// Two CPUs bounce a signal; a lost wake-up would hang it.
#[test]
fn wake_ups_from_another_cpu_are_not_lost() {
    const ROUNDS: usize = 2000;
    let (ping, pong) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (theirs_ping, theirs_pong) = (Arc::clone(&ping), Arc::clone(&pong));
    let other = thread::spawn(move || {
        block_on(async {
            for _ in 0..ROUNDS {
                theirs_ping.notified().await;
                theirs_pong.notify();
            }
        });
    });
    block_on(async {
        let task = spawn("bouncer", async move {
            for _ in 0..ROUNDS {
                ping.notify();
                pong.notified().await;
            }
        });
        task.await;
    });
    other.join().expect("the other CPU finishes");
}

#[test]
fn a_dropped_waiter_passes_its_signal_on() {
    let signal = Arc::new(Notify::new());
    let theirs = Arc::clone(&signal);
    block_on(async {
        let first = spawn("first", async move { theirs.notified().await });
        yield_now().await;
        signal.notify(); // granted to `first`, which is stopped before it runs
        assert_eq!(first.cancel().await, None);
        signal.notified().await;
    });
}

#[test]
fn an_async_mutex_is_held_across_awaits_by_one_task_at_a_time() {
    let shared = Arc::new(Mutex::new((0_u32, false)));
    block_on(async {
        let handles: Vec<_> = (0..20)
            .map(|_| {
                let shared = Arc::clone(&shared);
                spawn("locker", async move {
                    let mut guard = shared.lock().await;
                    assert!(!guard.1);
                    guard.1 = true;
                    yield_now().await;
                    guard.1 = false;
                    guard.0 += 1;
                })
            })
            .collect();
        for handle in handles {
            handle.await;
        }
        assert_eq!(shared.lock().await.0, 20);
    });
}

#[test]
fn a_channel_delivers_in_order_and_waits_when_full() {
    let channel = Arc::new(Channel::new(3));
    let sender = Arc::clone(&channel);
    block_on(async {
        let task = spawn("sender", async move {
            for i in 0..100 {
                sender.send(i).await;
            }
        });
        for i in 0..100 {
            assert_eq!(channel.recv().await, i);
        }
        task.await;
        assert_eq!(channel.try_recv(), None);
        assert_eq!((channel.try_send(1), channel.try_recv()), (Ok(()), Some(1)));
    });
}

#[test]
fn a_fiber_waits_without_stopping_others() {
    let signal = Arc::new(Notify::new());
    let theirs = Arc::clone(&signal);
    let output = block_on(async move {
        let fiber = spawn_fiber("fiber", move || {
            let mut count = 0_u64;
            for _ in 0..1000 {
                block_on(theirs.notified());
                count += 1;
            }
            block_on(time::sleep(Duration::from_millis(1)));
            count
        });
        for _ in 0..1000 {
            signal.notify();
            yield_now().await;
            yield_now().await;
        }
        fiber.await
    });
    assert_eq!(output, 1000);
}

#[test]
fn many_fibers_keep_their_stacks_apart() {
    fn depth(n: u64) -> u64 {
        block_on(yield_now());
        if n == 0 { 0 } else { n + core::hint::black_box(depth(n - 1)) }
    }
    block_on(async {
        let fibers: Vec<_> =
            (0..50_u64).map(|i| spawn_fiber("deep", move || depth(i) * 1000 + i)).collect();
        for (i, fiber) in fibers.into_iter().enumerate() {
            let i = i as u64;
            assert_eq!(fiber.await, i * (i + 1) / 2 * 1000 + i);
        }
    });
}

#[test]
fn a_panic_in_a_fiber_reaches_who_waits_for_it() {
    let (send, receive) = mpsc::channel();
    let thread = thread::spawn(move || {
        block_on(async {
            let fiber = spawn_fiber("doomed", || {
                block_on(yield_now());
                panic!("on purpose")
            });
            send.send(()).expect("the test waits");
            let () = fiber.await;
        });
    });
    receive.recv().expect("the fiber was spawned");
    assert!(thread.join().is_err());
}

#[test]
fn block_on_in_a_task_is_refused_instead_of_hanging() {
    let thread = thread::spawn(|| {
        block_on(spawn("wrong", async { block_on(async {}) }));
    });
    assert!(thread.join().is_err());
}

#[test]
fn tasks_are_listed_by_name() {
    block_on(async {
        let signal = Arc::new(Notify::new());
        let theirs = Arc::clone(&signal);
        let task = spawn("listed", async move { theirs.notified().await });
        yield_now().await;
        assert!(tasks().iter().any(|t| t.name == "listed" && t.polls == 1));
        signal.notify();
        task.await;
        assert!(!tasks().iter().any(|t| t.name == "listed"));
    });
}
