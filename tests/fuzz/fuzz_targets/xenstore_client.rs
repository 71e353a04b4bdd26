//! See `janus_fuzz::targets::xenstore_client`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::xenstore_client(input));
