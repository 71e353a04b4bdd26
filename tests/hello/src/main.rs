//! A test image in 15 lines: sleeps, and checks the clock.
#![cfg_attr(target_os = "none", no_std, no_main)]

use core::time::Duration;
use janus_kernel::{guest_test, task, time};

guest_test! {
    /// Sleeping takes time.
    fn sleeping_takes_time(test) {
        let start = time::now();
        task::block_on(time::sleep(Duration::from_millis(10)));
        test.check(start.elapsed() >= Duration::from_millis(10), "woke up early");
    }
}
janus_kernel::test_image!();
