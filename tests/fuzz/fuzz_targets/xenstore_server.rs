//! See `janus_fuzz::targets::xenstore_server`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::xenstore_server(input));
