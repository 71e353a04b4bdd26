//! ELF notes of a Xen guest (`xen/include/public/elfnote.h`); the owner name is "Xen".

open_enum! {
    /// Note types (`XEN_ELFNOTE_*`).
    pub enum ElfNote: u32 {
        /// Free text.
        INFO = 0,
        /// PV entry point.
        ENTRY = 1,
        /// Page that Xen fills with hypercall stubs.
        HYPERCALL_PAGE = 2,
        /// Virtual address of guest physical 0.
        VIRT_BASE = 3,
        /// Subtracted from ELF physical addresses.
        PADDR_OFFSET = 4,
        /// "xen-3.0".
        XEN_VERSION = 5,
        /// Name.
        GUEST_OS = 6,
        /// Version.
        GUEST_VERSION = 7,
        /// "generic".
        LOADER = 8,
        /// "yes".
        PAE_MODE = 9,
        /// Feature text.
        FEATURES = 10,
        /// "yes" to load symbols.
        BSD_SYMTAB = 11,
        /// Lowest address Xen may use.
        HV_START_LOW = 12,
        /// Mask and value of a present PTE.
        L1_MFN_VALID = 13,
        /// Suspend may be cancelled.
        SUSPEND_CANCEL = 14,
        /// Virtual address for the p2m list.
        INIT_P2M = 15,
        /// The module is not mapped.
        MOD_START_PFN = 16,
        /// `version::XenFeatures` bits.
        SUPPORTED_FEATURES = 17,
        /// PVH entry point.
        PHYS32_ENTRY = 18,
    }
}
