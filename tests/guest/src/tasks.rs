//! Tasks, fibers, and the idle loop.

use alloc::vec::Vec;
use core::time::Duration;

use janus_kernel::{guest_test, task, time};

guest_test! {
    /// Hundreds of tasks take turns and give their results back.
    fn tasks_give_their_results_back(test) {
        let handles: Vec<_> = (0..300_u64)
            .map(|number| {
                task::spawn("sum", async move {
                    for _ in 0..number % 7 {
                        task::yield_now().await;
                    }
                    number
                })
            })
            .collect();
        let sum = task::block_on(async {
            let mut sum = 0;
            for handle in handles {
                sum += handle.await;
            }
            sum
        });
        test.equal("sum", sum, 300 * 299 / 2);
    }

    /// A fiber may wait in the middle of ordinary code, while others run.
    fn fibers_wait_while_others_run(test) {
        let handles: Vec<_> = (0..8_u64)
            .map(|number| {
                task::spawn_fiber("waiter", move || {
                    let start = time::now();
                    for _ in 0..5 {
                        task::block_on(time::sleep(Duration::from_millis(4)));
                    }
                    (number, start.elapsed())
                })
            })
            .collect();
        let start = time::now();
        task::block_on(async {
            for (expected, handle) in (0..).zip(handles) {
                let (number, took) = handle.await;
                test.equal("fiber", number, expected);
                test.check(took >= Duration::from_millis(20), format_args!("fiber {number} took {took:?}"));
            }
        });
        // One after another they would take 160 ms at the very least.
        let all = start.elapsed();
        test.check(all < Duration::from_millis(150), format_args!("eight fibers took {all:?}"));
    }

    /// With nothing to do the CPU is given up instead of spinning.
    fn idling_gives_up_the_cpu(test) {
        let before = task::executor::statistics();
        task::block_on(time::sleep(Duration::from_millis(200)));
        let after = task::executor::statistics();
        let idle = after.idle.saturating_sub(before.idle);
        test.check(idle >= Duration::from_millis(40), format_args!("idle for {idle:?} of 200 ms"));
        let times = after.idles - before.idles;
        test.check((1..60).contains(&times), format_args!("woke up {times} times in 200 ms"));
    }
}
