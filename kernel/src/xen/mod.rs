//! Xen's services to a guest: the shared page, the console, grants, and what the toolstack asks for.
//!
//! Event channels are in [`crate::irq::evtchn`], hypercalls in [`crate::hypercall`], paging by
//! hypercall in [`crate::mm::paging::pv`].

pub mod balloon;
mod bus;
pub mod console;
mod control;
pub mod grant;
pub mod hal;
pub mod shared_info;
#[cfg(target_os = "none")]
pub(crate) mod start;
pub mod store;
mod vbd;
mod vif;
pub mod xenstore;
