//! The host side of Janus: the back halves of the Xen devices, as a library.
//!
//! Everything here can run in one process with a guest's frontends, which is how `tests/` uses it: [`xenstored`] is the
//! daemon, [`blkback`] and [`netback`] serve a disk and a network card over granted pages, [`memory`] is how they see
//! the guest, [`storage`] what a disk is made of, and [`xenbus`] plugs devices in and out.

pub mod blkback;
pub mod cli;
pub mod config;
pub mod control;
pub mod doctor;
pub mod engine;
pub mod gdb;
pub mod guest;
pub mod host;
pub mod jail;
pub mod journal;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod netback;
pub mod postmortem;
pub mod pv;
pub mod storage;
pub mod supervise;
pub mod symbols;
pub mod usernet;
pub mod virtio;
pub mod xenbus;
pub mod xenstored;
