//! Entropy.

use alloc::collections::BTreeSet;

use janus_kernel::{entropy, guest_test};

guest_test! {
    /// Random numbers do not repeat, and have about as many ones as zeroes.
    fn random_numbers_are_random(test) {
        let numbers: BTreeSet<u64> = (0..4096).map(|_| entropy::random_u64()).collect();
        test.equal("different numbers", numbers.len(), 4096);
        let ones: u32 = numbers.iter().map(|number| number.count_ones()).sum();
        // 131072 expected; ten standard deviations are 2560.
        test.check(ones.abs_diff(131_072) < 2560, format_args!("{ones} ones in 262144 bits"));
    }

    /// More than timing jitter has contributed: RDRAND, or a device.
    fn the_entropy_is_strong(test) {
        test.check(entropy::is_strong(), "only timing jitter has contributed");
    }
}
