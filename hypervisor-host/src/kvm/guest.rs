//! A KVM guest from its description to its end.
// UNSAFETY: tells KVM which memory of this process is the guest's.
#![expect(unsafe_code, reason = "KVM writes to memory that is named by its address")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{DomId, Mfn};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_msr_entry, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::boot::{self, Boot, Door, LoadError};
use super::devices::Devices;
use super::machine::{End, Machine};
use super::ports::Ports;
use super::registers::{self, Entry};
use super::stats::Exits;
use super::xen::{self, Extra, Wanted, Xen};
use super::{acpi, cpuid, layout, vcpu};
use crate::host::Output;
use crate::machine::ram::Ram;
use crate::pv::domain::Domain;
use crate::virtio::Model;

/// `IA32_MTRR_DEF_TYPE`: on, write-back.
const MTRR_DEF_TYPE: kvm_msr_entry = kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 };
/// `IA32_MISC_ENABLE`: fast strings.
const MISC_ENABLE: kvm_msr_entry = kvm_msr_entry { index: 0x1a0, reserved: 0, data: 1 };
/// Most virtual CPUs: what 8-bit APIC ids count.
pub const MAX_VCPUS: usize = 254;

/// A guest to be made.
#[derive(Clone, Debug)]
pub struct Config {
    /// KVM's device: `/dev/kvm`.
    pub device: PathBuf,
    /// Its kernel: ELF, or a bzImage.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub module: Option<PathBuf>,
    /// Its command line.
    pub command_line: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Whether its memory is of huge pages.
    pub huge_pages: bool,
    /// Its virtual CPUs.
    pub vcpus: usize,
    /// How its kernel is entered.
    pub door: Door,
    /// Whether it is a domain of Xen's: of this UUID.
    pub xen: Option<[u8; 16]>,
}

/// A guest cannot be started.
#[derive(Debug)]
pub enum KvmError {
    /// KVM's device cannot be opened.
    Device(PathBuf, kvm_ioctls::Error),
    /// KVM refuses something.
    Kvm(&'static str, kvm_ioctls::Error),
    /// Memory cannot be had.
    Memory(io::Error, bool),
    /// Something cannot be loaded.
    Load(LoadError),
    /// A number of CPUs that cannot be.
    Vcpus(usize),
    /// It cannot be a domain of Xen's.
    Domain(Errno),
    /// The host refuses something else.
    Host(&'static str, io::Error),
}

impl fmt::Display for KvmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Kvm(what, error) => write!(f, "KVM: {what}: {error}"),
            Self::Memory(error, false) => write!(f, "the guest's memory: {error}"),
            Self::Memory(error, true) => write!(
                f,
                "the guest's memory in huge pages: {error}; reserve some in \
                 /proc/sys/vm/nr_hugepages, or do without"
            ),
            Self::Load(error) => error.fmt(f),
            Self::Vcpus(count) => write!(f, "{count} virtual CPUs: 1 to {MAX_VCPUS} can be had"),
            Self::Domain(error) => write!(f, "the domain cannot be made: {error}"),
            Self::Host(what, error) => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for KvmError {}

impl From<LoadError> for KvmError {
    fn from(error: LoadError) -> Self {
        Self::Load(error)
    }
}

/// A guest that runs. Dropping it ends it.
#[derive(Debug)]
pub struct KvmGuest {
    machine: Arc<Machine>,
    /// Until they run.
    vcpus: Mutex<Vec<VcpuFd>>,
    _devices: Devices,
}

/// Something refused by KVM, with what it was.
fn refused<T>(result: Result<T, kvm_ioctls::Error>, what: &'static str) -> Result<T, KvmError> {
    result.map_err(|error| KvmError::Kvm(what, error))
}

fn event() -> Result<EventFd, KvmError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|error| KvmError::Host("an eventfd", error))
}

/// Gives KVM the guest's memory.
fn give_memory(vm: &VmFd, ram: &Ram) -> Result<(), KvmError> {
    for (slot, range) in (0..).zip(layout::regions(ram.frames() * 4096)) {
        let size = range.end - range.start;
        let frame = Mfn(range.start / 4096);
        let Some(words) = ram.words(frame, size / 4096) else { continue };
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: range.start,
            memory_size: size,
            userspace_addr: words.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is a mapping of `ram`'s that is seen as atomics everywhere else; the machine keeps `ram`
        // as long as KVM may run a CPU of it.
        refused(unsafe { vm.set_user_memory_region(region) }, "its memory")?;
    }
    Ok(())
}

/// The machine's own parts in the kernel: interrupt controllers there cost no exits to this program.
fn give_interrupt_controllers(vm: &VmFd) -> Result<(), KvmError> {
    refused(vm.set_tss_address(layout::TSS), "its task segment")?;
    refused(vm.create_irq_chip(), "its interrupt controllers")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    refused(vm.create_pit2(pit), "its timer")
}

fn make_vcpu(
    vm: &VmFd,
    index: usize,
    config: &Config,
    supported: &CpuId,
) -> Result<VcpuFd, KvmError> {
    let vcpu = refused(vm.create_vcpu(index as u64), "a virtual CPU")?;
    let mut shown = supported.clone();
    let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
    let cpu = cpuid::Cpu {
        id: number(index),
        count: number(config.vcpus),
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer),
    };
    cpuid::filter(&mut shown, cpu);
    if config.xen.is_some() {
        xen::add_leaves(&mut shown, number(index));
        refused(xen::share_tsc(&vcpu), "the host's counter as the guest's")?;
    }
    refused(vcpu.set_cpuid2(&shown), "its CPUID")?;
    if let Ok(msrs) = Msrs::from_entries(&[MTRR_DEF_TYPE, MISC_ENABLE]) {
        // Neither is needed to run: a CPU without them goes on as it is.
        let _ = vcpu.set_msrs(&msrs);
    }
    Ok(vcpu)
}

/// How many frames a guest's memory has, and where among them those are that are only Xen's, if there are any.
fn frames(bytes: u64, config: &Config) -> (u64, Option<Range<u64>>) {
    let (own, below) = (bytes / 4096, layout::numbering().below);
    if config.xen.is_none() {
        return (own, None);
    }
    // In one piece: not across the hole.
    let first = if own < below && own + Extra::FRAMES > below { below } else { own };
    let number = if first < below { first } else { first - below + layout::HOLE.end / 4096 };
    let whole = (first + Extra::FRAMES).next_multiple_of(if config.huge_pages { 512 } else { 1 });
    (whole, Some(number * 4096..(number + Extra::FRAMES) * 4096))
}

/// Makes the machine a domain of Xen's, whose own pages are in `extra`.
fn domain(
    vm: &Arc<VmFd>,
    ram: &Arc<Ram>,
    config: &Config,
    bytes: u64,
    extra: Range<u64>,
) -> Result<Arc<Xen>, KvmError> {
    static LAST: AtomicU16 = AtomicU16::new(0);
    refused(xen::enable(vm), "MSRs of Xen's")?;
    let wanted = Wanted {
        id: DomId(LAST.fetch_add(1, Ordering::Relaxed) % 0x7000 + 1),
        uuid: config.xen.unwrap_or_default(),
        vcpus: config.vcpus,
        extra: Extra::new(Mfn(extra.start / 4096)),
        map: boot::map(bytes, &extra),
        frames: bytes / 4096,
    };
    Xen::new(vm, ram, wanted).map_err(KvmError::Domain)
}

/// Puts the first CPU where the kernel begins.
fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut special = refused(vcpu.get_sregs(), "its registers")?;
    registers::set_special(&mut special, entry);
    refused(vcpu.set_sregs(&special), "its special registers")?;
    refused(vcpu.set_regs(&registers::general(entry)), "its registers")
}

impl KvmGuest {
    /// Makes a guest with these virtio devices, which does not run yet; what it prints on its serial port goes to `output`.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn new(
        config: &Config,
        models: Vec<Box<dyn Model>>,
        output: Output,
    ) -> Result<Self, KvmError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(KvmError::Vcpus(config.vcpus));
        }
        vcpu::install().map_err(|error| KvmError::Host("a signal handler", error))?;
        let kvm = open(&config.device)?;
        let vm = Arc::new(refused(kvm.create_vm(), "a virtual machine")?);
        let bytes = config.memory_mib << 20;
        let (frames, extra) = frames(bytes, config);
        let flags = if config.huge_pages { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
        let ram = Ram::with_numbering(frames, layout::numbering(), flags);
        let ram = Arc::new(ram.map_err(|error| KvmError::Memory(error, config.huge_pages))?);
        give_memory(&vm, &ram)?;
        give_interrupt_controllers(&vm)?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = refused(supported, "the CPU's features")?;
        let reserved = extra.clone().unwrap_or_default();
        let xen = extra.map(|extra| domain(&vm, &ram, config, bytes, extra)).transpose()?;

        let devices = Devices::new(&ram);
        let unmapped = || KvmError::Memory(io::Error::other("it is not where it should be"), false);
        let mut devices = devices.ok_or_else(unmapped)?;
        for model in models {
            devices.plug(&vm, model).map_err(|(what, error)| KvmError::Host(what, error))?;
        }
        let cpus = u8::try_from(config.vcpus).unwrap_or(1);
        let tables = acpi::tables(layout::ACPI, cpus, &devices.windows());
        let boot = Boot {
            kernel: &config.kernel,
            module: config.module.as_deref(),
            command_line: &config.command_line,
            door: config.door,
            memory: bytes,
            acpi: &tables,
            xen: config.xen.is_some(),
            reserved,
        };
        let entry = boot::load(&ram, &boot)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            vcpus.push(make_vcpu(&vm, index, config, &supported)?);
        }
        if let Some(first) = vcpus.first() {
            enter(first, entry)?;
        }
        let serial = event()?;
        refused(vm.register_irqfd(&serial, layout::SERIAL_GSI), "the serial port's interrupt")?;
        let lines = Arc::clone(&vm);
        let sci = Box::new(move |high| {
            // Without an interrupt the guest does not hear of its power button: nothing worse.
            let _ = lines.set_irq_line(u32::from(layout::SCI), high);
        });
        let ports = Ports::new(output, serial, sci);
        let machine = Arc::new(Machine::new(vm, ram, ports, devices.registers(), xen));
        Ok(Self { machine, vcpus: Mutex::new(vcpus), _devices: devices })
    }

    /// What makes it a domain of Xen's, if it is one, and the frames of its console's and store's rings.
    #[must_use]
    pub fn domain(&self) -> Option<(&Arc<Domain>, (u64, u64))> {
        self.machine.xen.as_ref().map(|xen| (&xen.domain, xen.rings()))
    }

    /// Lets it run; once.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn run(&self) -> Result<(), KvmError> {
        let no_thread = |error| KvmError::Host("a thread", error);
        if let Some(xen) = &self.machine.xen {
            xen.start_timers().map_err(no_thread)?;
        }
        let vcpus = std::mem::take(&mut *self.vcpus.lock().unwrap_or_else(PoisonError::into_inner));
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let machine = Arc::clone(&self.machine);
            let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
            let thread = thread.spawn(move || vcpu::serve(&machine, index, vcpu));
            // The guest is dropped then, and so are the threads that have begun.
            self.machine.adopt(thread.map_err(no_thread)?);
        }
        Ok(())
    }

    /// Types on its serial port; waits while it has not read what was typed before. `false`: it has ended.
    #[must_use]
    pub fn type_bytes(&self, bytes: &[u8]) -> bool {
        self.machine.ports.type_bytes(bytes)
    }

    /// Presses its power button.
    pub fn press_power_button(&self) {
        self.machine.ports.press_power_button();
    }

    /// Ends it as it is.
    pub fn destroy(&self) {
        self.machine.end(End::Destroyed, None);
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait(&self) -> End {
        self.machine.wait()
    }

    /// How often it left KVM.
    #[must_use]
    pub fn exits(&self) -> &Exits {
        &self.machine.stats
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.destroy();
        let _ = self.wait();
    }
}

/// Opens KVM's device.
pub(crate) fn open(device: &Path) -> Result<Kvm, KvmError> {
    let failed = |error| KvmError::Device(device.to_owned(), error);
    let invalid = || failed(kvm_ioctls::Error::new(libc::EINVAL));
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes());
    Kvm::new_with_path(path.map_err(|_| invalid())?).map_err(failed)
}
