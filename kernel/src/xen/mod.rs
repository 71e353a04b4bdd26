//! Xen's services to a guest: the shared page, the console, grants, and what the toolstack asks for.
//!
//! Event channels are in [`crate::irq::evtchn`], hypercalls in [`crate::hypercall`], paging by
//! hypercall in [`crate::mm::paging::pv`].

pub mod balloon;
mod bus;
pub mod console;
mod control;
mod device_frames;
pub mod grant;
pub mod hal;
pub mod shared_info;
#[cfg(target_os = "none")]
pub(crate) mod start;
pub mod store;
mod vbd;
mod vif;
mod virtio;
pub mod xenstore;

/// Queues that a device shall have, if its backend has as many: `xen.queues=N`. One task serves a device, so more than one
/// is for trying backends.
fn wanted_queues() -> u32 {
    let mut words = crate::command_line().split_ascii_whitespace();
    let wanted = words.find_map(|word| word.strip_prefix("xen.queues=")?.parse().ok());
    wanted.unwrap_or(1)
}
