//! Runs the targets on scripts from a fixed random sequence, so that they run everywhere and always.
//!
//! `JANUS_FUZZ_SECONDS` (default: a quarter of a second each) makes it longer; every input differs, so a longer
//! run sees more. A failing input is printed.

use std::time::{Duration, Instant};

use super::targets;

/// Marsaglia's xorshift: the same sequence everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// A script: any bytes, or mostly small numbers, which reach further.
    fn script(&mut self) -> Vec<u8> {
        let len = self.next() % 400;
        let mask = if self.next().is_multiple_of(2) { 0xff } else { 0x1f };
        (0..len).map(|_| self.next().to_le_bytes()[3] & mask).collect()
    }
}

#[test]
fn targets_survive_random_scripts() {
    let seconds = std::env::var("JANUS_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = seconds.map_or(Duration::from_millis(250), Duration::from_secs);
    for (name, target) in targets::TARGETS {
        let (mut random, start) = (Random(0x4a61_6e75_7321), Instant::now());
        let mut inputs = 0_u64;
        while inputs < 100 || start.elapsed() < time {
            let script = random.script();
            let result = std::panic::catch_unwind(|| target(&script));
            assert!(result.is_ok(), "{name} fails on {script:?}");
            inputs += 1;
        }
        println!("{name}: {inputs} inputs");
    }
}

#[test]
fn targets_survive_nothing_and_edges() {
    for (_, target) in targets::TARGETS {
        for input in [&[][..], &[0], &[255], &[0; 1000], &[255; 1000], &[8; 1000]] {
            target(input);
        }
    }
}
