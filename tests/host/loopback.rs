//! The guest's real Xen frontends against the host's real backends, in one process, over real rings.
//!
//! `world` has xenstore, grants and events; `disk` and `card` the data paths, `bus` whole lives.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "what fails here is the test")]

mod bus;
mod card;
mod disk;
mod queues;
mod world;
