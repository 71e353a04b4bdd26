//! Fuzz targets for everything that reads what a peer wrote.
//!
//! With cargo-fuzz: `cargo fuzz run ring` here. Without: `tests/fuzz/run ring 60`, which asks the stable compiler for
//! what libFuzzer needs. Without either: `cargo test -p janus-tests --test fuzz`, which runs them for a moment.

pub mod targets;
