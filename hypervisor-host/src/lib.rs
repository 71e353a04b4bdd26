//! The host side of Janus: the back halves of the Xen devices, as a library.
//!
//! Everything here can run in one process with a guest's frontends, which is how `tests/` uses it:
//! [`xenstored`] is the daemon.

pub mod xenstored;
