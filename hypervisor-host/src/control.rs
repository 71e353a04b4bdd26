//! Control of running guests: a socket for each, in a directory that only its user can enter.
//!
//! [`runtime`] is the directory and the names in it, [`protocol`] what is said, [`server`] the guest's side and
//! [`client`] the other. `janus ls`, `stop`, `console` and so on use nothing else (docs/control.md).

pub mod client;
pub mod protocol;
pub mod runtime;
pub mod server;
pub mod viewers;
