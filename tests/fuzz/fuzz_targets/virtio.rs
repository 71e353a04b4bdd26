//! See `janus_fuzz::targets::virtio`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::virtio(input));
