//! Console (virtio 1.2, 5.3).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `cols` and `rows` are valid.
pub const F_SIZE: u64 = 1 << 0;
/// `emerg_wr` works without queues.
pub const F_EMERG_WRITE: u64 = 1 << 2;
/// Input of port 0.
pub const QUEUE_RECEIVE: u16 = 0;
/// Output of port 0.
pub const QUEUE_TRANSMIT: u16 = 1;

/// Device configuration (virtio 1.2, 5.3.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
    /// Ports at most.
    pub max_nr_ports: u32,
    /// A character written here comes out at once.
    pub emerg_wr: u32,
}
assert_layout!(Config, size = 12, cols = 0, rows = 2, max_nr_ports = 4, emerg_wr = 8);
