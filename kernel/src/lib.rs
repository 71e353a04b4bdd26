//! The guest kernel as a library: what a test image, or the default image, is built from.
#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(
    not(target_os = "none"),
    expect(dead_code, reason = "only the guest boots; its build has this lint on")
)]

extern crate alloc;

pub mod block;
pub mod command_line;
pub mod console;
pub mod cpu;
pub mod devices;
pub mod dma_pool;
pub mod entropy;
pub mod firmware;
pub mod fs;
pub mod http;
pub mod hypercall;
pub mod irq;
pub mod logger;
pub mod mem_ops;
pub mod mm;
pub mod net;
pub mod panic;
pub mod percpu;
pub mod platform;
pub mod power;
pub mod services;
pub mod shell;
pub mod smp;
#[cfg(target_os = "none")]
mod start;
pub mod sync;
pub mod task;
pub mod test;
pub mod time;
pub mod trap;
pub mod virtio;
pub mod xen;

use janus_boot::BootInfo;
use spin::Once;

static BOOT_INFO: Once<BootInfo> = Once::new();

/// What the loader said: command line, modules, memory map. None on the host.
#[must_use]
pub fn boot_info() -> Option<&'static BootInfo> {
    BOOT_INFO.get()
}

/// The kernel's command line as text; empty if there is none or it is not UTF-8.
#[must_use]
pub fn command_line() -> &'static str {
    boot_info().and_then(|info| core::str::from_utf8(info.command_line).ok()).unwrap_or("")
}

/// Names an image's main function: an `async fn() -> ExitStatus`, with which the machine ends.
///
/// ```
/// use janus_kernel::power::ExitStatus;
///
/// async fn hello() -> ExitStatus {
///     janus_kernel::println!("hello");
///     ExitStatus::PowerOff(0)
/// }
///
/// janus_kernel::entry!(hello);
/// ```
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        const _: () = {
            #[allow(unsafe_code, reason = "the symbol that the kernel calls")]
            #[cfg_attr(target_os = "none", unsafe(no_mangle))]
            #[allow(dead_code, reason = "the host has nobody who calls it")]
            extern "Rust" fn janus_main() -> $crate::power::ExitStatus {
                $crate::task::block_on($main())
            }
        };
    };
}
