//! Xen's interface for a guest of KVM: what makes it a PVH domain, by the same table of hypercalls as the monitor's.
//!
//! KVM takes `vmcall` for itself, so the hypercall page that the guest asks for is filled with port writes, which come
//! here. Events interrupt a CPU through its local APIC, by the vector that it has chosen for that; timers have a thread.
//! KVM's own support for Xen guests is not needed, and not used.
// UNSAFETY: tells KVM which memory of this process is the guest's.
#![expect(unsafe_code, reason = "KVM writes to memory that is named by its address")]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use janus_proto::abi::xen::{Errno, Hypercall, Virq};
use janus_proto::addr::{DomId, Mfn, PAGE_SIZE, Port};
use janus_proto::pvclock;
use kvm_bindings::{
    CpuId, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_cpuid_entry2, kvm_device_attr,
    kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::machine::End;
use crate::engine::{EngineError, Exit, Kicker, Mapping, Registers, Vcpu};
use crate::machine::ram::Ram;
use crate::pv::cpu::Cpu;
use crate::pv::domain::{Domain, Setup};
use crate::pv::grant::{MAX_GRANT_FRAMES, MAX_STATUS_FRAMES};
use crate::pv::hvm::{HvmSpace, Parts, Physmap};
use crate::pv::hypercall;
use crate::pv::timers::{self, NEVER, now};
use crate::pv::vcpu_info::VcpuShared;
use crate::pv::version::VERSION;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// The port that hypercalls write to; nothing else is there.
pub(crate) const PORT: u16 = 0xe8;
/// The MSR by which a guest says where its hypercall page is to be (as Xen has it beside Hyper-V's).
pub(crate) const PAGE_MSR: u32 = 0x4000_0200;
/// Where Xen's leaves are; KVM's own stay below.
const LEAVES: u32 = 0x4000_0100;
/// Leaf 4: the CPU's number is in EBX, and events may have a vector of each CPU's own.
const VCPU_ID_PRESENT: u32 = 1 << 3;
const UPCALL_VECTOR: u32 = 1 << 6;
/// CR4: five levels of page tables.
const LA57: u64 = 1 << 12;
/// The first slot for pages outside memory, and how many there may be.
const FIRST_SLOT: u32 = 16;
const MAX_SLOTS: u32 = 512;
/// How often the clock is refined.
const REFINE: Duration = Duration::from_millis(500);

/// Frames beyond the guest's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extra {
    first: u64,
}

impl Extra {
    /// How many there are: shared info, two rings, and the grant table.
    pub(crate) const FRAMES: u64 = 3 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES;

    /// They begin at this frame.
    pub(crate) fn new(first: Mfn) -> Self {
        Self { first: first.0 }
    }
    fn shared_info(self) -> Mfn {
        Mfn(self.first)
    }
    fn console(self) -> Mfn {
        Mfn(self.first + 1)
    }
    fn store(self) -> Mfn {
        Mfn(self.first + 2)
    }
    fn grants(self) -> Mfn {
        Mfn(self.first + 3)
    }
}

/// Pages in other places than where memory has them.
struct Pages {
    vm: Arc<VmFd>,
    ram: Arc<Ram>,
    /// Slots of KVM's for pages outside memory.
    slots: Mutex<BTreeMap<u64, u32>>,
}

impl Pages {
    fn set(&self, slot: u32, guest: Mfn, frame: Option<Mfn>) -> Result<(), Errno> {
        let (size, address) = match frame {
            Some(frame) => {
                let words = self.ram.words(frame, 1).ok_or(Errno::EINVAL)?;
                (PAGE_SIZE as u64, words.as_ptr().expose_provenance() as u64)
            }
            None => (0, 0),
        };
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest.0.checked_mul(PAGE_SIZE as u64).ok_or(Errno::EINVAL)?,
            memory_size: size,
            userspace_addr: address,
        };
        // SAFETY: the page is a mapping of `ram`'s, seen as atomics everywhere else, which is there as long as the
        // machine is; without one the slot is taken away.
        let set = unsafe { self.vm.set_user_memory_region(region) };
        set.map_err(|_| Errno::EINVAL)
    }
}

impl Physmap for Pages {
    fn put(&self, guest: Mfn, frame: Mfn) -> Result<(), Errno> {
        if self.ram.offset(guest).is_some() {
            return self.ram.alias(guest, frame).map_err(|_| Errno::ENOMEM);
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(&guest.0) {
            self.set(*slot, guest, None)?;
            return self.set(*slot, guest, Some(frame));
        }
        let taken = |slot: &u32| slots.values().any(|used| used == slot);
        let slot = (FIRST_SLOT..FIRST_SLOT + MAX_SLOTS).find(|slot| !taken(slot));
        let slot = slot.ok_or(Errno::ENOMEM)?;
        self.set(slot, guest, Some(frame))?;
        slots.insert(guest.0, slot);
        Ok(())
    }

    fn take(&self, guest: Mfn) -> Result<(), Errno> {
        if self.ram.offset(guest).is_some() {
            return self.ram.alias(guest, guest).map_err(|_| Errno::ENOMEM);
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.remove(&guest.0).ok_or(Errno::ENOENT)?;
        self.set(slot, guest, None)
    }
}

/// How a CPU hears of events.
struct Upcall {
    space: Weak<HvmSpace>,
    vcpu: usize,
}

impl fmt::Debug for Upcall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upcall({})", self.vcpu)
    }
}

impl Kicker for Upcall {
    fn kick(&self) {
        if let Some(space) = self.space.upgrade() {
            space.upcall(self.vcpu);
        }
    }
    fn kill(&self) {}
}

/// The engine as the hypercalls see it: the CPU is run elsewhere, and its memory translated by hardware.
struct Elsewhere(Arc<Upcall>);

impl Vcpu for Elsewhere {
    fn run(&mut self, _registers: &mut Registers) -> Result<Exit, EngineError> {
        Err(EngineError::Corrupt("this CPU is run by KVM"))
    }
    fn map(&mut self, _mapping: Mapping) {}
    fn unmap(&mut self, _address: u64, _pages: usize) {}
    fn unmap_all(&mut self) {}
    fn switch(&mut self, _root: Mfn) {}
    fn set_deadline(&mut self, _nanoseconds: Option<u64>) {}
    fn kicker(&self) -> Arc<dyn Kicker> {
        self.0.clone()
    }
    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }
}

/// What makes a machine a domain.
#[derive(Debug)]
pub(crate) struct Xen {
    pub(crate) domain: Arc<Domain>,
    extra: Extra,
    space: Arc<HvmSpace>,
    ram: Arc<Ram>,
    timers: OnceLock<Thread>,
}

/// What a domain is made of.
pub(crate) struct Wanted {
    pub(crate) id: DomId,
    pub(crate) uuid: [u8; 16],
    pub(crate) vcpus: usize,
    pub(crate) extra: Extra,
    /// The memory map.
    pub(crate) map: Vec<(u64, u64, u32)>,
    /// Frames of the guest's own.
    pub(crate) frames: u64,
}

impl Xen {
    /// A domain in this machine.
    ///
    /// # Errors
    /// Not such a domain.
    pub(crate) fn new(vm: &Arc<VmFd>, ram: &Arc<Ram>, wanted: Wanted) -> Result<Arc<Self>, Errno> {
        let extra = wanted.extra;
        let slots = Mutex::default();
        let physmap = Pages { vm: Arc::clone(vm), ram: Arc::clone(ram), slots };
        let lines = Arc::clone(vm);
        let interrupt = Box::new(move |vcpu: usize, vector| {
            let id = u32::try_from(vcpu).unwrap_or(0);
            let address_lo = super::layout::LOCAL_APIC | id << 12;
            // A CPU whose APIC is off does not hear of it: no more than a machine's would.
            let _ = lines.signal_msi(kvm_msi {
                address_lo,
                data: vector_data(vector),
                ..kvm_msi::default()
            });
        });
        let space = HvmSpace::new(Parts {
            ram: Arc::clone(ram),
            map: wanted.map,
            frames: wanted.frames,
            vcpus: wanted.vcpus,
            rings: [(extra.console(), Port(2)), (extra.store(), Port(1))],
            shared_info: extra.shared_info(),
            grant_frames: extra.grants(),
            physmap: Box::new(physmap),
            interrupt,
        });
        let setup = Setup {
            id: wanted.id,
            uuid: wanted.uuid,
            vcpus: wanted.vcpus,
            ram: Arc::clone(ram),
            shared_info: extra.shared_info(),
            grant_frames: extra.grants(),
            console: extra.console(),
            store: extra.store(),
        };
        let domain = Domain::new(&setup, space.clone())?;
        space.belongs_to(&domain);
        for (index, shared) in domain.vcpus.iter().enumerate() {
            shared.deliver_by(upcall(&space, index));
            shared.set_initialised();
            shared.set_up(true);
        }
        timers::begin();
        domain.write_wall_clock();
        let xen = Self { domain, extra, space, ram: Arc::clone(ram), timers: OnceLock::new() };
        xen.write_clock();
        Ok(Arc::new(xen))
    }

    /// The frames of the console's and the store's ring.
    pub(crate) fn rings(&self) -> (u64, u64) {
        (self.extra.console().0, self.extra.store().0)
    }

    fn write_clock(&self) {
        let info = self.domain.clock.update();
        for words in self.domain.vcpus.iter().filter_map(VcpuShared::time) {
            pvclock::write(words, &info);
        }
    }

    /// Starts the thread that the timers have.
    ///
    /// # Errors
    /// The host has none left.
    pub(crate) fn start_timers(self: &Arc<Self>) -> io::Result<()> {
        let this = Arc::downgrade(self);
        let thread = std::thread::Builder::new().name("timers".into()).spawn(move || {
            while let Some(wait) = this.upgrade().and_then(|this| this.fire()) {
                std::thread::park_timeout(wait);
            }
        })?;
        let _ = self.timers.set(thread.thread().clone());
        Ok(())
    }

    /// Sends what is due; answers when to look again, or nothing at the domain's end.
    fn fire(&self) -> Option<Duration> {
        if self.domain.is_ending() {
            return None;
        }
        if self.domain.clock.is_due() {
            self.write_clock();
        }
        let now = now();
        let mut next = NEVER;
        for (index, shared) in self.domain.vcpus.iter().enumerate() {
            if shared.timers.take_due(now) {
                self.domain.events.raise_virq(Virq::TIMER, index);
            }
            next = next.min(shared.timers.deadline());
        }
        if self.domain.watchdog() <= now {
            self.domain.end_by_watchdog();
            return None;
        }
        next = next.min(self.domain.watchdog());
        Some(Duration::from_nanos(next.saturating_sub(now)).min(REFINE))
    }

    /// The domain is over: whoever waits in a hypercall comes back.
    pub(crate) fn end(&self) {
        self.domain.destroy();
        if let Some(timers) = self.timers.get() {
            timers.unpark();
        }
    }

    /// Fills the hypercall page; `false`: that is no page of the guest's.
    fn fill_page(&self, address: u64) -> bool {
        let page = self.ram.words(Mfn(address / PAGE_SIZE as u64), 1);
        let Some(words) = page.filter(|_| address.is_multiple_of(PAGE_SIZE as u64)) else {
            return false;
        };
        for (word, bytes) in words.iter().zip(page_code().chunks_exact(4)) {
            let four = bytes.try_into().map_or(0, u32::from_le_bytes);
            word.store(four, Ordering::Relaxed);
        }
        true
    }
}

fn vector_data(vector: u8) -> u32 {
    u32::from(vector)
}

fn upcall(space: &Arc<HvmSpace>, vcpu: usize) -> Arc<Upcall> {
    Arc::new(Upcall { space: Arc::downgrade(space), vcpu })
}

/// The hypercall page: for each number a move into EAX, a port write, a return.
fn page_code() -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_SIZE);
    for number in 0u32..128 {
        let mut entry = vec![0xb8];
        entry.extend(number.to_le_bytes());
        entry.extend([0xe7, PORT.to_le_bytes()[0], 0xc3]);
        // What is not reached is no instruction.
        entry.resize(32, 0xcc);
        page.extend(entry);
    }
    page
}

/// A virtual CPU's part, on its own thread.
pub(crate) struct XenVcpu {
    xen: Arc<Xen>,
    cpu: Cpu,
}

impl XenVcpu {
    /// CPU `index`; called on its thread.
    pub(crate) fn new(xen: &Arc<Xen>, index: usize) -> Self {
        let upcall = upcall(&xen.space, index);
        let cpu = Cpu::new(Arc::clone(&xen.domain), index, Box::new(Elsewhere(upcall.clone())));
        xen.domain.vcpu(index).attach(upcall);
        Self { xen: Arc::clone(xen), cpu }
    }

    /// Makes a hypercall; how the guest ends by it, if it does.
    pub(crate) fn hypercall(&mut self, vcpu: &VcpuFd) -> Option<End> {
        let lost = |error: kvm_ioctls::Error| Some(End::Lost(format!("its registers: {error}")));
        let mut registers = match vcpu.get_regs() {
            Ok(registers) => registers,
            Err(error) => return lost(error),
        };
        match vcpu.get_sregs() {
            Ok(special) => {
                self.xen.space.set_paging(self.cpu.index, special.cr3, special.cr4 & LA57 != 0);
            }
            Err(error) => return lost(error),
        }
        let number = registers.rax & 0xffff_ffff;
        let before = self.cpu.deadline();
        self.cpu.state.registers = Registers {
            rax: number,
            rdi: registers.rdi,
            rsi: registers.rsi,
            rdx: registers.rdx,
            r10: registers.r10,
            r8: registers.r8,
            r9: registers.r9,
            rip: registers.rip,
            rsp: registers.rsp,
            rflags: registers.rflags,
            ..Registers::default()
        };
        if let Err(over) = hypercall::enter(&mut self.cpu) {
            return Some(End::Xen(over.0.into()));
        }
        if self.cpu.deadline() < before
            && let Some(timers) = self.xen.timers.get()
        {
            timers.unpark();
        }
        if Hypercall(number) == Hypercall::VCPU_OP && self.cpu.shared().is_pending() {
            // Its vcpu_info may have moved, and all events with it.
            self.xen.space.upcall(self.cpu.index);
        }
        registers.rax = self.cpu.state.registers.rax;
        vcpu.set_regs(&registers).err().and_then(lost)
    }

    /// Writes an MSR that KVM does not know; `false`: Xen does not know it either.
    pub(crate) fn write_msr(&self, index: u32, value: u64) -> bool {
        // The number of the page, of which there is one, is in the lowest bits.
        index == PAGE_MSR && self.xen.fill_page(value)
    }
}

/// Prepares a machine for [`Xen`]: MSRs that KVM does not know come here.
pub(crate) fn enable(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let reasons = u64::from(KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN);
    let capability = KVM_CAP_X86_USER_SPACE_MSR;
    vm.enable_cap(&kvm_enable_cap {
        cap: capability,
        args: [reasons, 0, 0, 0],
        ..Default::default()
    })
}

/// Makes the guest's TSC the host's, which Xen's clock is told in.
pub(crate) fn share_tsc(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let offset = 0u64;
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset).expose_provenance() as u64,
    };
    // SAFETY: the request reads the structure that it is given and the value that this names; both live meanwhile.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } < 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(())
}

/// Adds Xen's leaves to what a CPU shows.
pub(crate) fn add_leaves(cpuid: &mut CpuId, vcpu: u32) {
    let signature = |part: &[u8; 4]| u32::from_le_bytes(*part);
    // KVM's features are for guests that call it, which these do not: its clock's pages are Xen's.
    for entry in cpuid.as_mut_slice() {
        if entry.function == 0x4000_0001 {
            (entry.eax, entry.edx) = (0, 0);
        }
    }
    let leaf = |index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function: LEAVES + index,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    };
    let leaves = [
        leaf(0, [LEAVES + 5, signature(b"XenV"), signature(b"MMXe"), signature(b"nVMM")]),
        leaf(1, [VERSION, 0, 0, 0]),
        leaf(2, [1, PAGE_MSR, 0, 0]),
        leaf(3, [0; 4]),
        leaf(4, [VCPU_ID_PRESENT | UPCALL_VECTOR, vcpu, 0, 0]),
        leaf(5, [0; 4]),
    ];
    for leaf in leaves {
        // A table that is full has none of them, and the guest is none of Xen's then.
        let _ = cpuid.push(leaf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_of_the_hypercall_page_brings_its_number() {
        let page = page_code();
        assert_eq!(page.len(), PAGE_SIZE);
        for (number, entry) in (0u32..).zip(page.chunks(32)) {
            assert_eq!(entry[0], 0xb8);
            assert_eq!(entry[1..5], number.to_le_bytes());
            assert_eq!(entry[5..8], [0xe7, 0xe8, 0xc3]);
        }
    }

    #[test]
    fn xen_is_found_above_kvm() {
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let known = [entry(0x4000_0000, 0x4000_0001), entry(0x4000_0001, 0x0100_7efb)];
        let mut cpuid = CpuId::from_entries(&known).unwrap();
        add_leaves(&mut cpuid, 3);
        let [_, features, base, version, page, _, hvm, _] = cpuid.as_slice() else { panic!() };
        assert_eq!(features.eax, 0, "nobody is invited to use KVM's own");
        assert_eq!((base.function, base.ebx), (0x4000_0100, 0x566e_6558));
        assert_eq!(version.eax, 0x4_0011);
        assert_eq!((page.eax, page.ebx), (1, PAGE_MSR));
        assert_eq!(hvm.ebx, 3);
    }
}
