//! Tests that cross crates: the real frontends against the real backends, in one process.
