//! The fuzz targets of `tests/fuzz` for a moment, so that every `cargo test` runs them.

#[path = "../fuzz/src/random.rs"]
mod random;
#[path = "../fuzz/src/targets.rs"]
#[expect(unreachable_pub, reason = "in tests/fuzz it is the module of a library")]
mod targets;
