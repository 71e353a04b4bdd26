//! Version and features of the hypervisor (`xen/include/public/{version,features}.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// First argument of `Hypercall::XEN_VERSION` (`XENVER_*`).
    pub enum XenVersionOp: u32 {
        /// Answers major << 16 | minor. No argument.
        VERSION = 0,
        /// 16 bytes of text, OUT.
        EXTRAVERSION = 1,
        /// [`CompileInfo`], OUT.
        COMPILE_INFO = 2,
        /// 1024 bytes of text, OUT.
        CAPABILITIES = 3,
        /// 64 bytes of text, OUT.
        CHANGESET = 4,
        /// First virtual address of Xen as `u64`, OUT.
        PLATFORM_PARAMETERS = 5,
        /// [`FeatureInfo`].
        GET_FEATURES = 6,
        /// Answers the page size.
        PAGESIZE = 7,
        /// The 16 bytes of the domain UUID, OUT.
        GUEST_HANDLE = 8,
        /// 1024 bytes of text, OUT.
        COMMANDLINE = 9,
    }
}

/// Asks for 32 feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FeatureInfo {
    /// Which 32; only 0 exists.
    pub submap_idx: u32,
    /// OUT: [`XenFeatures`].
    pub submap: u32,
}
assert_layout!(FeatureInfo, size = 8, submap_idx = 0, submap = 4);

/// How Xen was compiled: texts ended by a zero byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CompileInfo {
    /// Compiler.
    pub compiler: [u8; 64],
    /// By whom.
    pub compile_by: [u8; 16],
    /// Where.
    pub compile_domain: [u8; 32],
    /// When.
    pub compile_date: [u8; 32],
}
assert_layout!(
    CompileInfo,
    size = 144,
    compiler = 0,
    compile_by = 64,
    compile_domain = 80,
    compile_date = 112
);

open_flags! {
    /// Feature bits (`XENFEAT_*`).
    pub struct XenFeatures: u32 {
        /// Direct page-table writes are allowed.
        const WRITABLE_PAGE_TABLES = 1 << 0;
        /// Descriptor tables may be writable.
        const WRITABLE_DESCRIPTOR_TABLES = 1 << 1;
        /// Guest frames are translated: not PV.
        const AUTO_TRANSLATED_PHYSMAP = 1 << 2;
        /// The kernel may run in ring 0.
        const SUPERVISOR_MODE_KERNEL = 1 << 3;
        /// The PAE root may lie above 4 GiB.
        const PAE_PGDIR_ABOVE_4GB = 1 << 4;
        /// `MmuUpdateKind::PT_UPDATE_PRESERVE_AD` works.
        const MMU_PT_UPDATE_PRESERVE_AD = 1 << 5;
        /// `MmuextCmd::{CLEAR,COPY}_PAGE` work.
        const HIGHMEM_ASSIST = 1 << 6;
        /// Grant maps set the available bits.
        const GNTTAB_MAP_AVAIL_BITS = 1 << 7;
        /// The callback may be a vector.
        const HVM_CALLBACK_VECTOR = 1 << 8;
        /// pvclock is safe outside PV.
        const HVM_SAFE_PVCLOCK = 1 << 9;
        /// pirqs work outside PV.
        const HVM_PIRQS = 1 << 10;
        /// Xen can run a dom0.
        const DOM0 = 1 << 11;
        /// Grants are also mapped at pfn = mfn.
        const GRANT_MAP_IDENTITY = 1 << 12;
        /// Virtual nodes in memory operations.
        const MEMORY_OP_VNODE_SUPPORTED = 1 << 13;
        /// The frames that the guest names are those of the machine.
        const DIRECT_MAPPED = 1 << 17;
    }
}
