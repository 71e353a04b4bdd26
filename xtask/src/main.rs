//! `cargo xtask`: the one entry point for building, running and testing.
fn main() {}
