//! From the boot doors to the image's main function: the order of boot.
// UNSAFETY: defines the entry symbol that `janus_boot` calls, and vouches for what the loader said.
#![expect(unsafe_code, reason = "entry symbols, first use of memory")]

use core::fmt::Write;

use arrayvec::ArrayVec;
use janus_boot::image::Image;
use janus_boot::{BootInfo, MemoryKind, MemoryRange};
use janus_proto::addr::Gpa;

use crate::irq::{apic, pic};
use crate::mm::paging::Flags;
use crate::mm::paging::native::Section;
use crate::mm::{frames, paging};
use crate::panic::Report;
use crate::platform::{self, Platform, calibrate};
use crate::power::{self, ExitStatus};
use crate::trap::{fpu, idt};

#[unsafe(no_mangle)]
extern "Rust" fn janus_kernel_start(info: BootInfo) -> ! {
    let platform = platform::detect(info.door);
    platform::set_current(platform);
    if platform.is_native() {
        start_native(&info);
    }
    crate::println!("up at {} ns", platform::now_ns());
    power::exit(ExitStatus::PowerOff(0))
}

/// Ends a boot that cannot go on.
fn fail(what: &str, why: impl core::fmt::Display) -> ! {
    let mut report = Report::begin();
    let _ = writeln!(report, "cannot start: {what}: {why}");
    power::exit(ExitStatus::Crash)
}

/// The boot CPU and memory, where the kernel owns them (KVM, QEMU, Xen PVH).
fn start_native(info: &BootInfo) {
    let features = crate::cpu::features();
    // SAFETY: first thing on the boot CPU, with interrupts masked by the door.
    unsafe { idt::init() };
    // SAFETY: native, first, on this CPU.
    unsafe { fpu::init(features) };

    let taken: ArrayVec<MemoryRange, 40> = info
        .reserved
        .iter()
        .map(|r| MemoryRange { start: r.start, len: r.len, kind: MemoryKind::Reserved })
        .collect();
    // SAFETY: 1. `reserved` names everything that is in use; 2. the boot tables map 4 GiB.
    unsafe { frames::init(info.memory.ranges(), &taken, Gpa(1 << 32)) }
        .unwrap_or_else(|error| fail("memory", error));
    let section = |part: janus_boot::image::Part, flags| Section {
        start: usize::try_from(part.start).unwrap_or(0),
        end: usize::try_from(part.end).unwrap_or(0),
        flags,
    };
    let sections = [
        section(Image::text(), Flags::EXECUTE),
        section(Image::rodata(), Flags::empty()),
        section(Image::data(), Flags::WRITE),
    ];
    // SAFETY: 1. the boot tables map 4 GiB, and the allocator starts from below; 2. these are the image's parts.
    unsafe { paging::native::init(info.memory.ranges(), &sections) }
        .unwrap_or_else(|error| fail("page tables", error));

    pic::silence();
    if let Err(error) = apic::init(features) {
        fail("interrupt controller", error);
    }
    if platform::current() == Platform::Kvm {
        calibrate::start();
        calibrate::finish();
    }
}
