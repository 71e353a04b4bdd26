//! The two 8259 interrupt controllers of a PC: silenced, because the IOAPIC does their work.
// UNSAFETY: port output.
#![expect(unsafe_code, reason = "port output")]

use crate::platform::native::outb;

const COMMAND_1: u16 = 0x20;
const DATA_1: u16 = 0x21;
const COMMAND_2: u16 = 0xa0;
const DATA_2: u16 = 0xa1;

/// Masks every line of both controllers, with their vectors moved out of the exceptions' way, should
/// a spurious one come nevertheless. A machine without them ignores the writes.
pub(crate) fn silence() {
    /// Spurious legacy interrupts arrive here and are counted as stray.
    const VECTORS: u8 = 0xe0;
    for (port, value) in [
        (COMMAND_1, 0x11),
        (COMMAND_2, 0x11),
        (DATA_1, VECTORS),
        (DATA_2, VECTORS + 8),
        (DATA_1, 4),
        (DATA_2, 2),
        (DATA_1, 1),
        (DATA_2, 1),
        (DATA_1, 0xff),
        (DATA_2, 0xff),
    ] {
        // SAFETY: the controllers' own ports; all they do afterwards is stay silent.
        unsafe { outb(port, value) }
    }
}
