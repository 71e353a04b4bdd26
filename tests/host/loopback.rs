//! The guest's real Xen frontends against the host's real backends, in one process, over real rings.
//!
//! `world` has xenstore, grants and events; `disk` and `card` the devices.

mod card;
mod disk;
mod world;
