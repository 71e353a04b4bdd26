//! The daemons around a domain: what `xenstored`, `xenconsoled`, `xl` and a backend domain are to a guest of Xen.
//!
//! [`Host`] joins them to a [`Guest`]. What a guest asks for by an event is done on the thread that brings the
//! event, which is the virtual CPU's own: no other thread has to be woken. The event loop ([`events`]) is for what
//! comes from the host: sockets, terminals, network interfaces.
//!
//! Locks are taken in this order, and never two of one kind: the store's, then a device's rings', then its image or
//! network.

mod card;
pub mod console;
mod devices;
mod disk;
pub mod events;
pub mod guest;
mod home;
mod socket;
pub mod tap;
#[cfg(test)]
mod tests;
mod virtio;

pub use card::Doorbell;
pub use console::{Endpoint, Output};
pub use devices::{DeviceStatus, Host, HostError, Identity, Image, Network, OnDevice, PlugError};
pub use disk::DiskOptions;
pub use guest::{Guest, Notify};
pub use virtio::Reach;

/// The console of a domain.
pub type Console = std::sync::Arc<console::ConsoleCore<std::sync::Arc<crate::pv::domain::Domain>>>;
