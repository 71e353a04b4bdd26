//! The states of a device on the xenbus (`xen/include/public/io/xenbus.h`).

open_enum! {
    /// The value of a `state` node, written in decimal.
    pub enum XenbusState: u32 {
        /// The node is absent or nonsense.
        UNKNOWN = 0,
        /// Starting.
        INITIALISING = 1,
        /// Waiting for the peer to publish its details.
        INIT_WAIT = 2,
        /// Details published; waiting for the peer to connect.
        INITIALISED = 3,
        /// In use.
        CONNECTED = 4,
        /// Going away.
        CLOSING = 5,
        /// Gone.
        CLOSED = 6,
        /// Changing (PCI only).
        RECONFIGURING = 7,
        /// Changed (PCI only).
        RECONFIGURED = 8,
    }
}
