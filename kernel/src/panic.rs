//! The panic handler.
use core::fmt::Write;
use janus_boot::early::{self, EarlyConsole};

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(EarlyConsole, "janus: {info}");
    early::crash()
}
