//! From the boot doors to the image's main function: the order of boot.
// UNSAFETY: defines the entry symbol that `janus_boot` calls, and vouches for what the loader said.
#![expect(unsafe_code, reason = "entry symbols, first use of memory")]

use core::fmt::Write;

use arrayvec::ArrayVec;
use janus_boot::image::{Image, Part};
use janus_boot::{BootInfo, MAX_RESERVED, MemoryKind, MemoryRange};
use janus_proto::addr::Gpa;

use crate::console::uart;
use crate::firmware::IoApicInfo;
use crate::irq::{apic, ioapic, pic};
use crate::mm::paging::Flags;
use crate::mm::paging::native::Section;
use crate::mm::{frames, paging, stack};
use crate::panic::Report;
use crate::platform::{self, Platform, calibrate};
use crate::power::{self, ExitStatus};
use crate::task::hooks::{self, Hooks};
use crate::trap::{fpu, idt};
use crate::{cpu, firmware, logger, percpu, smp, task, virtio, xen};

unsafe extern "Rust" {
    /// The image's main function, made by [`crate::entry!`].
    safe fn janus_main() -> ExitStatus;
}

/// Where every door of `janus_boot` ends.
#[unsafe(no_mangle)]
extern "Rust" fn janus_kernel_start(info: BootInfo) -> ! {
    let platform = platform::detect(info.door);
    platform::set_current(platform);
    if platform == Platform::Kvm {
        calibrate::start_clock();
    }
    let info = crate::BOOT_INFO.call_once(|| info);
    hooks::install(HOOKS);
    match platform {
        Platform::XenPv => xen::start::start_pv(info),
        Platform::XenPvh => {
            start_native(info, platform);
            xen::start::start_pvh();
        }
        Platform::Kvm => start_native(info, platform),
    }
    // SAFETY: traps are set up, and nothing is locked.
    unsafe { platform::enable_irqs() };
    drop(task::spawn("power", power::obey()));
    smp::init();
    if platform == Platform::Kvm {
        platform::tcg::init();
        virtio::init(info.command_line);
    } else {
        xen::store::init(info);
    }
    power::exit(janus_main())
}

/// The CPU, memory and interrupt controllers, where the kernel owns them.
fn start_native(info: &BootInfo, platform: Platform) {
    let features = cpu::features();
    // SAFETY: first thing on the boot CPU, with interrupts masked by the door.
    unsafe { idt::init() };
    // SAFETY: native, first, on this CPU.
    unsafe { fpu::init(features) };
    start_memory(info);
    pic::silence();
    if let Err(error) = apic::init(features) {
        fail("interrupt controller", error);
    }
    percpu::current().set_apic_id(apic::id());
    logger::init(crate::command_line());
    if platform == Platform::Kvm {
        calibrate::start();
        start_firmware(info);
        calibrate::finish();
        if let Err(error) = power::acpi::init() {
            log::warn!("power button: {error}");
        }
        if let Err(error) = uart::init() {
            log::warn!("serial input: {error}");
        }
    }
}

/// Page frames, then the kernel's own page tables.
fn start_memory(info: &BootInfo) {
    // SAFETY: 1. `reserved` names everything that is in use; 2. the boot tables map 4 GiB.
    unsafe { frames::init(info.memory.ranges(), &taken(info), Gpa(1 << 32)) }
        .unwrap_or_else(|error| fail("memory", error));
    frames::keep_low_page();
    // SAFETY: 1. the boot tables map 4 GiB, and the allocator starts from below; 2. these are the image's parts.
    unsafe { paging::native::init(info.memory.ranges(), &sections()) }
        .unwrap_or_else(|error| fail("page tables", error));
    let guard = usize::try_from(Image::stack_guard()).unwrap_or(0);
    // SAFETY: nothing lies in the page below the boot stack.
    unsafe { paging::unmap(guard, 1) }
        .unwrap_or_else(|error| fail("boot stack's guard page", error));
}

/// What is in use, as the frame allocator wants it.
pub(crate) fn taken(info: &BootInfo) -> ArrayVec<MemoryRange, { MAX_RESERVED + 1 }> {
    info.reserved
        .iter()
        .map(|r| MemoryRange { start: r.start, len: r.len, kind: MemoryKind::Reserved })
        .collect()
}

/// The image's parts and what may be done with them.
pub(crate) fn sections() -> [Section; 3] {
    [
        section(&Image::text(), Flags::EXECUTE),
        section(&Image::rodata(), Flags::empty()),
        section(&Image::data(), Flags::WRITE),
    ]
}

fn section(part: &Part, flags: Flags) -> Section {
    let address = |value| usize::try_from(value).unwrap_or(0);
    Section { start: address(part.start), end: address(part.end), flags }
}

/// The firmware's tables, and the interrupt controllers they describe.
fn start_firmware(info: &BootInfo) {
    let described = info.rsdp.and_then(|rsdp| match firmware::init(rsdp) {
        Ok(tables) => Some(&tables.io_apics[..]),
        Err(error) => {
            log::warn!("ACPI tables: {error:?}");
            None
        }
    });
    // Without tables (Firecracker, QEMU's microvm with `acpi=off`) it is where it has always been.
    let usual = [IoApicInfo { address: ioapic::USUAL_ADDRESS, gsi_base: 0 }];
    if let Err(error) = ioapic::init(described.unwrap_or(&usual)) {
        log::warn!("I/O APIC: {error}");
    }
}

/// Ends a boot that cannot go on.
pub(crate) fn fail(what: &str, why: impl core::fmt::Display) -> ! {
    let mut report = Report::begin();
    let _ = writeln!(report, "cannot start: {what}: {why}");
    power::exit(ExitStatus::Crash)
}

/// What the executor asks of the platform.
const HOOKS: Hooks = Hooks {
    now_ns: platform::now_ns,
    wall_clock: platform::wall_clock,
    set_timer: platform::set_timer,
    idle_wait: platform::idle_wait,
    irq_disable: || {
        let enabled = platform::irqs_enabled();
        if enabled {
            platform::disable_irqs();
        }
        enabled
    },
    // SAFETY: the executor's guards unmask what they have masked, with their locks released.
    irq_enable: || unsafe { platform::enable_irqs() },
    current_cpu: || percpu::current().runtime(),
    wake_cpu: |cpu| {
        if let Some(cpu) = percpu::of_runtime(cpu) {
            platform::wake_cpu(cpu);
        }
    },
    relax: platform::relax,
    nth_cpu: |n| smp::nth(n).map(percpu::PerCpu::runtime),
    stack_alloc: stack::allocate,
    // SAFETY: the executor gives back what `stack_alloc` gave, when its fiber has ended.
    stack_free: |lowest, bytes| unsafe { stack::free(lowest, bytes) },
};
