//! See `janus_fuzz::targets::usernet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::usernet(input));
