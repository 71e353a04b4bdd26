//! `memory_op`: how much memory the guest has, and where.

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::memory::{Domain, Exchange, MachphysMapping, MemoryOp, Reservation};
use janus_proto::abi::xen::shared_info::SharedInfo;
use janus_proto::addr::{DomId, Mfn};
use zerocopy::IntoBytes as _;

use super::Memory;
use super::frame::Owner;
use crate::engine::Vcpu;
use crate::machine::ram::FIRST_FRAME;

/// Bits of the operation; the others are the extent to go on with (`MEMOP_CMD_MASK`).
const COMMAND: u64 = 0x3f;
const COMMAND_BITS: u32 = 6;
/// `CONFIG_DOMU_MAX_ORDER`.
const MAX_ORDER: u32 = 9;
/// Frames that one entry of `XENMEM_machphys_mfn_list` stands for: 2 MiB.
const LIST_STEP: u64 = 512;
/// `XENMEM_*` that no guest of ours makes.
const SET_MEMORY_MAP: MemoryOp = MemoryOp(13);
const SET_POD_TARGET: MemoryOp = MemoryOp(16);
const GET_POD_TARGET: MemoryOp = MemoryOp(17);
const SHARING_FREED_PAGES: MemoryOp = MemoryOp(18);
const SHARING_SHARED_PAGES: MemoryOp = MemoryOp(19);
const ACCESS_OP: MemoryOp = MemoryOp(21);
const ADD_TO_PHYSMAP_BATCH: MemoryOp = MemoryOp(23);
const CLAIM_PAGES: MemoryOp = MemoryOp(24);
const PAGING_OP: MemoryOp = MemoryOp(25);
const VNUMA: MemoryOp = MemoryOp(26);
const RESERVED_DEVICE_MEMORY: MemoryOp = MemoryOp(27);
const ACQUIRE_RESOURCE: MemoryOp = MemoryOp(28);

/// Only one's own domain.
fn own(domain: DomId) -> Result<(), Errno> {
    match domain {
        DomId::SELF => Ok(()),
        DomId(0) => Err(Errno::EPERM),
        _ => Err(Errno::ESRCH),
    }
}

/// One range of memory (`struct e820entry`, packed): address, size, type 1.
fn e820_of_all(pages: u64) -> [u8; 20] {
    let mut entry = [0; 20];
    let fields = [0_u64.to_le_bytes(), (pages << 12).to_le_bytes(), 1_u64.to_le_bytes()];
    for (to, from) in entry.iter_mut().zip(fields.as_flattened()) {
        *to = *from;
    }
    entry
}

impl Memory {
    /// `memory_op(operation, argument)`.
    ///
    /// # Errors
    /// As the operation has them.
    pub fn memory_op(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        [operation, argument, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        let start = (operation & 0xffff_ffff) >> COMMAND_BITS;
        let operation = MemoryOp(u32::try_from(operation & COMMAND).unwrap_or(u32::MAX));
        match operation {
            MemoryOp::INCREASE_RESERVATION
            | MemoryOp::DECREASE_RESERVATION
            | MemoryOp::POPULATE_PHYSMAP => {
                // As Xen: what cannot be read is no extent done.
                let Ok(reservation) = self.fetch::<Reservation>(vcpu, argument) else {
                    return Ok(start);
                };
                if reservation.nr_extents > u64::from(u32::MAX >> COMMAND_BITS)
                    || start >= reservation.nr_extents
                    || own(reservation.domid).is_err()
                {
                    return Ok(start);
                }
                let done = match operation {
                    MemoryOp::INCREASE_RESERVATION => self.increase(vcpu, &reservation, start),
                    MemoryOp::DECREASE_RESERVATION => self.decrease(vcpu, &reservation, start),
                    _ => self.populate(vcpu, &reservation, start),
                };
                self.resident.apply(engine);
                Ok(done)
            }
            MemoryOp::MAXIMUM_RAM_PAGE => Ok(FIRST_FRAME.0 + self.frames.len() as u64 - 1),
            MemoryOp::CURRENT_RESERVATION
            | MemoryOp::MAXIMUM_RESERVATION
            | MemoryOp::MAXIMUM_GPFN => {
                own(self.fetch::<Domain>(vcpu, argument)?.domid)?;
                Ok(match operation {
                    MemoryOp::CURRENT_RESERVATION => self.pages,
                    MemoryOp::MAXIMUM_RESERVATION => self.max_pages,
                    _ => self.max_pfn().max(1) - 1,
                })
            }
            MemoryOp::MACHPHYS_MFN_LIST => self.machphys_list(vcpu, argument),
            MemoryOp::MACHPHYS_MAPPING => {
                let (v_start, last) = self.machine_to_physical_at();
                let mapping =
                    MachphysMapping { v_start, v_end: v_start + (last.0 + 1) * 8, max_mfn: last.0 };
                self.copy_to_guest(vcpu, argument, mapping.as_bytes())?;
                Ok(0)
            }
            MemoryOp::EXCHANGE => {
                let result = self.exchange(vcpu, argument);
                self.resident.apply(engine);
                result
            }
            // For guests whose frames Xen translates.
            MemoryOp::ADD_TO_PHYSMAP => {
                let domain = self.fetch::<Domain>(vcpu, argument)?.domid;
                // Domain 0 is not asked for its rights: the call is none for a PV domain.
                if domain == DomId(0) {
                    Err(Errno::EACCES)
                } else {
                    own(domain).and(Err(Errno::EACCES))
                }
            }
            MemoryOp::REMOVE_FROM_PHYSMAP | ADD_TO_PHYSMAP_BATCH => {
                self.fetch::<Domain>(vcpu, argument)?;
                Err(Errno::EACCES)
            }
            MemoryOp::MEMORY_MAP => {
                // `struct xen_memory_map`: nr_entries, buffer.
                let [room, buffer]: [u64; 2] = self.fetch(vcpu, argument)?;
                let count = u32::from(room & 0xffff_ffff > 0);
                if count > 0 {
                    self.copy_to_guest(vcpu, buffer, &e820_of_all(self.max_pages))?;
                }
                self.copy_to_guest(vcpu, argument, &count.to_le_bytes())?;
                Ok(0)
            }
            // Nothing is shared between domains.
            SHARING_FREED_PAGES | SHARING_SHARED_PAGES => Ok(0),
            MemoryOp::MACHINE_MEMORY_MAP => Err(Errno::EPERM),
            // For toolstacks, which look at the argument before they look at the rights.
            SET_MEMORY_MAP | CLAIM_PAGES => {
                self.fetch::<Domain>(vcpu, argument).and(Err(Errno::EPERM))
            }
            SET_POD_TARGET | GET_POD_TARGET | ACCESS_OP => {
                self.fetch::<Domain>(vcpu, argument).and(Err(Errno::EINVAL))
            }
            PAGING_OP => Err(Errno::EOPNOTSUPP),
            VNUMA | ACQUIRE_RESOURCE => {
                let domain = self.fetch::<Domain>(vcpu, argument)?.domid;
                own(domain).and(Err(Errno::EOPNOTSUPP))
            }
            RESERVED_DEVICE_MEMORY => self.fetch::<Domain>(vcpu, argument).map(|_| 0),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn max_pfn(&self) -> u64 {
        let index = std::mem::offset_of!(SharedInfo, arch) / 8;
        let word = self.ram.frame(self.shared_info).and_then(|words| words.get(index));
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }

    fn extent(&self, vcpu: usize, reservation: &Reservation, index: u64) -> Result<u64, Errno> {
        let address = index.checked_mul(8).and_then(|at| reservation.extent_start.checked_add(at));
        self.fetch(vcpu, address.ok_or(Errno::EFAULT)?)
    }

    fn set_extent(
        &self,
        vcpu: usize,
        reservation: &Reservation,
        index: u64,
        frame: Mfn,
    ) -> Result<(), Errno> {
        let address = index.checked_mul(8).and_then(|at| reservation.extent_start.checked_add(at));
        self.copy_to_guest(vcpu, address.ok_or(Errno::EFAULT)?, &frame.0.to_le_bytes())
    }

    fn increase(&mut self, vcpu: usize, reservation: &Reservation, start: u64) -> u64 {
        if reservation.extent_order > MAX_ORDER {
            return start;
        }
        for index in start..reservation.nr_extents {
            let Some(frame) = self.allocate(reservation.extent_order) else { return index };
            if reservation.extent_start != 0
                && self.set_extent(vcpu, reservation, index, frame).is_err()
            {
                return index;
            }
        }
        reservation.nr_extents
    }

    fn populate(&mut self, vcpu: usize, reservation: &Reservation, start: u64) -> u64 {
        if reservation.extent_order > MAX_ORDER {
            return start;
        }
        for index in start..reservation.nr_extents {
            let Ok(name) = self.extent(vcpu, reservation, index) else { return index };
            let Some(frame) = self.allocate(reservation.extent_order) else { return index };
            for page in 0..1 << reservation.extent_order {
                let (frame, name) = (Mfn(frame.0 + page), name.wrapping_add(page));
                self.machine_to_physical.set(&self.ram, frame, name);
            }
            if self.set_extent(vcpu, reservation, index, frame).is_err() {
                return index;
            }
        }
        reservation.nr_extents
    }

    fn decrease(&mut self, vcpu: usize, reservation: &Reservation, start: u64) -> u64 {
        if reservation.extent_order > MAX_ORDER {
            return start;
        }
        for index in start..reservation.nr_extents {
            let Ok(first) = self.extent(vcpu, reservation, index) else { return index };
            for page in 0..1 << reservation.extent_order {
                let frame = first.checked_add(page).map(Mfn);
                if frame.is_none_or(|frame| self.remove(frame).is_err()) {
                    return index;
                }
            }
        }
        reservation.nr_extents
    }

    /// The frames of the machine-to-physical table, one of each 2 MiB.
    fn machphys_list(&mut self, vcpu: usize, argument: u64) -> Result<u64, Errno> {
        // `struct xen_machphys_mfn_list`: max_extents, list, nr_extents.
        let [max, list, _]: [u64; 3] = self.fetch(vcpu, argument)?;
        let (first, count) = self.machine_to_physical.frames();
        let mut written = 0u32;
        let all = (first.0..first.0 + count).step_by(usize::try_from(LIST_STEP).unwrap_or(1));
        for (frame, index) in all.zip(0..max & 0xffff_ffff) {
            let address = list.checked_add(index * 8).ok_or(Errno::EFAULT)?;
            self.copy_to_guest(vcpu, address, &frame.to_le_bytes())?;
            written += 1;
        }
        let count = argument.checked_add(16).ok_or(Errno::EFAULT)?;
        self.copy_to_guest(vcpu, count, &written.to_le_bytes())?;
        Ok(0)
    }

    /// Gives frames for others of another size (`memory_exchange`).
    fn exchange(&mut self, vcpu: usize, argument: u64) -> Result<u64, Errno> {
        let exchange: Exchange = self.fetch(vcpu, argument)?;
        let (give, take) = (exchange.give, exchange.take);
        if give.nr_extents == 0 && take.nr_extents == 0 && exchange.nr_exchanged == 0 {
            return Ok(0);
        }
        own(give.domid)?;
        if give.extent_order.max(take.extent_order) > MAX_ORDER {
            return Err(Errno::EPERM);
        }
        let frames = |reservation: &Reservation| {
            if reservation.extent_order > MAX_ORDER {
                return None;
            }
            reservation.nr_extents.checked_mul(1 << reservation.extent_order)
        };
        let total = frames(&give).filter(|total| Some(*total) == frames(&take));
        if total.is_none()
            || give.domid != take.domid
            || exchange.nr_exchanged > give.nr_extents
            || give.nr_extents > u64::from(u32::MAX)
        {
            return Err(Errno::EINVAL);
        }
        // In steps of the larger size, so that what one step gives is what it takes.
        let order = give.extent_order.max(take.extent_order);
        let (gives, takes) = (1 << (order - give.extent_order), 1 << (order - take.extent_order));
        if !exchange.nr_exchanged.is_multiple_of(gives) || !give.nr_extents.is_multiple_of(gives) {
            return Err(Errno::EINVAL);
        }
        let mut done = exchange.nr_exchanged;
        let result = loop {
            if done >= give.nr_extents {
                break Ok(0);
            }
            if let Err(error) = self.exchange_step(vcpu, &exchange, done / gives, gives, takes) {
                break Err(error);
            }
            done += gives;
        };
        let count = argument.checked_add(std::mem::offset_of!(Exchange, nr_exchanged) as u64);
        self.copy_to_guest(vcpu, count.ok_or(Errno::EFAULT)?, &done.to_le_bytes())?;
        result
    }

    fn exchange_step(
        &mut self,
        vcpu: usize,
        exchange: &Exchange,
        step: u64,
        gives: u64,
        takes: u64,
    ) -> Result<(), Errno> {
        let mut given = Vec::new();
        for index in step * gives..(step + 1) * gives {
            let first = self.extent(vcpu, &exchange.give, index)?;
            for page in 0..1 << exchange.give.extent_order {
                let frame = Mfn(first.checked_add(page).ok_or(Errno::EINVAL)?);
                // Nobody may know of them any more (`steal_page`), and none may be given twice.
                let known = self.frame(frame).filter(|frame| frame.owner == Owner::Guest);
                if known.is_none_or(|frame| frame.references != 0) || given.contains(&frame) {
                    return Err(Errno::EINVAL);
                }
                given.push(frame);
            }
        }
        let mut names = Vec::new();
        for index in step * takes..(step + 1) * takes {
            names.push(self.extent(vcpu, &exchange.take, index)?);
        }
        // Xen has memory besides the guest's: these come from a few frames more than it may have.
        let order = exchange.take.extent_order;
        let mut taken: Vec<Mfn> = Vec::new();
        for _ in 0..takes {
            let Some(frame) = self.pool.take(order) else {
                for first in taken {
                    (first.0..first.0 + (1 << order)).for_each(|frame| self.pool.give(Mfn(frame)));
                }
                return Err(Errno::ENOMEM);
            };
            taken.push(frame);
        }
        for frame in given {
            self.remove(frame)?;
        }
        self.hand_out(vcpu, exchange, step * takes, &taken, &names)
    }

    fn hand_out(
        &mut self,
        vcpu: usize,
        exchange: &Exchange,
        first: u64,
        taken: &[Mfn],
        names: &[u64],
    ) -> Result<(), Errno> {
        let size = 1u64 << exchange.take.extent_order;
        for ((frame, name), index) in taken.iter().zip(names).zip(first..) {
            for page in 0..size {
                let frame = Mfn(frame.0 + page);
                self.set_owner(frame, Owner::Guest);
                self.machine_to_physical.set(&self.ram, frame, name.wrapping_add(page));
            }
            self.pages += size;
            self.set_extent(vcpu, &exchange.take, index, *frame)?;
        }
        Ok(())
    }
}
