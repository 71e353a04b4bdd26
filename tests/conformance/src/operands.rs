//! Memory by address.
// UNSAFETY: reads memory that Xen has placed.
#![expect(unsafe_code, reason = "reads memory that Xen has placed")]

/// The word at an address of Xen's boot area, which stays mapped.
pub(crate) fn read(address: u64) -> u64 {
    let address = usize::try_from(address).unwrap_or(0);
    // SAFETY: only called for addresses of the boot area and of pages of ours.
    unsafe { core::ptr::with_exposed_provenance::<u64>(address).read_volatile() }
}
