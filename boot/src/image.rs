//! The image's own extent and parts, from the linker script (`link.ld`).
// UNSAFETY: names the linker script's symbols; only their addresses are taken.
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "extern symbols of the linker script")
)]

/// A page-aligned part of the image, as addresses.
pub type Part = core::ops::Range<u64>;

#[cfg(target_os = "none")]
macro_rules! symbol_address {
    ($name:ident) => {{
        unsafe extern "C" {
            static $name: u8;
        }
        // Only the address is used, so it does not matter what lies there.
        (&raw const $name).addr() as u64
    }};
}

/// The parts of the running image.
#[cfg(target_os = "none")]
#[derive(Clone, Copy, Debug)]
pub struct Image;

#[cfg(target_os = "none")]
impl Image {
    /// All of it, with bss.
    #[must_use]
    pub fn all() -> Part {
        symbol_address!(image_start)..symbol_address!(image_end)
    }
    /// Code: read and execute.
    #[must_use]
    pub fn text() -> Part {
        symbol_address!(text_start)..symbol_address!(text_end)
    }
    /// Constants, relocated constants, notes, symbols: read only.
    #[must_use]
    pub fn rodata() -> Part {
        symbol_address!(rodata_start)..symbol_address!(data_start)
    }
    /// Data and bss: read and write.
    #[must_use]
    pub fn data() -> Part {
        symbol_address!(data_start)..symbol_address!(data_end)
    }
    /// The page below the boot stack: not to be mapped.
    #[must_use]
    pub fn stack_guard() -> u64 {
        symbol_address!(boot_stack_guard)
    }
    /// The boot stack, above its guard page.
    #[must_use]
    pub fn stack() -> Part {
        symbol_address!(boot_stack_bottom)..symbol_address!(boot_stack_top)
    }
    /// The hypercall page, filled by the hypervisor under PV only.
    #[must_use]
    pub fn hypercall_page() -> u64 {
        symbol_address!(hypercall_page)
    }
    /// The symbol table, if `cargo xtask build` has put one in.
    #[must_use]
    pub fn symbols() -> Option<crate::symbols::Table<'static>> {
        unsafe extern "C" {
            static janus_symbols_start: u8;
            static janus_symbols_end: u8;
        }
        let start = (&raw const janus_symbols_start).expose_provenance();
        let len = (&raw const janus_symbols_end).addr() - start;
        // The symbol itself is one byte; the table is all of the image behind it.
        let start = core::ptr::with_exposed_provenance(start);
        // SAFETY: the linker script reserves the range, in read-only data.
        crate::symbols::Table::new(unsafe { core::slice::from_raw_parts(start, len) })
    }
}
