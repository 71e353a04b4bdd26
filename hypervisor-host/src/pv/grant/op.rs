//! The grant table calls of a guest: `GNTTABOP_*` on its own table, and between its own pages.

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::grant_table::{
    Copy, CopyFlags, CopyPtr, GNTTAB_NR_RESERVED_ENTRIES, GetVersion, GrantStatus, GrantTableOp,
    MapFlags, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapGrantRef,
};
use janus_proto::addr::{DomId, GrantRef, Mfn, PAGE_SIZE};
use janus_proto::grant::Access;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{GrantTable, MAX_GRANT_FRAMES, entry};
use crate::memory::{copy_in, copy_out};
use crate::pv::cpu::Cpu;
use crate::pv::hypercall::{Answer, low32};

/// Operations that `janus_proto` has no name for, because no frontend of ours makes them.
const TRANSFER: GrantTableOp = GrantTableOp(4);
const UNMAP_AND_REPLACE: GrantTableOp = GrantTableOp(7);
const GET_STATUS_FRAMES: GrantTableOp = GrantTableOp(9);
const SWAP_GRANT_REF: GrantTableOp = GrantTableOp(11);
const CACHE_FLUSH: GrantTableOp = GrantTableOp(12);

/// `struct gnttab_get_status_frames`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct GetStatusFrames {
    nr_frames: u32,
    dom: DomId,
    status: GrantStatus,
    frame_list: u64,
}

/// `struct gnttab_unmap_and_replace`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct UnmapAndReplace {
    host_addr: u64,
    new_addr: u64,
    handle: u32,
    status: GrantStatus,
    pad: [u8; 2],
}

/// `struct gnttab_swap_grant_ref`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SwapGrantRef {
    a: GrantRef,
    b: GrantRef,
    status: GrantStatus,
    pad: [u8; 2],
}

/// `struct gnttab_transfer`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Transfer {
    mfn: u64,
    domid: DomId,
    pad0: [u8; 2],
    reference: GrantRef,
    status: GrantStatus,
    pad1: [u8; 6],
}

/// `struct gnttab_cache_flush`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct CacheFlush {
    address: u64,
    offset: u16,
    length: u16,
    op: u32,
}

pub(crate) fn grant_table_op(cpu: &mut Cpu, [op, list, count, ..]: [u64; 6]) -> Answer {
    let (op, count) = (low32(op), low32(count));
    // As Xen: the count is an `int` that must not be negative.
    if i32::try_from(count).is_err() {
        return Answer::err(Errno::EINVAL);
    }
    let op = GrantTableOp(op);
    Answer::from(match op {
        GrantTableOp::MAP_GRANT_REF => each(cpu, list, count, map),
        GrantTableOp::UNMAP_GRANT_REF => each(cpu, list, count, unmap),
        UNMAP_AND_REPLACE => each(cpu, list, count, unmap_and_replace),
        GrantTableOp::COPY => each(cpu, list, count, copy),
        SWAP_GRANT_REF => each(cpu, list, count, swap),
        CACHE_FLUSH => each(cpu, list, count, cache_flush),
        GrantTableOp::SETUP_TABLE if count == 1 => each(cpu, list, 1, setup_table),
        GrantTableOp::QUERY_SIZE if count == 1 => each(cpu, list, 1, query_size),
        GET_STATUS_FRAMES if count == 1 => each(cpu, list, 1, get_status_frames),
        // These two look at one structure whatever the count is.
        GrantTableOp::GET_VERSION => each(cpu, list, 1, get_version),
        GrantTableOp::SET_VERSION => set_version(cpu, list),
        TRANSFER => each(cpu, list, count, transfer),
        GrantTableOp::SETUP_TABLE | GrantTableOp::QUERY_SIZE | GET_STATUS_FRAMES => {
            Err(Errno::EINVAL)
        }
        _ => Err(Errno::ENOSYS),
    })
}

/// Does one structure after the other, each read once and written back.
fn each<T: FromBytes + IntoBytes + Immutable>(
    cpu: &mut Cpu,
    list: u64,
    count: u32,
    operate: fn(&mut Cpu, &mut T) -> Result<(), Errno>,
) -> Result<u64, Errno> {
    let size = size_of::<T>() as u64;
    for index in 0..u64::from(count) {
        cpu.attend();
        if cpu.domain.is_ending() {
            break;
        }
        let address = list.wrapping_add(index * size);
        let mut argument: T = cpu.read(address)?;
        operate(cpu, &mut argument)?;
        cpu.write(address, &argument)?;
    }
    Ok(0)
}

/// Whether a domain means the calling one; else what is wrong with it.
fn own(cpu: &Cpu, domain: DomId) -> Result<(), GrantStatus> {
    if domain == DomId::SELF || domain == cpu.domain.id() {
        Ok(())
    } else if domain == DomId(0) {
        Err(GrantStatus::PERMISSION_DENIED)
    } else {
        Err(GrantStatus::BAD_DOMAIN)
    }
}

fn status(result: Result<(), GrantStatus>) -> GrantStatus {
    result.err().unwrap_or(GrantStatus::OKAY)
}

fn setup_table(cpu: &mut Cpu, argument: &mut SetupTable) -> Result<(), Errno> {
    let frames = u64::from(argument.nr_frames);
    let result = own(cpu, argument.dom).and_then(|()| cpu.domain.grants.grow(frames));
    argument.status = status(result);
    if argument.status == GrantStatus::OKAY {
        for index in 0..frames {
            let frame = cpu.domain.grants.first.0 + index;
            cpu.write(argument.frame_list.wrapping_add(index * 8), &frame)?;
        }
    }
    Ok(())
}

fn query_size(cpu: &mut Cpu, argument: &mut QuerySize) -> Result<(), Errno> {
    argument.status = status(own(cpu, argument.dom));
    if argument.status == GrantStatus::OKAY {
        argument.nr_frames = u32::try_from(cpu.domain.grants.lock().frames).unwrap_or(0);
        argument.max_nr_frames = u32::try_from(MAX_GRANT_FRAMES).unwrap_or(0);
    }
    Ok(())
}

fn get_status_frames(cpu: &mut Cpu, argument: &mut GetStatusFrames) -> Result<(), Errno> {
    let state = cpu.domain.grants.lock();
    let (version, have) = (state.version, entry::status_frames(state.frames));
    drop(state);
    let frames = u64::from(argument.nr_frames);
    let enough =
        if version == 2 && frames <= have { Ok(()) } else { Err(GrantStatus::GENERAL_ERROR) };
    argument.status = status(own(cpu, argument.dom).and(enough));
    if argument.status == GrantStatus::OKAY {
        for index in 0..frames {
            let frame = cpu.domain.grants.first.0 + MAX_GRANT_FRAMES + index;
            cpu.write(argument.frame_list.wrapping_add(index * 8), &frame)?;
        }
    }
    Ok(())
}

fn get_version(cpu: &mut Cpu, argument: &mut GetVersion) -> Result<(), Errno> {
    own(cpu, argument.dom).map_err(|error| match error {
        GrantStatus::BAD_DOMAIN => Errno::ESRCH,
        _ => Errno::EPERM,
    })?;
    argument.version = cpu.domain.grants.lock().version;
    Ok(())
}

fn set_version(cpu: &mut Cpu, address: u64) -> Result<u64, Errno> {
    let mut argument: SetVersion = cpu.read(address)?;
    let result = change_version(cpu, argument.version);
    // The version in force goes back in any case.
    argument.version = cpu.domain.grants.lock().version;
    cpu.write(address, &argument)?;
    result.map(|()| 0)
}

fn change_version(cpu: &Cpu, version: u32) -> Result<(), Errno> {
    let grants = &cpu.domain.grants;
    // The status pages go away with version 2: nobody may have one mapped (XSA-255).
    let mapped = (0..super::MAX_STATUS_FRAMES)
        .any(|index| cpu.domain.space.is_mapped(Mfn(grants.first.0 + MAX_GRANT_FRAMES + index)));
    if version == 1 && mapped { Err(Errno::EBUSY) } else { grants.set_version(version) }
}

/// Giving a page away for good: to nobody, for no other domain takes any.
fn transfer(cpu: &mut Cpu, argument: &mut Transfer) -> Result<(), Errno> {
    let types = &cpu.domain.grants.types;
    let frame = Mfn(argument.mfn);
    argument.status = if types.get(frame, Access::ReadOnly) {
        types.put(frame, Access::ReadOnly);
        GrantStatus::BAD_DOMAIN
    } else {
        GrantStatus::BAD_PAGE
    };
    Ok(())
}

fn swap(cpu: &mut Cpu, argument: &mut SwapGrantRef) -> Result<(), Errno> {
    argument.status = status(cpu.domain.grants.swap(argument.a, argument.b));
    Ok(())
}

/// Caches are coherent: only the arguments are looked at.
fn cache_flush(cpu: &mut Cpu, argument: &mut CacheFlush) -> Result<(), Errno> {
    let end = usize::from(argument.offset) + usize::from(argument.length);
    if end > PAGE_SIZE || argument.op & !0x8000_0003 != 0 {
        return Err(Errno::EINVAL);
    }
    if argument.length == 0 || argument.op == 0 {
        return Ok(());
    }
    let types = &cpu.domain.grants.types;
    let frame = Mfn(argument.address >> 12);
    if !types.get(frame, Access::ReadOnly) {
        return Err(Errno::EPERM);
    }
    types.put(frame, Access::ReadOnly);
    Ok(())
}

/// Maps a page that this domain granted to itself.
fn map(cpu: &mut Cpu, argument: &mut MapGrantRef) -> Result<(), Errno> {
    argument.status = match try_map(cpu, argument) {
        Ok((handle, frame)) => {
            argument.handle = handle;
            argument.dev_bus_addr = frame.0 << 12;
            GrantStatus::OKAY
        }
        Err(error) => error,
    };
    Ok(())
}

fn try_map(cpu: &mut Cpu, argument: &MapGrantRef) -> Result<(u32, Mfn), GrantStatus> {
    if !argument.flags.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
        return Err(GrantStatus::BAD_GNTREF);
    }
    // Domain 0 grants this domain nothing, and others do not exist.
    own(cpu, argument.dom).map_err(|error| match error {
        GrantStatus::PERMISSION_DENIED => GrantStatus::GENERAL_ERROR,
        other => other,
    })?;
    let domain = std::sync::Arc::clone(&cpu.domain);
    let access = if argument.flags.contains(MapFlags::READONLY) {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let frame = domain.grants.acquire(argument.reference, domain.id(), access)?;
    let mapped = if argument.flags.contains(MapFlags::HOST_MAP) {
        let address = argument.host_addr;
        domain.space.map_grant(cpu.index, &mut *cpu.engine, address, argument.flags, frame)
    } else {
        Ok(())
    };
    let done = mapped.and_then(|()| domain.grants.track(argument, access, frame));
    if done.is_err() {
        domain.grants.release(argument.reference, access);
    }
    done.map(|handle| (handle, frame))
}

fn unmap(cpu: &mut Cpu, argument: &mut UnmapGrantRef) -> Result<(), Errno> {
    argument.status = status(try_unmap(cpu, argument));
    Ok(())
}

fn try_unmap(cpu: &mut Cpu, argument: &UnmapGrantRef) -> Result<(), GrantStatus> {
    let domain = std::sync::Arc::clone(&cpu.domain);
    let held = domain.grants.tracked(argument.handle)?;
    let mut left = held.flags;
    if argument.host_addr != 0 && left.contains(MapFlags::HOST_MAP) {
        let address = argument.host_addr;
        domain.space.unmap_grant(
            cpu.index,
            &mut *cpu.engine,
            address,
            None,
            held.flags,
            held.frame,
        )?;
        left.remove(MapFlags::HOST_MAP);
    }
    if argument.dev_bus_addr != 0 && left.contains(MapFlags::DEVICE_MAP) {
        if argument.dev_bus_addr != held.frame.0 << 12 {
            return Err(GrantStatus::BAD_DEV_ADDR);
        }
        left.remove(MapFlags::DEVICE_MAP);
    }
    domain.grants.keep(argument.handle, left);
    Ok(())
}

/// As an unmap, and the entry of another address takes the place.
fn unmap_and_replace(cpu: &mut Cpu, argument: &mut UnmapAndReplace) -> Result<(), Errno> {
    argument.status = status(try_replace(cpu, argument));
    Ok(())
}

fn try_replace(cpu: &mut Cpu, argument: &UnmapAndReplace) -> Result<(), GrantStatus> {
    let domain = std::sync::Arc::clone(&cpu.domain);
    let held = domain.grants.tracked(argument.handle)?;
    if !held.flags.contains(MapFlags::HOST_MAP) {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    domain.space.unmap_grant(
        cpu.index,
        &mut *cpu.engine,
        argument.host_addr,
        (argument.new_addr != 0).then_some(argument.new_addr),
        held.flags,
        held.frame,
    )?;
    let mut left = held.flags;
    left.remove(MapFlags::HOST_MAP);
    domain.grants.keep(argument.handle, left);
    Ok(())
}

/// One end of a copy, held for as long as it takes.
struct End<'a> {
    table: &'a GrantTable,
    frame: Mfn,
    reference: Option<GrantRef>,
    access: Access,
}

impl<'a> End<'a> {
    fn take(
        cpu: &'a Cpu,
        end: &CopyPtr,
        is_reference: bool,
        access: Access,
    ) -> Result<Self, GrantStatus> {
        // A frame of another domain is never this one's to name.
        own(cpu, end.domid)
            .map_err(|error| if is_reference { error } else { GrantStatus::PERMISSION_DENIED })?;
        let table = &*cpu.domain.grants;
        if is_reference {
            let reference = GrantRef(u32::try_from(end.target & 0xffff_ffff).unwrap_or(0));
            let frame = table.acquire(reference, cpu.domain.id(), access)?;
            return Ok(Self { table, frame, reference: Some(reference), access });
        }
        let frame = Mfn(end.target);
        if !table.types.get(frame, access) {
            return Err(GrantStatus::BAD_PAGE);
        }
        Ok(Self { table, frame, reference: None, access })
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        match self.reference {
            Some(reference) => self.table.release(reference, self.access),
            None => self.table.types.put(self.frame, self.access),
        }
    }
}

fn copy(cpu: &mut Cpu, argument: &mut Copy) -> Result<(), Errno> {
    argument.status = status(try_copy(cpu, argument));
    Ok(())
}

fn try_copy(cpu: &Cpu, argument: &Copy) -> Result<(), GrantStatus> {
    let len = usize::from(argument.len);
    let inside = |end: &CopyPtr| usize::from(end.offset) + len <= PAGE_SIZE;
    if !inside(&argument.source) || !inside(&argument.dest) {
        return Err(GrantStatus::BAD_COPY_ARG);
    }
    let flag = |flag| argument.flags.contains(flag);
    let from = End::take(cpu, &argument.source, flag(CopyFlags::SOURCE_GREF), Access::ReadOnly)?;
    let to = End::take(cpu, &argument.dest, flag(CopyFlags::DEST_GREF), Access::ReadWrite)?;
    let page = |end: &End<'_>| cpu.domain.ram().words(end.frame, 1).ok_or(GrantStatus::BAD_PAGE);
    let mut buf = vec![0; len];
    let done = copy_out(page(&from)?, argument.source.offset.into(), &mut buf)
        && copy_in(page(&to)?, argument.dest.offset.into(), &buf);
    if done { Ok(()) } else { Err(GrantStatus::BAD_COPY_ARG) }
}

impl GrantTable {
    /// Makes the table at least so large.
    pub(crate) fn grow(&self, frames: u64) -> Result<(), GrantStatus> {
        if frames > MAX_GRANT_FRAMES {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let mut state = self.lock();
        state.frames = state.frames.max(frames);
        Ok(())
    }

    /// Changes the layout of the entries. Nothing may be in use; only the reserved entries are kept.
    fn set_version(&self, version: u32) -> Result<(), Errno> {
        if !(1..=2).contains(&version) {
            return Err(Errno::EINVAL);
        }
        let mut state = self.lock();
        if state.version == version {
            return Ok(());
        }
        // The toolstack's rings stay mapped for a domain's life: they do not keep it from changing.
        if state.pins.keys().any(|reference| *reference >= GNTTAB_NR_RESERVED_ENTRIES) {
            return Err(Errno::EBUSY);
        }
        self.convert(&mut state, version);
        Ok(())
    }

    fn convert(&self, state: &mut super::State, version: u32) {
        let old = entry::Entries::new(&self.ram, self.first, state.version, state.frames);
        let kept: Vec<_> =
            (0..GNTTAB_NR_RESERVED_ENTRIES).map(|index| old.content(GrantRef(index))).collect();
        let everything = MAX_GRANT_FRAMES + super::MAX_STATUS_FRAMES;
        for index in 0..everything {
            let frame = Mfn(self.first.0 + index);
            for word in self.ram.words(frame, 1).unwrap_or_default() {
                word.store(0, std::sync::atomic::Ordering::Relaxed);
            }
        }
        state.version = version;
        let new = entry::Entries::new(&self.ram, self.first, version, state.frames);
        for (index, content) in (0..).zip(kept) {
            let Some((head, frame)) = content else { continue };
            new.set_content(GrantRef(index), (head & !entry::MARKS, frame));
            if let Some(pin) = state.pins.get(&index) {
                new.mark(GrantRef(index), pin.writers > 0);
            }
        }
    }

    /// Exchanges two entries that nobody uses.
    fn swap(&self, a: GrantRef, b: GrantRef) -> Result<(), GrantStatus> {
        let state = self.lock();
        let table = entry::Entries::new(&self.ram, self.first, state.version, state.frames);
        let (Some(first), Some(second)) = (table.content(a), table.content(b)) else {
            return Err(GrantStatus::BAD_GNTREF);
        };
        if a == b {
            return Ok(());
        }
        if state.pins.contains_key(&a.0) || state.pins.contains_key(&b.0) {
            return Err(GrantStatus::EAGAIN);
        }
        table.set_content(a, second);
        table.set_content(b, first);
        Ok(())
    }
}
