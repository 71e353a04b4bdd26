//! Clocks and timers.

use alloc::vec::Vec;
use core::time::Duration;

use janus_kernel::{guest_test, task, time};

guest_test! {
    /// The clock never runs backwards.
    fn the_clock_never_runs_backwards(test) {
        let mut last = time::now();
        let mut moved = 0;
        for _ in 0..20_000 {
            let now = time::now();
            if now < last {
                test.check(false, format_args!("{last} was followed by {now}"));
                return;
            }
            moved += u32::from(now > last);
            last = now;
        }
        test.check(moved > 100, format_args!("moved only {moved} times in 20000 readings"));
    }

    /// The wall clock is in this century, and later than this test was written.
    fn the_wall_clock_is_plausible(test) {
        match time::wall_clock() {
            None => test.check(false, "there is no wall clock"),
            Some(since_1970) => {
                let years = since_1970.as_secs() / 31_556_952;
                test.check((54..130).contains(&years), format_args!("{years} years after 1970"));
            }
        }
    }

    /// A sleep lasts at least as long as asked, and not absurdly longer.
    fn sleeping_lasts_as_long_as_asked(test) {
        for ms in [1, 5, 20, 100] {
            let start = time::now();
            task::block_on(time::sleep(Duration::from_millis(ms)));
            let slept = start.elapsed();
            test.check(slept >= Duration::from_millis(ms), format_args!("{ms} ms lasted {slept:?}"));
            test.check(slept < Duration::from_millis(ms + 1000), format_args!("{ms} ms lasted {slept:?}"));
        }
    }

    /// The clock of timers and the wall clock agree on how long a while is.
    fn both_clocks_run_at_the_same_speed(test) {
        let (Some(wall_before), before) = (time::wall_clock(), time::now()) else {
            test.check(false, "there is no wall clock");
            return;
        };
        task::block_on(time::sleep(Duration::from_millis(400)));
        let elapsed = before.elapsed();
        let wall = time::wall_clock().unwrap_or_default().saturating_sub(wall_before);
        test.check(
            wall.abs_diff(elapsed) < Duration::from_millis(20),
            format_args!("{elapsed:?} by the clock, {wall:?} by the wall clock"),
        );
    }

    /// Many timers end in the order of their deadlines.
    fn timers_end_in_order(test) {
        static ENDED: janus_kernel::sync::IrqMutex<Vec<u64>> =
            janus_kernel::sync::IrqMutex::new(Vec::new());
        let start = time::now();
        let handles: Vec<_> = (0..50_u64)
            .map(|index| {
                // A permutation: 7 and 50 have no common divisor. The first is due when all are waiting, also where the
                // host has other work: one that is due before it waits ends at once.
                let ms = 200 + index * 7 % 50 * 3;
                task::spawn("timer", async move {
                    time::sleep_until(start + Duration::from_millis(ms)).await;
                    ENDED.lock().push(ms);
                })
            })
            .collect();
        task::block_on(async {
            for handle in handles {
                handle.await;
            }
        });
        let ended = ENDED.lock();
        test.equal("timers that ended", ended.len(), 50);
        test.check(ended.is_sorted(), format_args!("order: {:?}", *ended));
    }

    /// A time limit ends what takes too long, and only that.
    fn a_timeout_ends_what_takes_too_long(test) {
        let long = task::block_on(time::timeout(Duration::from_millis(10), time::sleep(Duration::from_secs(60))));
        test.check(long.is_err(), "a minute passed in 10 ms");
        let short = task::block_on(time::timeout(Duration::from_secs(60), async { 5 }));
        test.check(matches!(short, Ok(5)), "what was ready timed out");
    }
}
