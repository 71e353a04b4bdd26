//! From the boot doors to the image's main function.
// UNSAFETY: defines the entry symbol that `janus_boot` calls.
#![expect(unsafe_code, reason = "entry symbols")]

use core::fmt::Write;
use janus_boot::BootInfo;
use janus_boot::early::{self, EarlyConsole};

#[unsafe(no_mangle)]
extern "Rust" fn janus_kernel_start(info: BootInfo) -> ! {
    // The early console cannot fail.
    let _ = write!(EarlyConsole, "{}", info.summary());
    early::crash()
}
