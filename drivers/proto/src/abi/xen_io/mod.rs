//! Xen's device protocols (`xen/include/public/io/`), one module for each header.
//!
//! Everything here is read from memory that a peer may write: only open enums and plain integers.

pub mod blkif;
pub mod console;
pub mod netif;
pub mod ring;
pub mod xenbus;
pub mod xs_wire;
