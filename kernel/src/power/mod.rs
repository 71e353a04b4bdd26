//! The end of the virtual machine, reported in each hypervisor's own way.
// UNSAFETY: writes the ports, and breaks the CPU state, that end a machine.
#![expect(unsafe_code, reason = "the ways to end a machine are ports and a triple fault")]

use core::sync::atomic::{AtomicU8, Ordering};
use core::time::Duration;

use crate::platform::native::{inb, outb};
use crate::sync::Notify;
use crate::{console, devices, platform, time};

pub mod acpi;

/// QEMU's `isa-debug-exit` where this project puts it (iobase 0xf4).
const DEBUG_EXIT: u16 = 0xf4;
/// Marks the code as ours: QEMU's exit status is `(value << 1) | 1`, so success is 33.
const DEBUG_EXIT_MARK: u8 = 0x10;
/// The largest code there is room for; larger ones are in the last report line.
const DEBUG_EXIT_MAX: u8 = 0x0f;
/// The keyboard controller's command port, and the command that pulses the CPU's reset line.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// QEMU's pvpanic device (`docs/specs/pvpanic.rst`): reading gives the events it knows, 1 is "panicked".
const PVPANIC: u16 = 0x505;
const PVPANIC_PANICKED: u8 = 1 << 0;
/// What reads as this is no port.
const NO_PORT: u8 = 0xff;
/// How long a disk may take to make its data stable when the machine is to end.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// Exit codes of tests, as the test report and the host's runner know them.
pub mod code {
    /// Everything asked for was done.
    pub const SUCCESS: u8 = 0;
    /// The test does not apply here.
    pub const SKIP: u8 = 3;
    /// The test could not be carried out.
    pub const ERROR: u8 = 4;
    /// The thing tested is wrong.
    pub const FAILURE: u8 = 5;
    /// The kernel itself failed.
    pub const CRASH: u8 = 6;
}

/// How the virtual machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// Power off with a code; 0 is success (see [`code`]).
    PowerOff(u8),
    /// Start again.
    Reboot,
    /// The kernel failed; hypervisors that tell crashes from other ends are told.
    Crash,
}

impl ExitStatus {
    /// The code that a host sees where there is room for one.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::PowerOff(code) => code,
            Self::Reboot => code::SUCCESS,
            Self::Crash => code::CRASH,
        }
    }
}

/// The console, without its locks.
struct LastWords;

impl core::fmt::Write for LastWords {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        platform::early_write(text.as_bytes());
        Ok(())
    }
}

/// Ends the virtual machine.
pub fn exit(status: ExitStatus) -> ! {
    platform::disable_irqs();
    console::flush();
    // For hosts without another way to learn the code; the early console works in any state.
    let _ = crate::test::report::exit(&mut LastWords, status.code());
    platform::end(status)
}

/// What somebody outside, or the shell, wants of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// The power button, or the tool stack's wish.
    PowerOff = 1,
    /// A restart.
    Reboot = 2,
}

static REQUESTED: AtomicU8 = AtomicU8::new(0);
static REQUEST: Notify = Notify::new();

/// Asks for an orderly end; callable from interrupt handlers.
pub fn request(what: Request) {
    REQUESTED.store(what as u8, Ordering::Release);
    REQUEST.notify();
}

/// Waits for a [`request`] and obeys it: the task that boot starts.
pub(crate) async fn obey() {
    let status = loop {
        let signal = REQUEST.notified();
        match REQUESTED.load(Ordering::Acquire) {
            0 => signal.await,
            code if code == Request::Reboot as u8 => break ExitStatus::Reboot,
            _ => break ExitStatus::PowerOff(code::SUCCESS),
        }
    };
    log::info!(
        "asked to end: {}",
        if status == ExitStatus::Reboot { "reboot" } else { "power off" }
    );
    shut_down(status).await
}

/// Makes all disks' data stable and ends the virtual machine.
pub async fn shut_down(status: ExitStatus) -> ! {
    for disk in devices::blocks() {
        match time::timeout(FLUSH_TIME, disk.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::warn!("{}: not flushed: {error}", disk.name()),
            Err(_) => log::warn!("{}: not flushed within {} s", disk.name(), FLUSH_TIME.as_secs()),
        }
    }
    exit(status)
}

/// Ends a virtual machine without Xen, by every way there is, the most telling first; comes back if none worked.
pub(crate) fn native_end(status: ExitStatus) {
    if status == ExitStatus::Crash {
        // SAFETY: asks the pvpanic device what it knows; other machines have nothing there.
        let known = unsafe { inb(PVPANIC) };
        if known != NO_PORT && known & PVPANIC_PANICKED != 0 {
            // SAFETY: tells the hypervisor that this guest has crashed.
            unsafe { outb(PVPANIC, PVPANIC_PANICKED) }
        }
    }
    if status != ExitStatus::Reboot {
        // SAFETY: ends QEMU; nothing else is known at this port.
        unsafe { outb(DEBUG_EXIT, DEBUG_EXIT_MARK | status.code().min(DEBUG_EXIT_MAX)) }
    }
    // A kernel that has failed does not run the firmware's byte code, nor take its locks.
    if matches!(status, ExitStatus::PowerOff(_)) {
        acpi::soft_off();
    }
    if status == ExitStatus::Reboot {
        acpi::reset();
    }
    // SAFETY: resets the machine, the last thing this kernel wants from it.
    unsafe { outb(I8042_COMMAND, I8042_RESET) }
    triple_fault();
}

/// Resets the machine by an exception that cannot be delivered.
#[cfg(target_os = "none")]
fn triple_fault() {
    let empty =
        x86_64::structures::DescriptorTablePointer { limit: 0, base: x86_64::VirtAddr::zero() };
    // SAFETY: with an empty table the next exception resets the machine, which is what is asked for.
    unsafe { x86_64::instructions::tables::lidt(&empty) };
    x86_64::instructions::interrupts::int3();
}

#[cfg(not(target_os = "none"))]
fn triple_fault() {}
