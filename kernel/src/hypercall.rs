//! Hypercalls: the instruction, the errors, and one typed wrapper for each call the kernel makes.
//!
//! This is the only place with the `syscall` of a PV guest or the `vmcall`/`vmmcall` of a PVH guest.
//! Which one is decided once by [`init`], by the door and the CPU's vendor; a hypercall page is not
//! needed for either (`xen/include/public/arch-x86/xen-x86_64.h`: number in rax, arguments in rdi,
//! rsi, rdx, r10, r8, result in rax, a PV call loses rcx and r11).
//!
//! Wrappers are safe where the call cannot break memory safety whatever its arguments (Xen copies and
//! checks them); those that change what memory means (page tables, p2m, descriptor tables, grants) are
//! `unsafe` and say what the caller promises. Layouts are in [`janus_proto::abi`].
// UNSAFETY: inline assembly, and pointers handed to the hypervisor.
#![expect(unsafe_code, reason = "the hypercall instruction, and pointers handed to the hypervisor")]

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicU8, Ordering};

/// How this domain enters the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Method {
    /// PV: the `syscall` instruction.
    Syscall = 1,
    /// HVM and PVH on Intel CPUs.
    Vmcall = 2,
    /// HVM and PVH on AMD and Hygon CPUs.
    Vmmcall = 3,
}

static METHOD: AtomicU8 = AtomicU8::new(0);

/// Chooses the instruction; called once, before any other function of this module.
pub fn init(method: Method) {
    METHOD.store(method as u8, Ordering::Relaxed);
}

/// Whether [`init`] was called: there is a Xen underneath.
#[must_use]
pub fn available() -> bool {
    METHOD.load(Ordering::Relaxed) != 0
}

/// What Xen answers instead of a result (`xen/include/public/errno.h`; the values are Linux's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallError {
    /// `EPERM`: not allowed to this domain.
    NotPermitted,
    /// `ENOENT`.
    NoEntry,
    /// `ESRCH`: no such domain.
    NoDomain,
    /// `ENOMEM`: Xen, or the host, has no memory for it.
    OutOfMemory,
    /// `EACCES`.
    AccessDenied,
    /// `EFAULT`: an argument's address is not mapped.
    BadAddress,
    /// `EBUSY`.
    Busy,
    /// `EEXIST`.
    Exists,
    /// `ENODEV`.
    NoDevice,
    /// `EINVAL`: a value Xen does not accept.
    Invalid,
    /// `ENOSPC`: a table is full.
    NoSpace,
    /// `ENOSYS`: this Xen has no such call.
    NotImplemented,
    /// `EOPNOTSUPP`.
    NotSupported,
    /// Another error number.
    Other(i32),
}

impl HypercallError {
    fn from_errno(errno: i64) -> Self {
        match errno {
            1 => Self::NotPermitted,
            2 => Self::NoEntry,
            3 => Self::NoDomain,
            12 => Self::OutOfMemory,
            13 => Self::AccessDenied,
            14 => Self::BadAddress,
            16 => Self::Busy,
            17 => Self::Exists,
            19 => Self::NoDevice,
            22 => Self::Invalid,
            28 => Self::NoSpace,
            38 => Self::NotImplemented,
            95 => Self::NotSupported,
            other => Self::Other(i32::try_from(other).unwrap_or(i32::MAX)),
        }
    }
}

impl fmt::Display for HypercallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::NotPermitted => "not permitted (EPERM)",
            Self::NoEntry => "no such entry (ENOENT)",
            Self::NoDomain => "no such domain (ESRCH)",
            Self::OutOfMemory => "out of memory (ENOMEM)",
            Self::AccessDenied => "access denied (EACCES)",
            Self::BadAddress => "bad address (EFAULT)",
            Self::Busy => "busy (EBUSY)",
            Self::Exists => "exists already (EEXIST)",
            Self::NoDevice => "no such device (ENODEV)",
            Self::Invalid => "invalid argument (EINVAL)",
            Self::NoSpace => "no space left (ENOSPC)",
            Self::NotImplemented => "not implemented (ENOSYS)",
            Self::NotSupported => "not supported (EOPNOTSUPP)",
            Self::Other(errno) => return write!(f, "hypercall error {errno}"),
        };
        f.write_str(text)
    }
}

impl core::error::Error for HypercallError {}

/// Results of hypercalls: a count or a value of the call's own, never negative.
pub type Result<T = u64> = core::result::Result<T, HypercallError>;

/// Makes one hypercall and sorts its result into value and error.
///
/// # Safety
/// The call's own contract: pointers among `args` are valid for what the call does with them, and the
/// call does not change memory or machine state that safe code relies on.
#[inline]
pub unsafe fn call(number: u32, args: [u64; 5]) -> Result {
    // SAFETY: the caller's promise.
    let result = unsafe { raw(number, args) };
    u64::try_from(result).map_err(|_| HypercallError::from_errno(result.wrapping_neg()))
}

/// The instruction itself.
///
/// # Safety
/// As for [`call`].
#[inline]
unsafe fn raw(number: u32, [a1, a2, a3, a4, a5]: [u64; 5]) -> i64 {
    macro_rules! enter {
        ($instruction:literal) => {{
            let result: i64;
            // SAFETY: the registers are the ABI's; a debug Xen loses the arguments and a PV call also rcx
            // and r11, so all of them are outputs; memory is clobbered (no `nomem`); the stack is not used.
            unsafe {
                asm!($instruction,
                    inlateout("rax") u64::from(number) => result,
                    inlateout("rdi") a1 => _, inlateout("rsi") a2 => _, inlateout("rdx") a3 => _,
                    inlateout("r10") a4 => _, inlateout("r8") a5 => _,
                    lateout("rcx") _, lateout("r11") _,
                    options(nostack));
            }
            result
        }};
    }
    match METHOD.load(Ordering::Relaxed) {
        1 => enter!("syscall"),
        2 => enter!("vmcall"),
        3 => enter!("vmmcall"),
        // No hypervisor: what Xen would say of an unknown call.
        _ => -38,
    }
}

/// Hypercall numbers (`xen.h`, `__HYPERVISOR_*`).
pub mod number {
    #![expect(missing_docs, reason = "each is named after the call it numbers")]
    pub const SET_TRAP_TABLE: u32 = 0;
    pub const MMU_UPDATE: u32 = 1;
    pub const SET_CALLBACKS: u32 = 4;
    pub const MEMORY_OP: u32 = 12;
    pub const MULTICALL: u32 = 13;
    pub const UPDATE_VA_MAPPING: u32 = 14;
    pub const XEN_VERSION: u32 = 17;
    pub const CONSOLE_IO: u32 = 18;
    pub const GRANT_TABLE_OP: u32 = 20;
    pub const IRET: u32 = 23;
    pub const VCPU_OP: u32 = 24;
    pub const SET_SEGMENT_BASE: u32 = 25;
    pub const MMUEXT_OP: u32 = 26;
    pub const SCHED_OP: u32 = 29;
    pub const EVENT_CHANNEL_OP: u32 = 32;
    pub const HVM_OP: u32 = 34;
}

/// The address of a structure, as an argument.
fn address<T: ?Sized>(value: &T) -> u64 {
    core::ptr::from_ref(value).cast::<u8>().expose_provenance() as u64
}

/// The address of a structure that Xen writes into.
fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    core::ptr::from_mut(value).cast::<u8>().expose_provenance() as u64
}

/// Writes to Xen's own console (`CONSOLEIO_write`): the first domain always may, others only in a debug Xen.
///
/// # Errors
/// [`HypercallError::NotPermitted`] in an ordinary guest.
pub fn console_write(bytes: &[u8]) -> Result<()> {
    // SAFETY: Xen reads `bytes`.
    unsafe { call(number::CONSOLE_IO, [0, bytes.len() as u64, address(bytes), 0, 0]) }.map(drop)
}

/// Reads what was typed on Xen's own console (`CONSOLEIO_read`); answers how many bytes.
///
/// # Errors
/// As [`console_write`].
pub fn console_read(buf: &mut [u8]) -> Result<usize> {
    // SAFETY: Xen writes at most `buf.len()` bytes into `buf`.
    let count = unsafe { call(number::CONSOLE_IO, [1, buf.len() as u64, address_mut(buf), 0, 0]) }?;
    Ok(usize::try_from(count).unwrap_or(usize::MAX).min(buf.len()))
}

/// The version of Xen: major in the high half word, minor in the low (`XENVER_version`).
///
/// As every hypercall, it also delivers pending events on its way back, and it does nothing else.
///
/// # Errors
/// There is no Xen.
pub fn xen_version() -> Result {
    // SAFETY: this subcall takes no argument.
    unsafe { call(number::XEN_VERSION, [0; 5]) }
}

/// The features of submap 0 (`XENVER_get_features`).
///
/// # Errors
/// There is no Xen.
pub fn xen_features() -> Result<u32> {
    let mut info = [0_u32; 2];
    // SAFETY: `xen_feature_info` is these two words: submap in, features out.
    unsafe { call(number::XEN_VERSION, [6, address_mut(&mut info), 0, 0, 0]) }?;
    let [_, features] = info;
    Ok(features)
}

/// Why a domain shuts down (`sched.h`, `SHUTDOWN_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ShutdownReason {
    /// The work is done.
    PowerOff = 0,
    /// Start again.
    Reboot = 1,
    /// The kernel failed.
    Crash = 3,
}

/// `SCHEDOP_block`: unmasks events and waits for one, in one step.
pub fn block() {
    // SAFETY: no argument. It cannot fail.
    let _ = unsafe { call(number::SCHED_OP, [1, 0, 0, 0, 0]) };
}

/// `SCHEDOP_yield`: lets other domains run.
pub fn yield_cpu() {
    // SAFETY: no argument. It cannot fail.
    let _ = unsafe { call(number::SCHED_OP, [0; 5]) };
}

/// `SCHEDOP_shutdown`. Returns only if Xen refuses, or if a suspend were resumed.
pub fn shutdown(reason: ShutdownReason) -> Result<()> {
    let argument = reason as u32;
    // SAFETY: `struct sched_shutdown` is this one word.
    unsafe { call(number::SCHED_OP, [2, address(&argument), 0, 0, 0]) }.map(drop)
}

/// `struct vcpu_set_singleshot_timer` (`vcpu.h`).
#[repr(C)]
struct SetSingleshotTimer {
    timeout_abs_ns: u64,
    flags: u32,
    _pad: u32,
}
janus_proto::assert_layout!(SetSingleshotTimer, size = 16, flags = 8);

/// Asks for `VIRQ_TIMER` on CPU `vcpu` once Xen's system time reaches `timeout_abs_ns`; at once if it has.
///
/// # Errors
/// No such CPU.
pub fn set_singleshot_timer(vcpu: u32, timeout_abs_ns: u64) -> Result<()> {
    let argument = SetSingleshotTimer { timeout_abs_ns, flags: 0, _pad: 0 };
    // SAFETY: VCPUOP_set_singleshot_timer reads this structure.
    unsafe { call(number::VCPU_OP, [8, vcpu.into(), address(&argument), 0, 0]) }.map(drop)
}

/// Takes [`set_singleshot_timer`] back.
///
/// # Errors
/// No such CPU.
pub fn stop_singleshot_timer(vcpu: u32) -> Result<()> {
    // SAFETY: VCPUOP_stop_singleshot_timer takes no structure.
    unsafe { call(number::VCPU_OP, [9, vcpu.into(), 0, 0, 0]) }.map(drop)
}

/// Ends the 100 Hz timer that Xen starts for every PV CPU.
///
/// # Errors
/// No such CPU.
pub fn stop_periodic_timer(vcpu: u32) -> Result<()> {
    // SAFETY: VCPUOP_stop_periodic_timer takes no structure.
    unsafe { call(number::VCPU_OP, [7, vcpu.into(), 0, 0, 0]) }.map(drop)
}

/// Event channel calls (`event_channel.h`).
pub mod event {
    use janus_proto::addr::{DomId, Port};

    use super::{Result, address, address_mut, call, number};

    /// `EVTCHNOP_alloc_unbound`: a port that `remote` may bind to.
    ///
    /// # Errors
    /// No port left, or no such domain.
    pub fn alloc_unbound(remote: DomId) -> Result<Port> {
        #[repr(C)]
        struct AllocUnbound {
            dom: u16,
            remote_dom: u16,
            port: u32,
        }
        janus_proto::assert_layout!(AllocUnbound, size = 8, remote_dom = 2, port = 4);
        let mut argument = AllocUnbound { dom: DomId::SELF.0, remote_dom: remote.0, port: 0 };
        // SAFETY: Xen reads the structure and writes `port`.
        unsafe { call(number::EVENT_CHANNEL_OP, [6, address_mut(&mut argument), 0, 0, 0]) }?;
        Ok(Port(argument.port))
    }

    /// `EVTCHNOP_bind_virq`: a port for a virtual interrupt of a CPU.
    ///
    /// # Errors
    /// Bound already, or no port left.
    pub fn bind_virq(virq: u32, vcpu: u32) -> Result<Port> {
        let mut argument = [virq, vcpu, 0];
        // SAFETY: `struct evtchn_bind_virq` is these three words; Xen writes the third.
        unsafe { call(number::EVENT_CHANNEL_OP, [1, address_mut(&mut argument), 0, 0, 0]) }?;
        let [_, _, port] = argument;
        Ok(Port(port))
    }

    /// `EVTCHNOP_bind_ipi`: a port by which this domain's CPUs interrupt `vcpu`.
    ///
    /// # Errors
    /// No such CPU, or no port left.
    pub fn bind_ipi(vcpu: u32) -> Result<Port> {
        let mut argument = [vcpu, 0];
        // SAFETY: `struct evtchn_bind_ipi` is these two words; Xen writes the second.
        unsafe { call(number::EVENT_CHANNEL_OP, [7, address_mut(&mut argument), 0, 0, 0]) }?;
        let [_, port] = argument;
        Ok(Port(port))
    }

    /// `EVTCHNOP_close`.
    ///
    /// # Errors
    /// Not an open port.
    pub fn close(port: Port) -> Result<()> {
        // SAFETY: `struct evtchn_close` is one word.
        unsafe { call(number::EVENT_CHANNEL_OP, [3, address(&port.0), 0, 0, 0]) }.map(drop)
    }

    /// `EVTCHNOP_send`: notifies the other side.
    ///
    /// # Errors
    /// The port is not bound to anything.
    pub fn send(port: Port) -> Result<()> {
        // SAFETY: `struct evtchn_send` is one word.
        unsafe { call(number::EVENT_CHANNEL_OP, [4, address(&port.0), 0, 0, 0]) }.map(drop)
    }

    /// `EVTCHNOP_unmask`: unmasks, and delivers what came while it was masked.
    ///
    /// # Errors
    /// Not a port.
    pub fn unmask(port: Port) -> Result<()> {
        // SAFETY: `struct evtchn_unmask` is one word.
        unsafe { call(number::EVENT_CHANNEL_OP, [9, address(&port.0), 0, 0, 0]) }.map(drop)
    }
}

/// Memory and page table calls; PV only, unless they say otherwise.
pub mod memory {
    use janus_proto::addr::{DomId, Mfn, Pfn};

    use super::{HypercallError, Result, address, address_mut, call, number};

    /// `struct mmu_update` (`xen.h`): the machine address of a page table entry and its new value.
    #[derive(Clone, Copy, Debug)]
    #[repr(C)]
    pub struct MmuUpdate {
        /// Machine address of the entry; the low two bits are the kind of update, 0 an ordinary one.
        pub ptr: u64,
        /// New value.
        pub val: u64,
    }

    /// `MMU_NORMAL_PT_UPDATE` for each of `updates`, in order; stops at the first that Xen refuses.
    ///
    /// # Errors
    /// Xen refused one.
    ///
    /// # Safety
    /// The new mappings break no rule that safe code relies on.
    pub unsafe fn mmu_update(updates: &[MmuUpdate]) -> Result<()> {
        if updates.is_empty() {
            return Ok(());
        }
        // SAFETY: Xen reads the array; the caller answers for the mappings.
        unsafe {
            call(
                number::MMU_UPDATE,
                [address(updates), updates.len() as u64, 0, DomId::SELF.0.into(), 0],
            )
        }
        .map(drop)
    }

    /// `UVMF_INVLPG | UVMF_ALL`: forget this address on all CPUs.
    pub const FLUSH_ADDRESS: u64 = 2 | 4;

    /// `update_va_mapping`: the last-level entry of `va`, whose tables exist.
    ///
    /// # Errors
    /// Xen refused it.
    ///
    /// # Safety
    /// As for [`mmu_update`].
    pub unsafe fn update_va_mapping(va: usize, entry: u64, flush: u64) -> Result<()> {
        // SAFETY: no pointers; the caller answers for the mapping.
        unsafe { call(number::UPDATE_VA_MAPPING, [va as u64, entry, flush, 0, 0]) }.map(drop)
    }

    /// `struct mmuext_op` (`xen.h`).
    #[derive(Clone, Copy, Debug)]
    #[repr(C)]
    struct MmuextOp {
        cmd: u32,
        _pad: u32,
        arg1: u64,
        arg2: u64,
    }
    janus_proto::assert_layout!(MmuextOp, size = 24, arg1 = 8, arg2 = 16);

    fn mmuext(cmd: u32, arg1: u64) -> Result<()> {
        let op = MmuextOp { cmd, _pad: 0, arg1, arg2: 0 };
        // SAFETY: Xen reads one structure; the commands used here (flushes, pins) change no mapping.
        unsafe {
            call(number::MMUEXT_OP, [address(&op), 1, 0, DomId::SELF.0.into(), 0])
        }
        .map(drop)
    }

    /// `MMUEXT_TLB_FLUSH_ALL`: forget all cached translations, on all CPUs.
    ///
    /// # Errors
    /// None are known.
    pub fn flush_tlb_all() -> Result<()> {
        mmuext(10, 0)
    }

    /// `struct multicall_entry` (`xen.h`).
    #[derive(Clone, Copy, Debug)]
    #[repr(C)]
    pub struct MulticallEntry {
        op: u64,
        result: i64,
        args: [u64; 6],
    }
    janus_proto::assert_layout!(MulticallEntry, size = 64, result = 8, args = 16);

    impl MulticallEntry {
        /// An `update_va_mapping` without a flush.
        #[must_use]
        pub fn update_va_mapping(va: usize, entry: u64) -> Self {
            Self {
                op: number::UPDATE_VA_MAPPING.into(),
                result: 0,
                args: [va as u64, entry, 0, 0, 0, 0],
            }
        }
        /// An `mmu_update` of one entry; `update` lives until the multicall is made.
        #[must_use]
        pub fn mmu_update(update: &MmuUpdate) -> Self {
            Self {
                op: number::MMU_UPDATE.into(),
                result: 0,
                args: [address(update), 1, 0, DomId::SELF.0.into(), 0, 0],
            }
        }
    }

    /// Makes all `calls` in one hypercall; the error is that of the first that failed.
    ///
    /// # Errors
    /// One of them failed.
    ///
    /// # Safety
    /// As for the calls themselves; what they point to is still there.
    pub unsafe fn multicall(calls: &mut [MulticallEntry]) -> Result<()> {
        // SAFETY: Xen reads the entries and writes their results; the caller answers for the calls.
        unsafe { call(number::MULTICALL, [address_mut(calls), calls.len() as u64, 0, 0, 0]) }?;
        match calls.iter().find(|entry| entry.result < 0) {
            Some(failed) => Err(HypercallError::from_errno(failed.result.wrapping_neg())),
            None => Ok(()),
        }
    }

    /// `struct xen_memory_reservation` (`memory.h`).
    #[repr(C)]
    struct Reservation {
        extent_start: u64,
        nr_extents: u64,
        extent_order: u32,
        mem_flags: u32,
        domid: u16,
        _pad: [u16; 3],
    }
    janus_proto::assert_layout!(Reservation, size = 32, extent_order = 16, domid = 24);

    /// Answers how many of the single-page `extents` were done; they are frame numbers in and out.
    ///
    /// # Safety
    /// As for the command.
    unsafe fn reservation(command: u64, extents: &mut [u64]) -> Result<usize> {
        let argument = Reservation {
            extent_start: address_mut(extents),
            nr_extents: extents.len() as u64,
            extent_order: 0,
            mem_flags: 0,
            domid: DomId::SELF.0,
            _pad: [0; 3],
        };
        // SAFETY: Xen reads the structure and reads or writes the list.
        let done = unsafe { call(number::MEMORY_OP, [command, address(&argument), 0, 0, 0]) }?;
        Ok(usize::try_from(done).unwrap_or(usize::MAX).min(extents.len()))
    }

    /// `XENMEM_decrease_reservation`: gives frames back to Xen; machine frames under PV, guest frames
    /// otherwise. Answers how many of them, from the first, Xen took.
    ///
    /// # Errors
    /// Xen refused.
    ///
    /// # Safety
    /// Nobody uses the frames, and under PV nothing maps them.
    pub unsafe fn decrease_reservation(frames: &mut [u64]) -> Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { reservation(1, frames) }
    }

    /// `XENMEM_populate_physmap`: puts memory under guest frames; under PV the list comes back as
    /// machine frames. Answers how many, from the first, Xen gave.
    ///
    /// # Errors
    /// Xen refused.
    ///
    /// # Safety
    /// The frames are this domain's and have no memory now.
    pub unsafe fn populate_physmap(frames: &mut [u64]) -> Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { reservation(6, frames) }
    }

    /// What [`add_to_physmap`] places (`memory.h`, `XENMAPSPACE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(u32)]
    pub enum MapSpace {
        /// The shared info page.
        SharedInfo = 0,
        /// A frame of the grant table.
        GrantTable = 1,
    }

    /// `XENMEM_add_to_physmap` (PVH): puts a page of Xen's under a guest frame.
    ///
    /// # Errors
    /// Xen refused.
    ///
    /// # Safety
    /// The frame is the caller's; its contents are replaced.
    pub unsafe fn add_to_physmap(space: MapSpace, index: u64, frame: Pfn) -> Result<()> {
        #[repr(C)]
        struct AddToPhysmap {
            domid: u16,
            size: u16,
            space: u32,
            idx: u64,
            gpfn: u64,
        }
        janus_proto::assert_layout!(AddToPhysmap, size = 24, space = 4, idx = 8, gpfn = 16);
        let argument =
            AddToPhysmap { domid: DomId::SELF.0, size: 0, space: space as u32, idx: index, gpfn: frame.0 };
        // SAFETY: Xen reads the structure; the caller answers for the frame.
        unsafe { call(number::MEMORY_OP, [7, address(&argument), 0, 0, 0]) }.map(drop)
    }

    /// `MMU_MACHPHYS_UPDATE`: tells Xen that machine frame `mfn` is our frame `pfn`.
    ///
    /// # Errors
    /// Not our frame.
    pub fn set_machine_to_physical(mfn: Mfn, pfn: Pfn) -> Result<()> {
        let update = MmuUpdate { ptr: (mfn.0 << 12) | 1, val: pfn.0 };
        // SAFETY: changes Xen's table of names, not a mapping.
        unsafe { mmu_update(&[update]) }
    }
}

/// Grant table calls (`grant_table.h`).
pub mod grant {
    use janus_proto::addr::DomId;

    use super::{HypercallError, Result, address_mut, call, number};

    /// `GNTTABOP_setup_table` (PV): sizes the table to `frames.len()` frames and fills in their machine frames.
    ///
    /// # Errors
    /// More frames than the domain may have, or no memory.
    pub fn setup_table(frames: &mut [u64]) -> Result<()> {
        #[repr(C)]
        struct SetupTable {
            dom: u16,
            nr_frames: u32,
            status: i16,
            frame_list: u64,
        }
        janus_proto::assert_layout!(SetupTable, size = 24, nr_frames = 4, status = 8, frame_list = 16);
        let mut argument = SetupTable {
            dom: DomId::SELF.0,
            nr_frames: u32::try_from(frames.len()).map_err(|_| HypercallError::Invalid)?,
            status: 0,
            frame_list: address_mut(frames),
        };
        // SAFETY: Xen reads the structure, writes `status` and `nr_frames` words of the list.
        unsafe { call(number::GRANT_TABLE_OP, [2, address_mut(&mut argument), 1, 0, 0]) }?;
        status(argument.status)
    }

    /// The sizes of the grant table, in frames.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TableSize {
        /// Now.
        pub now: u32,
        /// At most.
        pub max: u32,
    }

    /// `GNTTABOP_query_size`.
    ///
    /// # Errors
    /// None are known.
    pub fn query_size() -> Result<TableSize> {
        #[repr(C)]
        struct QuerySize {
            dom: u16,
            nr_frames: u32,
            max_nr_frames: u32,
            status: i16,
        }
        janus_proto::assert_layout!(QuerySize, size = 16, nr_frames = 4, max_nr_frames = 8, status = 12);
        let mut argument = QuerySize { dom: DomId::SELF.0, nr_frames: 0, max_nr_frames: 0, status: 0 };
        // SAFETY: Xen reads and writes the structure.
        unsafe { call(number::GRANT_TABLE_OP, [6, address_mut(&mut argument), 1, 0, 0]) }?;
        status(argument.status)?;
        Ok(TableSize { now: argument.nr_frames, max: argument.max_nr_frames })
    }

    /// `GNTST_*`: 0 is fine, everything below is an error.
    fn status(status: i16) -> Result<()> {
        match status {
            0 => Ok(()),
            -2 => Err(HypercallError::NoDomain),
            -13 => Err(HypercallError::NoSpace),
            -8 => Err(HypercallError::NotPermitted),
            _ => Err(HypercallError::Invalid),
        }
    }
}

/// Calls that set up a CPU under PV.
pub mod cpu {
    use super::{Result, address, call, number};

    /// `struct trap_info` (`arch-x86/xen.h`).
    #[derive(Clone, Copy, Debug, Default)]
    #[repr(C)]
    pub struct TrapInfo {
        /// Exception vector.
        pub vector: u8,
        /// Bits 0-1: privilege that may raise it by `int`; bit 2: mask events on entry.
        pub flags: u8,
        /// Code selector of the handler.
        pub cs: u16,
        /// Code address of the handler; 0 ends the table.
        pub address: u64,
    }
    janus_proto::assert_layout!(TrapInfo, size = 16, cs = 2, address = 8);

    /// `set_trap_table`.
    ///
    /// # Errors
    /// A bad address or selector.
    ///
    /// # Safety
    /// The addresses are those of entry stubs for Xen's stack frames; the table ends with address 0.
    pub unsafe fn set_trap_table(table: &[TrapInfo]) -> Result<()> {
        // SAFETY: Xen reads up to the entry with address 0.
        unsafe { call(number::SET_TRAP_TABLE, [address(table), 0, 0, 0, 0]) }.map(drop)
    }

    /// `set_callbacks`: where events, failed returns and (user) system calls enter the kernel.
    ///
    /// # Errors
    /// A bad address.
    ///
    /// # Safety
    /// As for [`set_trap_table`].
    pub unsafe fn set_callbacks(event: u64, failsafe: u64, syscall: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { call(number::SET_CALLBACKS, [event, failsafe, syscall, 0, 0]) }.map(drop)
    }

    /// `set_segment_base` of the GS base that is in force in the kernel (`SEGBASE_GS_KERNEL`).
    ///
    /// # Errors
    /// Not an address.
    ///
    /// # Safety
    /// What the kernel reads through GS lies there.
    pub unsafe fn set_gs_base(base: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { call(number::SET_SEGMENT_BASE, [2, base, 0, 0, 0]) }.map(drop)
    }
}

/// Calls of a guest in a hardware container (`hvm/hvm_op.h`, `hvm/params.h`).
pub mod hvm {
    use janus_proto::addr::DomId;

    use super::{Result, address_mut, call, number};

    /// `HVM_PARAM_CALLBACK_IRQ`: how events reach the guest.
    pub const PARAM_CALLBACK_IRQ: u32 = 0;
    /// `HVM_PARAM_STORE_PFN`.
    pub const PARAM_STORE_PFN: u32 = 1;
    /// `HVM_PARAM_STORE_EVTCHN`.
    pub const PARAM_STORE_EVTCHN: u32 = 2;
    /// `HVM_PARAM_CONSOLE_PFN`.
    pub const PARAM_CONSOLE_PFN: u32 = 17;
    /// `HVM_PARAM_CONSOLE_EVTCHN`.
    pub const PARAM_CONSOLE_EVTCHN: u32 = 18;

    /// `struct xen_hvm_param`.
    #[repr(C)]
    struct Param {
        domid: u16,
        _pad: u16,
        index: u32,
        value: u64,
    }
    janus_proto::assert_layout!(Param, size = 16, index = 4, value = 8);

    /// `HVMOP_get_param`.
    ///
    /// # Errors
    /// No such parameter.
    pub fn get_param(index: u32) -> Result {
        let mut argument = Param { domid: DomId::SELF.0, _pad: 0, index, value: 0 };
        // SAFETY: Xen reads the structure and writes `value`.
        unsafe { call(number::HVM_OP, [1, address_mut(&mut argument), 0, 0, 0]) }?;
        Ok(argument.value)
    }

    /// `HVMOP_set_param`.
    ///
    /// # Errors
    /// No such parameter, or not allowed.
    ///
    /// # Safety
    /// The kernel is prepared for what the parameter causes.
    pub unsafe fn set_param(index: u32, value: u64) -> Result<()> {
        let mut argument = Param { domid: DomId::SELF.0, _pad: 0, index, value };
        // SAFETY: Xen reads the structure; the caller answers for the consequences.
        unsafe { call(number::HVM_OP, [0, address_mut(&mut argument), 0, 0, 0]) }.map(drop)
    }
}
