//! Guest drivers for Xen's paravirtual devices.
//!
//! - `grants`: granted memory as owned values;
//! - `blkfront`, `netfront`: the data paths; `blkfront_xs`, `netfront_xs`: what they agree on through xenstore;
//! - `blkfront_queues`, `netfront_queues`: one device over several of them;
//! - `nodes`: reading and writing the xenstore nodes of a device, without I/O.
//!
//! Nothing here waits or talks to xenstore: the kernel's bus does, and feeds these.

pub mod blkfront;
pub mod blkfront_queues;
pub mod blkfront_xs;
pub mod grants;
pub mod netfront;
pub mod netfront_queues;
pub mod netfront_xs;
pub mod nodes;
