//! The last words: the panic handler, and what exceptions use to report.
//!
//! A report goes through the early console, which needs no locks, memory or interrupts. A second
//! failure, in the report itself, ends the machine without more words.
// UNSAFETY: walks the chain of stack frames.
#![expect(unsafe_code, reason = "reads the stack it stands on")]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

use janus_proto::addr::{Gpa, PAGE_SIZE, Pfn};

use crate::mm::frames;
use crate::power::{self, ExitStatus};
use crate::{percpu, platform, smp};

/// Frames of a backtrace at most.
const MAX_DEPTH: usize = 40;

/// With fewer free pages than this, memory is what is missing.
const SHORT: usize = 64;

/// The CPU that reports, as its number plus 1; 0: none.
static REPORTER: AtomicU32 = AtomicU32::new(0);

/// A writer for the kernel's last words.
#[derive(Debug)]
pub struct Report(());

impl Report {
    /// Begins the report, for which other CPUs are stopped. If this CPU reports already, that has failed, and the
    /// machine ends here; if another one does, this one leaves it to that.
    #[must_use]
    pub fn begin() -> Self {
        let own = percpu::current().id().0 + 1;
        match REPORTER.compare_exchange(0, own, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => {
                smp::stop_others();
                Self(())
            }
            Err(reporter) if reporter == own => {
                platform::early_write(b"\nfailed again while reporting\n");
                power::exit(ExitStatus::Crash)
            }
            Err(_) => smp::stand_still(),
        }
    }
}

/// Whether another CPU reports a failure, so that this one has to stand still.
pub(crate) fn reported_elsewhere() -> bool {
    let reporter = REPORTER.load(Ordering::SeqCst);
    reporter != 0 && reporter != percpu::current().id().0 + 1
}

impl Write for Report {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        platform::early_write(text.as_bytes());
        Ok(())
    }
}

/// Says so if memory has run short, which is then what an allocation's panic is about.
fn memory_line(out: &mut impl Write) {
    if let Some(memory) = frames::try_statistics().filter(|memory| memory.free < SHORT) {
        let (free, total) = (memory.free * PAGE_SIZE / 1024, memory.total * PAGE_SIZE / 1024);
        let _ = writeln!(out, "memory is short: {free} of {total} KiB free; give the machine more");
    }
}

/// Says which CPU it is, where there are several.
pub(crate) fn cpu_line(out: &mut impl Write) {
    if smp::several() {
        let _ = writeln!(out, "on CPU {}", percpu::current().id().0);
    }
}

/// Writes the call chain: `rip` first if it is known, then the return addresses of the frames from `rbp` on.
pub fn backtrace(out: &mut impl Write, rip: Option<u64>, rbp: u64) {
    let _ = writeln!(out, "backtrace:");
    if let Some(rip) = rip {
        line(out, rip);
    }
    let mut frame = rbp;
    for _ in 0..MAX_DEPTH {
        let Some((next, return_address)) = read_frame(frame) else { break };
        if return_address == 0 {
            break;
        }
        // The call is what should be named, and the return address may lie behind the function's end.
        line(out, return_address - 1);
        // The stack grows down, so callers' frames lie higher.
        if next <= frame {
            break;
        }
        frame = next;
    }
}

/// One line of a backtrace. The name comes from the table that the image carries, which a build that
/// did not go through `cargo xtask build` does not have.
fn line(out: &mut impl Write, address: u64) {
    let _ = match symbol(address) {
        Some((name, offset)) => writeln!(out, "  {address:#x} {}+{offset:#x}", name.as_str()),
        None => writeln!(out, "  {address:#x}"),
    };
}

#[cfg(target_os = "none")]
fn symbol(address: u64) -> Option<(janus_boot::symbols::Name, u64)> {
    use janus_boot::image::Image;
    Image::text().contains(&address).then(Image::symbols)??.lookup(address)
}

#[cfg(not(target_os = "none"))]
fn symbol(_address: u64) -> Option<(janus_boot::symbols::Name, u64)> {
    None
}

/// The saved frame pointer and the return address that `frame` points to, if that can be a stack.
fn read_frame(frame: u64) -> Option<(u64, u64)> {
    if frame == 0 || !frame.is_multiple_of(8) || !frames::is_ram(Pfn::containing(Gpa(frame)), 1) {
        return None;
    }
    let words = core::ptr::with_exposed_provenance::<[u64; 2]>(usize::try_from(frame).ok()?);
    // SAFETY: aligned, and RAM, which is mapped; a guard page would fault, and the report end there.
    let [next, return_address] = unsafe { words.read_volatile() };
    Some((next, return_address))
}

/// Where the caller's chain of stack frames begins.
#[must_use]
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let rbp: u64;
    // SAFETY: reads a register.
    unsafe {
        core::arch::asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags))
    };
    rbp
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    platform::disable_irqs();
    let mut report = Report::begin();
    let _ = writeln!(report, "\nkernel {info}");
    cpu_line(&mut report);
    memory_line(&mut report);
    backtrace(&mut report, None, frame_pointer());
    power::exit(ExitStatus::Crash)
}
