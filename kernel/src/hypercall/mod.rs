//! Hypercalls: the instruction, and one typed wrapper for each call the kernel makes.
//!
//! This is the only place with the hypercalls of a PV guest or the `vmcall`/`vmmcall` of a PVH guest.
//! Which is decided once by [`init`], by the door and the CPU's vendor
//! (`xen/include/public/arch-x86/xen-x86_64.h`: number in rax, arguments in rdi, rsi, rdx, r10, r8,
//! result in rax). A PV guest calls the hypercall page, which its host fills with the fastest way in
//! that it has: `syscall` under Xen, where a call loses rcx and r11; a plain jump in a process.
//!
//! Wrappers are safe where the call cannot break memory safety whatever its arguments (Xen copies and
//! checks them); those that change what memory means (page tables, p2m, descriptor tables) are
//! `unsafe` and say what the caller promises. Layouts are in [`janus_proto::abi::xen`].
// UNSAFETY: inline assembly, and pointers handed to the hypervisor.
#![expect(unsafe_code, reason = "the hypercall instruction, and pointers handed to the hypervisor")]

use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use janus_proto::abi::xen::sched::{SchedOp, Shutdown, ShutdownReason};
use janus_proto::abi::xen::vcpu::{SetSingleshotTimer, SingleshotFlags, VcpuOp};
use janus_proto::abi::xen::version::{FeatureInfo, XenFeatures, XenVersionOp};
use janus_proto::abi::xen::{ConsoleIo, Errno, Hypercall};

pub mod cpu;
pub mod event;
pub mod grant;
pub mod hvm;
pub mod memory;

/// How this domain enters the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Method {
    /// PV: a call of the hypercall page.
    Page = 1,
    /// HVM and PVH on Intel CPUs.
    Vmcall = 2,
    /// HVM and PVH on AMD and Hygon CPUs.
    Vmmcall = 3,
}

/// Bytes of one call's entry in the hypercall page.
const PAGE_ENTRY: u64 = 32;

static METHOD: AtomicU8 = AtomicU8::new(0);
/// Address of the hypercall page, for [`Method::Page`].
static PAGE: AtomicU64 = AtomicU64::new(0);

/// Chooses the instruction; called once, before any other function of this module.
pub fn init(method: Method) {
    METHOD.store(method as u8, Ordering::Relaxed);
}

/// Chooses the hypercall page at `page`; called once, before any other function of this module.
///
/// # Safety
/// A hypervisor has filled that page, and it is executable.
pub unsafe fn init_page(page: u64) {
    PAGE.store(page, Ordering::Relaxed);
    init(Method::Page);
}

/// Whether [`init`] was called: there is a Xen underneath.
#[must_use]
pub fn available() -> bool {
    METHOD.load(Ordering::Relaxed) != 0
}

/// Results of hypercalls: a count or a value of the call's own, or Xen's error number.
pub type Result<T = u64> = core::result::Result<T, Errno>;

/// Makes one hypercall and sorts its result into value and error.
///
/// # Safety
/// The call's own contract: pointers among `args` are valid for what the call does with them, and the
/// call does not change memory or machine state that safe code relies on.
#[inline]
pub unsafe fn call(number: Hypercall, args: [u64; 5]) -> Result {
    // SAFETY: the caller's promise.
    Errno::check(unsafe { raw(number, args) })
}

/// The instruction itself.
///
/// # Safety
/// As for [`call`].
#[inline]
unsafe fn raw(number: Hypercall, [a1, a2, a3, a4, a5]: [u64; 5]) -> i64 {
    macro_rules! enter {
        ($instruction:literal $(, $entry:ident)?) => {{
            let result: i64;
            // SAFETY: the registers are the ABI's; a debug Xen loses the arguments and a PV call also rcx
            // and r11, so all of them are outputs; memory and stack are clobbered (neither `nomem` nor
            // `nostack`); `init_page` vouches for the page.
            unsafe {
                asm!($instruction,
                    $($entry = in(reg) $entry,)?
                    inlateout("rax") number.0 => result,
                    inlateout("rdi") a1 => _, inlateout("rsi") a2 => _, inlateout("rdx") a3 => _,
                    inlateout("r10") a4 => _, inlateout("r8") a5 => _,
                    lateout("rcx") _, lateout("r11") _);
            }
            result
        }};
    }
    match METHOD.load(Ordering::Relaxed) {
        1 => {
            let entry = PAGE.load(Ordering::Relaxed) + number.0 * PAGE_ENTRY;
            enter!("call {entry}", entry)
        }
        2 => enter!("vmcall"),
        3 => enter!("vmmcall"),
        // No hypervisor: what Xen would say of an unknown call.
        _ => -i64::from(Errno::ENOSYS.0),
    }
}

/// The address of a structure, as an argument.
fn address<T: ?Sized>(value: &T) -> u64 {
    core::ptr::from_ref(value).cast::<u8>().expose_provenance() as u64
}

/// The address of a structure that Xen writes into.
fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    core::ptr::from_mut(value).cast::<u8>().expose_provenance() as u64
}

/// Writes to Xen's own console: the first domain always may, others only in a debug Xen.
///
/// # Errors
/// [`Errno::EPERM`] in an ordinary guest.
pub fn console_write(bytes: &[u8]) -> Result<()> {
    let args = [ConsoleIo::WRITE.0.into(), bytes.len() as u64, address(bytes), 0, 0];
    // SAFETY: Xen reads `bytes`.
    unsafe { call(Hypercall::CONSOLE_IO, args) }.map(drop)
}

/// Reads what was typed on Xen's own console; answers how many bytes.
///
/// # Errors
/// As [`console_write`].
pub fn console_read(buf: &mut [u8]) -> Result<usize> {
    let args = [ConsoleIo::READ.0.into(), buf.len() as u64, address_mut(buf), 0, 0];
    // SAFETY: Xen writes at most `buf.len()` bytes into `buf`.
    let count = unsafe { call(Hypercall::CONSOLE_IO, args) }?;
    Ok(usize::try_from(count).unwrap_or(usize::MAX).min(buf.len()))
}

/// The version of Xen: major in the high half word, minor in the low.
///
/// As every hypercall, it also delivers pending events on its way back, and it does nothing else.
///
/// # Errors
/// There is no Xen.
pub fn xen_version() -> Result {
    // SAFETY: this subcall takes no argument.
    unsafe { call(Hypercall::XEN_VERSION, [XenVersionOp::VERSION.0.into(), 0, 0, 0, 0]) }
}

/// What this Xen does for this kind of guest.
///
/// # Errors
/// There is no Xen.
pub fn xen_features() -> Result<XenFeatures> {
    let mut info = FeatureInfo { submap_idx: 0, submap: 0 };
    let args = [XenVersionOp::GET_FEATURES.0.into(), address_mut(&mut info), 0, 0, 0];
    // SAFETY: Xen reads and writes the structure.
    unsafe { call(Hypercall::XEN_VERSION, args) }?;
    Ok(XenFeatures::from_bits_retain(info.submap))
}

/// Unmasks events and waits for one, in one step.
pub fn block() {
    // SAFETY: no argument. It cannot fail.
    let _ = unsafe { call(Hypercall::SCHED_OP, [SchedOp::BLOCK.0.into(), 0, 0, 0, 0]) };
}

/// Lets other domains run.
pub fn yield_cpu() {
    // SAFETY: no argument. It cannot fail.
    let _ = unsafe { call(Hypercall::SCHED_OP, [SchedOp::YIELD.0.into(), 0, 0, 0, 0]) };
}

/// Ends the domain. Returns only if Xen refuses.
///
/// # Errors
/// Xen's.
pub fn shutdown(reason: ShutdownReason) -> Result<()> {
    let argument = Shutdown { reason };
    // SAFETY: Xen reads the structure.
    unsafe { call(Hypercall::SCHED_OP, [SchedOp::SHUTDOWN.0.into(), address(&argument), 0, 0, 0]) }
        .map(drop)
}

/// Asks for `VIRQ_TIMER` on CPU `vcpu` once Xen's system time reaches `timeout_abs_ns`; at once if it has.
///
/// # Errors
/// No such CPU.
pub fn set_singleshot_timer(vcpu: u32, timeout_abs_ns: u64) -> Result<()> {
    let argument =
        SetSingleshotTimer { timeout_abs_ns, flags: SingleshotFlags::empty(), pad0: [0; 4] };
    // SAFETY: Xen reads the structure.
    unsafe { vcpu_op(VcpuOp::SET_SINGLESHOT_TIMER, vcpu, address(&argument)) }
}

/// Takes [`set_singleshot_timer`] back.
///
/// # Errors
/// No such CPU.
pub fn stop_singleshot_timer(vcpu: u32) -> Result<()> {
    // SAFETY: no structure.
    unsafe { vcpu_op(VcpuOp::STOP_SINGLESHOT_TIMER, vcpu, 0) }
}

/// Ends the 100 Hz timer that Xen starts for every PV CPU.
///
/// # Errors
/// No such CPU.
pub fn stop_periodic_timer(vcpu: u32) -> Result<()> {
    // SAFETY: no structure.
    unsafe { vcpu_op(VcpuOp::STOP_PERIODIC_TIMER, vcpu, 0) }
}

/// # Safety
/// As [`call`].
unsafe fn vcpu_op(op: VcpuOp, vcpu: u32, argument: u64) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { call(Hypercall::VCPU_OP, [op.0.into(), vcpu.into(), argument, 0, 0]) }.map(drop)
}
