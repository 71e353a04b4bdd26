//! The tests of an image, as the linker collected them from the section `.janus.tests`.
// UNSAFETY: reads what the linker put between two symbols.
#![cfg_attr(
    target_os = "none",
    expect(
        unsafe_code,
        reason = "the linker's symbols are the only way to the collected descriptors"
    )
)]

use super::Test;

/// Longest name of a test, in bytes.
pub const NAME_BYTES: usize = 56;

/// One test: what [`crate::guest_test!`] puts into the section. The host reads the names from the ELF file.
#[repr(C)]
#[derive(Debug)]
pub struct Descriptor {
    /// The name, padded with zeroes.
    name: [u8; NAME_BYTES],
    /// The test.
    run: fn(&mut Test),
}

const _: () = assert!(size_of::<Descriptor>() == 64, "the host's reader counts on 64 bytes each");

impl Descriptor {
    /// A test under `name`, of at most [`NAME_BYTES`] bytes.
    ///
    /// # Panics
    /// At compile time, if the name is too long.
    #[must_use]
    pub const fn new(name: &str, run: fn(&mut Test)) -> Self {
        let bytes = name.as_bytes();
        assert!(bytes.len() <= NAME_BYTES, "the name of a test has at most 56 bytes");
        let mut padded = [0; NAME_BYTES];
        let mut index = 0;
        while index < bytes.len() {
            // Both lengths were compared above.
            #[expect(clippy::indexing_slicing, reason = "evaluated at compile time, and in bounds")]
            {
                padded[index] = bytes[index];
            }
            index += 1;
        }
        Self { name: padded, run }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
        self.name.get(..end).and_then(|bytes| core::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// Runs it.
    pub fn run(&self, test: &mut Test) {
        (self.run)(test);
    }
}

/// The tests linked into this image; on the host there are none.
#[cfg(target_os = "none")]
#[must_use]
pub fn all() -> &'static [Descriptor] {
    // Two symbols of boot/link.ld; they have no value, only addresses.
    unsafe extern "C" {
        static janus_tests_start: u8;
        static janus_tests_end: u8;
    }
    let start = (&raw const janus_tests_start).cast::<Descriptor>();
    let end = &raw const janus_tests_end;
    let count = (end.addr() - start.addr()) / size_of::<Descriptor>();
    // SAFETY: between the two symbols lie only `Descriptor`s, which `guest_test!` puts there, in
    // read-only memory that lives as long as the image; the script aligns the start to 16 bytes.
    unsafe { core::slice::from_raw_parts(start, count) }
}

/// The tests linked into this image; on the host there are none.
#[cfg(not(target_os = "none"))]
#[must_use]
pub fn all() -> &'static [Descriptor] {
    &[]
}

/// Registers a test of a test image: a function of one `&mut Test`, under its own name.
///
/// ```
/// janus_kernel::guest_test! {
///     /// Two and two.
///     fn numbers_add_up(test) {
///         test.check(2 + 2 == 4, "2 + 2 is not 4");
///     }
/// }
/// ```
#[macro_export]
macro_rules! guest_test {
    ($($(#[$attribute:meta])* fn $name:ident($test:ident) $body:block)+) => {$(
        $(#[$attribute])*
        fn $name($test: &mut $crate::test::Test) $body

        const _: () = {
            #[expect(unsafe_code, reason = "the section from which the linker collects the tests")]
            #[used]
            #[cfg_attr(target_os = "none", unsafe(link_section = ".janus.tests"))]
            #[cfg_attr(not(target_os = "none"), unsafe(link_section = "janus_tests"))]
            static DESCRIPTOR: $crate::test::Descriptor =
                $crate::test::Descriptor::new(stringify!($name), $name);
        };
    )+};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_keeps_its_name() {
        fn nothing(_: &mut Test) {}
        assert_eq!(Descriptor::new("short", nothing).name(), "short");
        let longest = "x".repeat(NAME_BYTES);
        assert_eq!(Descriptor::new(&longest, nothing).name(), longest);
    }
}
