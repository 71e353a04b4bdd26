//! See `janus_fuzz::targets::page_tables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::page_tables(input));
