//! Fuzz targets for everything that reads what a peer wrote.
//!
//! - `cargo test` here (and in the workspace, for a moment) runs them on random scripts, without any tool.
//! - `tests/fuzz/run ring 60` runs one under libFuzzer and AddressSanitizer, with a stable compiler.
//! - `cargo fuzz run --features libfuzzer ring`, in `tests/`, does so with cargo-fuzz.

pub mod targets;

#[cfg(test)]
mod random;
