//! See `janus_fuzz::targets::kernel_image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| janus_fuzz::targets::kernel_image(input));
