//! What the table of hypercalls asks of a guest whose memory the processor translates: Xen's PVH.
//!
//! Addresses are translated by the guest's own page tables, frames are the guest's numbers, and the calls for
//! paravirtualised memory do not exist. What a PV guest is given at its start (shared info, grant table, rings) such a
//! guest asks for: as parameters, and as pages to put into its physical address space, which [`Physmap`] does.

mod walk;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use janus_proto::abi::xen::grant_table::{GrantStatus, MapFlags};
use janus_proto::abi::xen::hvm::{EvtchnUpcallVector, HvmOp, HvmParam, HvmParamValue};
use janus_proto::abi::xen::memory::{
    AddToPhysmap, E820Entry, MapSpace, MemoryMap, MemoryOp, RemoveFromPhysmap, Reservation,
};
use janus_proto::abi::xen::{Errno, Hypercall};
use janus_proto::addr::{DomId, Mfn, PAGE_SHIFT, PAGE_SIZE, Port};
use janus_proto::grant::Access;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::domain::Domain;
use super::grant::{FrameTypes, MAX_GRANT_FRAMES, MAX_STATUS_FRAMES};
use super::hypercall::low32;
use super::report::WalkStep;
use super::space::{Resolution, Space, TableWrite};
use crate::engine::{Fault, Vcpu};
use crate::machine::ram::Ram;

/// `XENMAPIDX_grant_table_status`: the page is one of status words.
const STATUS: u64 = 1 << 31;
/// The kinds of [`HvmParam::CALLBACK_IRQ`], in its uppermost byte: a vector.
const BY_VECTOR: u64 = 2;
/// Extents of one reservation call; a guest with more calls again.
const MAX_EXTENTS: u64 = 1 << 20;

/// The guest's physical address space, as far as it can be changed.
pub(crate) trait Physmap: Send + Sync {
    /// Puts a frame where the guest has another one, or none.
    ///
    /// # Errors
    /// The host refuses.
    fn put(&self, guest: Mfn, frame: Mfn) -> Result<(), Errno>;
    /// Takes it away: what was there before comes back.
    ///
    /// # Errors
    /// The host refuses.
    fn take(&self, guest: Mfn) -> Result<(), Errno>;
}

/// Interrupts a CPU by a vector.
pub(crate) type Interrupt = Box<dyn Fn(usize, u8) + Send + Sync>;

/// The state of a CPU that says how its addresses are translated.
#[derive(Debug, Default)]
struct Paging {
    cr3: AtomicU64,
    five_levels: std::sync::atomic::AtomicBool,
}

/// What an HVM guest is made of.
pub(crate) struct Parts {
    /// Its memory.
    pub(crate) ram: Arc<Ram>,
    /// Its memory map: start, bytes, kind.
    pub(crate) map: Vec<(u64, u64, u32)>,
    /// Frames of its own.
    pub(crate) frames: u64,
    /// Its CPUs.
    pub(crate) vcpus: usize,
    /// Where the console and xenstore rings are, and by which ports they are told of.
    pub(crate) rings: [(Mfn, Port); 2],
    /// The shared info page.
    pub(crate) shared_info: Mfn,
    /// The first frame of the grant table.
    pub(crate) grant_frames: Mfn,
    /// How its address space is changed.
    pub(crate) physmap: Box<dyn Physmap>,
    /// How it is interrupted.
    pub(crate) interrupt: Interrupt,
}

/// The memory of an HVM guest, and its parameters.
pub(crate) struct HvmSpace {
    parts: Parts,
    paging: Vec<Paging>,
    /// The vector of each CPU's events; 0: none yet.
    vectors: Vec<AtomicU8>,
    domain: OnceLock<Weak<Domain>>,
}

impl std::fmt::Debug for HvmSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HvmSpace").field("vectors", &self.vectors).finish_non_exhaustive()
    }
}

impl HvmSpace {
    /// Memory of a guest that has asked for nothing yet.
    #[must_use]
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        let vcpus = parts.vcpus;
        Arc::new(Self {
            parts,
            paging: (0..vcpus).map(|_| Paging::default()).collect(),
            vectors: (0..vcpus).map(|_| AtomicU8::new(0)).collect(),
            domain: OnceLock::new(),
        })
    }

    /// Says whose memory it is; once.
    pub(crate) fn belongs_to(&self, domain: &Arc<Domain>) {
        let _ = self.domain.set(Arc::downgrade(domain));
    }

    /// How this CPU translates from here on: CR3, and whether it has five levels of tables.
    pub(crate) fn set_paging(&self, vcpu: usize, cr3: u64, five_levels: bool) {
        if let Some(paging) = self.paging.get(vcpu) {
            paging.cr3.store(cr3, Ordering::Relaxed);
            paging.five_levels.store(five_levels, Ordering::Relaxed);
        }
    }

    /// An event is due on a CPU: interrupts it, if it has said how.
    pub(crate) fn upcall(&self, vcpu: usize) {
        let vector = self.vectors.get(vcpu).map_or(0, |vector| vector.load(Ordering::SeqCst));
        if vector != 0 {
            (self.parts.interrupt)(vcpu, vector);
        }
    }

    /// The physical address behind a virtual one.
    fn translate(&self, vcpu: usize, address: u64) -> Result<u64, Errno> {
        let paging = self.paging.get(vcpu).ok_or(Errno::EFAULT)?;
        let levels = if paging.five_levels.load(Ordering::Relaxed) { 5 } else { 4 };
        walk::translate(&self.parts.ram, paging.cr3.load(Ordering::Relaxed), levels, address)
            .ok_or(Errno::EFAULT)
    }

    /// Calls `each` with the words of every page of a range, the offset there, and the part of the range.
    fn pages(
        &self,
        vcpu: usize,
        address: u64,
        length: usize,
        mut each: impl FnMut(&[std::sync::atomic::AtomicU32], usize, std::ops::Range<usize>) -> bool,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < length {
            let at = address.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let physical = self.translate(vcpu, at)?;
            let offset = usize::try_from(physical % PAGE_SIZE as u64).map_err(|_| Errno::EFAULT)?;
            let count = (PAGE_SIZE - offset).min(length - done);
            let frame = Mfn(physical >> PAGE_SHIFT);
            let words = self.parts.ram.words(frame, 1).ok_or(Errno::EFAULT)?;
            if !each(words, offset, done..done + count) {
                return Err(Errno::EFAULT);
            }
            done += count;
        }
        Ok(())
    }

    fn read_value<T: FromBytes + IntoBytes>(&self, vcpu: usize, address: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.read(vcpu, address, value.as_mut_bytes())?;
        Ok(value)
    }

    fn write_value<T: IntoBytes + Immutable>(
        &self,
        vcpu: usize,
        address: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.write(vcpu, address, value.as_bytes())
    }

    fn memory_op(&self, vcpu: usize, op: MemoryOp, argument: u64) -> Result<u64, Errno> {
        match op {
            MemoryOp::ADD_TO_PHYSMAP => self.add_to_physmap(self.read_value(vcpu, argument)?),
            MemoryOp::REMOVE_FROM_PHYSMAP => {
                let remove: RemoveFromPhysmap = self.read_value(vcpu, argument)?;
                own(remove.domid)?;
                self.parts.physmap.take(Mfn(remove.gpfn.0)).map(|()| 0)
            }
            MemoryOp::MEMORY_MAP => self.memory_map(vcpu, argument),
            MemoryOp::CURRENT_RESERVATION | MemoryOp::MAXIMUM_RESERVATION => Ok(self.parts.frames),
            MemoryOp::MAXIMUM_RAM_PAGE | MemoryOp::MAXIMUM_GPFN => {
                let end = self.parts.map.iter().map(|(start, bytes, _)| start + bytes).max();
                Ok(end.unwrap_or(0) / PAGE_SIZE as u64)
            }
            MemoryOp::DECREASE_RESERVATION | MemoryOp::POPULATE_PHYSMAP => {
                let reservation: Reservation = self.read_value(vcpu, argument)?;
                self.reserve(vcpu, &reservation, op == MemoryOp::DECREASE_RESERVATION)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn add_to_physmap(&self, add: AddToPhysmap) -> Result<u64, Errno> {
        own(add.domid)?;
        let frame = match add.space {
            MapSpace::SHARED_INFO if add.idx == 0 => self.parts.shared_info,
            MapSpace::GRANT_TABLE => self.grant_frame(add.idx)?,
            _ => return Err(Errno::EINVAL),
        };
        self.parts.physmap.put(Mfn(add.gpfn.0), frame).map(|()| 0)
    }

    /// A frame of the grant table, which grows as it is asked for.
    fn grant_frame(&self, index: u64) -> Result<Mfn, Errno> {
        let domain = self.domain.get().and_then(Weak::upgrade).ok_or(Errno::EINVAL)?;
        let first = self.parts.grant_frames.0;
        if index & STATUS != 0 {
            let index = index & !STATUS;
            let there = index < MAX_STATUS_FRAMES;
            return there.then_some(Mfn(first + MAX_GRANT_FRAMES + index)).ok_or(Errno::EINVAL);
        }
        let frames = index.checked_add(1).filter(|frames| *frames <= MAX_GRANT_FRAMES);
        domain.grants.grow(frames.ok_or(Errno::EINVAL)?).map_err(|_| Errno::EINVAL)?;
        Ok(Mfn(first + index))
    }

    fn memory_map(&self, vcpu: usize, argument: u64) -> Result<u64, Errno> {
        let mut wanted: MemoryMap = self.read_value(vcpu, argument)?;
        let mut stored = 0u32;
        for (addr, size, kind) in self.parts.map.iter().copied().take(wanted.nr_entries as usize) {
            let at = wanted.buffer.wrapping_add(u64::from(stored) * size_of::<E820Entry>() as u64);
            self.write_value(vcpu, at, &E820Entry { addr, size, kind })?;
            stored += 1;
        }
        wanted.nr_entries = stored;
        self.write_value(vcpu, argument, &wanted).map(|()| 0)
    }

    /// Gives frames back to the host, or takes them again: they are the guest's all the time, and empty meanwhile.
    fn reserve(&self, vcpu: usize, wanted: &Reservation, less: bool) -> Result<u64, Errno> {
        own(wanted.domid)?;
        if wanted.extent_order != 0 || wanted.nr_extents > MAX_EXTENTS {
            return Err(Errno::EINVAL);
        }
        for index in 0..wanted.nr_extents {
            let at = wanted.extent_start.wrapping_add(index * 8);
            let Ok(frame) = self.read_value::<u64>(vcpu, at) else { return Ok(index) };
            let known = self.parts.ram.offset(Mfn(frame)).is_some();
            if !known || less && !self.parts.ram.discard(Mfn(frame)) {
                return Ok(index);
            }
        }
        Ok(wanted.nr_extents)
    }

    fn hvm_op(&self, vcpu: usize, op: HvmOp, argument: u64) -> Result<u64, Errno> {
        match op {
            HvmOp::GET_PARAM => {
                let mut param: HvmParamValue = self.read_value(vcpu, argument)?;
                own(param.domid)?;
                let [console, store] = self.parts.rings;
                param.value = match param.index {
                    HvmParam::CONSOLE_PFN => console.0.0,
                    HvmParam::CONSOLE_EVTCHN => console.1.0.into(),
                    HvmParam::STORE_PFN => store.0.0,
                    HvmParam::STORE_EVTCHN => store.1.0.into(),
                    HvmParam::CALLBACK_IRQ | HvmParam::VM_GENERATION_ID_ADDR => 0,
                    _ => return Err(Errno::EINVAL),
                };
                self.write_value(vcpu, argument, &param).map(|()| 0)
            }
            HvmOp::SET_PARAM => {
                let param: HvmParamValue = self.read_value(vcpu, argument)?;
                own(param.domid)?;
                match (param.index, param.value >> 56) {
                    // Lines that are not there can be named: a CPU's own vector comes first.
                    (HvmParam::CALLBACK_IRQ, kind) if kind != BY_VECTOR => Ok(0),
                    (HvmParam::CALLBACK_IRQ, _) => {
                        let vector = u8::try_from(param.value & 0xff).map_err(|_| Errno::EINVAL)?;
                        (0..self.vectors.len()).for_each(|cpu| self.set_vector(cpu, vector));
                        Ok(0)
                    }
                    _ => Err(Errno::EPERM),
                }
            }
            HvmOp::SET_EVTCHN_UPCALL_VECTOR => {
                let upcall: EvtchnUpcallVector = self.read_value(vcpu, argument)?;
                // Below are the exceptions.
                if upcall.vector < 16 {
                    return Err(Errno::EINVAL);
                }
                let target = usize::try_from(upcall.vcpu).map_err(|_| Errno::ENOENT)?;
                if target >= self.vectors.len() {
                    return Err(Errno::ENOENT);
                }
                self.set_vector(target, upcall.vector);
                Ok(0)
            }
            HvmOp::FLUSH_TLBS => Ok(0),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// Events that came before there was a vector are told of now.
    fn set_vector(&self, vcpu: usize, vector: u8) {
        if let Some(place) = self.vectors.get(vcpu) {
            place.store(vector, Ordering::SeqCst);
        }
        let domain = self.domain.get().and_then(Weak::upgrade);
        if domain.is_some_and(|domain| domain.vcpu(vcpu).is_pending()) {
            self.upcall(vcpu);
        }
    }
}

/// No domain has power over another.
fn own(domain: DomId) -> Result<(), Errno> {
    if domain == DomId::SELF { Ok(()) } else { Err(Errno::ESRCH) }
}

impl FrameTypes for HvmSpace {
    fn get(&self, frame: Mfn, _access: Access) -> bool {
        self.parts.ram.offset(frame).is_some()
    }
    fn put(&self, _frame: Mfn, _access: Access) {}
}

impl Space for HvmSpace {
    fn is_translated(&self) -> bool {
        true
    }

    fn read(&self, vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.pages(vcpu, address, buf.len(), |words, offset, part| {
            buf.get_mut(part).is_some_and(|part| crate::memory::copy_out(words, offset, part))
        })
    }

    fn write(&self, vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.pages(vcpu, address, bytes.len(), |words, offset, part| {
            bytes.get(part).is_some_and(|part| crate::memory::copy_in(words, offset, part))
        })
    }

    fn fault(&self, _vcpu: usize, _engine: &mut dyn Vcpu, fault: &Fault) -> Resolution {
        Resolution::Guest(fault.error)
    }

    fn write_table(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _old: Option<u64>,
        _new: u64,
        _size: usize,
    ) -> Option<TableWrite> {
        None
    }

    fn hypercall(
        &self,
        vcpu: usize,
        _engine: &mut dyn Vcpu,
        number: Hypercall,
        [op, argument, ..]: [u64; 6],
    ) -> Option<Result<u64, Errno>> {
        match number {
            Hypercall::MEMORY_OP => Some(self.memory_op(vcpu, MemoryOp(low32(op)), argument)),
            Hypercall::HVM_OP => Some(self.hvm_op(vcpu, HvmOp(low32(op)), argument)),
            // As `hvm_hypercall_table` has them.
            Hypercall::XEN_VERSION
            | Hypercall::EVENT_CHANNEL_OP
            | Hypercall::GRANT_TABLE_OP
            | Hypercall::SCHED_OP
            | Hypercall::VCPU_OP
            | Hypercall::VM_ASSIST
            | Hypercall::SET_TIMER_OP
            | Hypercall::CONSOLE_IO
            | Hypercall::PHYSDEV_OP
            | Hypercall::MULTICALL => None,
            _ => Some(Err(Errno::ENOSYS)),
        }
    }

    fn switch_mode(&self, _vcpu: usize, _engine: &mut dyn Vcpu, _user: bool) -> bool {
        false
    }

    fn initialise(&self, _vcpu: usize, _root: Mfn, _user: Option<Mfn>) -> Result<(), Errno> {
        // Such a guest starts its CPUs as a machine does.
        Err(Errno::ENOSYS)
    }

    fn load(&self, _vcpu: usize, _engine: &mut dyn Vcpu) {}

    fn map_grant(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _flags: MapFlags,
        _frame: Mfn,
    ) -> Result<(), GrantStatus> {
        Err(GrantStatus::GENERAL_ERROR)
    }

    fn unmap_grant(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _replace: Option<u64>,
        _flags: MapFlags,
        _frame: Mfn,
    ) -> Result<(), GrantStatus> {
        Err(GrantStatus::BAD_HANDLE)
    }

    fn is_mapped(&self, _frame: Mfn) -> bool {
        false
    }

    fn roots(&self, vcpu: usize) -> (Option<Mfn>, Option<Mfn>) {
        let cr3 = self.paging.get(vcpu).map(|paging| paging.cr3.load(Ordering::Relaxed));
        (cr3.map(|cr3| Mfn(cr3 >> PAGE_SHIFT)), None)
    }

    fn walk(&self, _vcpu: usize, _address: u64) -> Vec<WalkStep> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests;
