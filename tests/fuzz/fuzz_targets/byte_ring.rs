//! See `janus_fuzz::targets::byte_ring`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::byte_ring(input));
