//! Tasks, fibers, and the idle loop.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
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
        const FIBERS: u64 = 8;
        static STARTED: AtomicU64 = AtomicU64::new(0);
        let handles: Vec<_> = (0..FIBERS)
            .map(|number| {
                task::spawn_fiber("waiter", move || {
                    STARTED.fetch_add(1, Ordering::Relaxed);
                    let start = time::now();
                    for _ in 0..5 {
                        task::block_on(time::sleep(Duration::from_millis(4)));
                    }
                    (number, start.elapsed(), STARTED.load(Ordering::Relaxed))
                })
            })
            .collect();
        task::block_on(async {
            for (expected, handle) in (0..).zip(handles) {
                let (number, took, started) = handle.await;
                test.equal("fiber", number, expected);
                test.check(took >= Duration::from_millis(20), format_args!("fiber {number} took {took:?}"));
                // Whatever the machine's speed: none of them had to end before another could begin.
                test.equal("fibers that ran when one ended", started, FIBERS);
            }
        });
    }

    /// With nothing to do the CPU is given up instead of spinning, and every wake-up has a cause.
    ///
    /// Counted, not timed: a host that is busy may take any time away from us, but it invents no work.
    fn idling_gives_up_the_cpu(test) {
        const SLEEPS: u64 = 20;
        // Devices that are still being set up would be causes of their own.
        task::block_on(time::sleep(Duration::from_millis(200)));
        let before = task::executor::statistics();
        for _ in 0..SLEEPS {
            task::block_on(time::sleep(Duration::from_millis(10)));
        }
        let after = task::executor::statistics();
        let idles = after.idles - before.idles;
        let passes = after.passes - before.passes;
        // A timer that is due before the CPU could halt needs no halt, but most are not; and each halt ends with an
        // interrupt, of which there are few. A wait that does not wait comes back tens of thousands of times.
        let few = SLEEPS / 2..20 * SLEEPS;
        test.check(few.contains(&idles), format_args!("waited {idles} times in {SLEEPS} sleeps"));
        // Nor does the executor go round without waiting: a pass or two for what each interrupt brought.
        test.check(passes <= 3 * (idles + SLEEPS), format_args!("{passes} passes for {idles} waits"));
    }
}
