//! All of it.
// UNSAFETY: defines the entry symbol that `janus_boot` calls, and the allocator that its crates name.
#![expect(unsafe_code, reason = "the entry symbol, and an allocator without memory")]

use core::alloc::{GlobalAlloc, Layout};

use janus_boot::{BootInfo, early};

/// Where every door of `janus_boot` ends.
#[unsafe(no_mangle)]
extern "Rust" fn janus_kernel_start(_: BootInfo) -> ! {
    early::write(b"one line\n");
    early::power_off()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    early::crash()
}

/// The crates below could allocate; here nothing does.
struct NoMemory;

// SAFETY: hands out nothing.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static MEMORY: NoMemory = NoMemory;
