//! The guest's side of the memory calls, without a guest: a recording engine, and all that Xen refuses.

mod model;
mod refusals;
mod rights;

use std::collections::BTreeMap;
use std::sync::Arc;

use janus_proto::abi::xen::mmu::{MmuUpdate, MmuextCmd, MmuextOp};

use super::*;
use crate::engine::{EngineError, Exit, Kicker, Mapping, Protection, Registers, Vcpu};
use crate::pv::mm::entry::index;

const P: u64 = Entry::PRESENT;
const RW: u64 = Entry::PRESENT | Entry::WRITE;

/// An engine that only remembers what is mapped.
#[derive(Debug, Default)]
struct Recorder {
    pages: BTreeMap<u64, (Mfn, Protection)>,
    root: Option<Mfn>,
    maps: usize,
    unmaps: usize,
}

impl Vcpu for Recorder {
    fn run(&mut self, _registers: &mut Registers) -> Result<Exit, EngineError> {
        Ok(Exit::Kicked)
    }
    fn map(&mut self, mapping: Mapping) {
        self.maps += 1;
        for page in 0..mapping.pages as u64 {
            let frame = Mfn(mapping.frame.0 + page);
            self.pages.insert(mapping.address + page * 4096, (frame, mapping.protection));
        }
    }
    fn unmap(&mut self, address: u64, pages: usize) {
        self.unmaps += 1;
        for page in 0..pages as u64 {
            self.pages.remove(&(address + page * 4096));
        }
    }
    fn unmap_all(&mut self) {
        self.unmaps += 1;
        self.pages.clear();
    }
    fn switch(&mut self, root: Mfn) {
        // Whatever was mapped in the other space is kept, and still told of: one map stands for all of them only if
        // nothing of the former is used, so forget it here.
        if self.root != Some(root) {
            self.pages.clear();
        }
        self.root = Some(root);
    }
    fn set_deadline(&mut self, _nanoseconds: Option<u64>) {}
    fn kicker(&self) -> Arc<dyn Kicker> {
        unreachable!("nobody kicks it")
    }
    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }
}

fn mfn(pfn: u64) -> Mfn {
    Mfn(FIRST_FRAME.0 + pfn)
}

fn entry(pfn: u64, bits: u64) -> u64 {
    mfn(pfn).0 << 12 | bits
}

/// A guest of 32 frames: 1 is the top table, 2, 3, 4 the tables below it for address 0; address n pages is frame n, the
/// tables read-only. Frames 5 to 15 are mapped, 16 to 31 are not.
struct Guest {
    memory: Memory,
    engine: Recorder,
}

const ROOT: u64 = 1;
const L3: u64 = 2;
const L2: u64 = 3;
const L1: u64 = 4;
const MAPPED: u64 = 16;
const FRAMES: u64 = 32;

impl Guest {
    fn new() -> Self {
        let memory = Memory::new(Size { pages: FRAMES, max_pages: FRAMES + 4, vcpus: 2 }).unwrap();
        let mut guest = Self { memory, engine: Recorder::default() };
        guest.poke(ROOT, 0, entry(L3, RW));
        guest.poke(L3, 0, entry(L2, RW));
        guest.poke(L2, 0, entry(L1, RW));
        for pfn in 1..MAPPED {
            let bits = if (ROOT..=L1).contains(&pfn) { P } else { RW };
            guest.poke(L1, usize::try_from(pfn).unwrap(), entry(pfn, bits));
        }
        guest.memory.pin_quietly(mfn(ROOT), Kind::L4).unwrap();
        guest.memory.initialise(0, mfn(ROOT), None).unwrap();
        guest
    }

    /// Writes a word of a frame, as the guest might before it is a table.
    fn poke(&self, pfn: u64, index: usize, value: u64) {
        self.memory.write_entry(mfn(pfn), index, Entry(value));
    }
    fn peek(&self, pfn: u64, index: usize) -> u64 {
        self.memory.read_entry(mfn(pfn), index).0
    }

    fn update(&mut self, pfn: u64, index: u64, value: u64) -> Result<u64, Errno> {
        let update = MmuUpdate { ptr: (mfn(pfn).0 << 12) + index * 8, val: value };
        let result = self.memory.update_entry(&mut self.engine, update);
        self.memory.resident.apply(&mut self.engine);
        result
    }
    fn extended(&mut self, cmd: MmuextCmd, arg1: u64, arg2: u64) -> Result<u64, Errno> {
        let operation = MmuextOp { cmd, pad0: [0; 4], arg1, arg2 };
        let result = self.memory.extended_op(0, &mut self.engine, operation);
        self.memory.resident.apply(&mut self.engine);
        result
    }
    fn pin(&mut self, cmd: MmuextCmd, pfn: u64) -> Result<u64, Errno> {
        self.extended(cmd, mfn(pfn).0, 0)
    }
    fn map(&mut self, address: u64, value: u64) -> Result<u64, Errno> {
        self.memory.update_va_mapping(0, &mut self.engine, [address, value, 0, 0, 0, 0])
    }
    fn kind(&self, pfn: u64) -> (Kind, u32) {
        self.memory.kind(mfn(pfn)).unwrap()
    }
    fn fault(&mut self, address: u64, error: u32) -> Outcome {
        let fault = crate::engine::Fault { vector: 14, error, address };
        self.memory.fault(0, &mut self.engine, &fault)
    }

    /// What a hypercall's argument is copied from: frame 8, mapped at its own address.
    fn argument(&self, bytes: &[u8]) -> u64 {
        self.memory.copy_to_guest(0, 0x8000, bytes).unwrap();
        0x8000
    }
}

/// Every invariant of the counts, from the tables alone.
fn audit(guest: &Guest) {
    let memory = &guest.memory;
    let count = memory.frames.len();
    let (mut references, mut uses, mut linear) =
        (vec![0u32; count], vec![0u32; count], vec![0i32; count]);
    let slot = |frame: Mfn| Memory::slot(frame).unwrap();
    for (number, frame) in memory.frames.iter().enumerate() {
        if frame.owner == Owner::Shared {
            references[number] += 1;
            uses[number] += 1;
        }
        if frame.pinned {
            assert!(frame.kind.is_table(), "only page tables are pinned");
            references[number] += 1;
            uses[number] += 1;
        }
        assert!(frame.uses == 0 || frame.validated, "nothing is half done between calls");
        let Some(level) = frame.kind.level().filter(|_| frame.uses > 0) else { continue };
        let table = Mfn(FIRST_FRAME.0 + number as u64);
        for index in 0..512 {
            let entry = memory.read_entry(table, index);
            if !entry.is_present() || level == 4 && !entry::is_guest_slot(index) {
                continue;
            }
            assert!(!entry.is_disallowed(level));
            let named = entry.frame();
            let other = memory.frame(named).expect("an entry names a frame of the guest's");
            if level > 1 && other.kind == frame.kind {
                assert!(!entry.is_writable(), "a linear entry is read-only");
                if named != table {
                    references[slot(named)] += 1;
                    uses[slot(named)] += 1;
                    linear[slot(named)] -= 1;
                    linear[number] += 1;
                }
                continue;
            }
            references[slot(named)] += 1;
            if level > 1 {
                uses[slot(named)] += 1;
                assert_eq!(
                    other.kind.level(),
                    Some(level - 1),
                    "a table names tables of the level below"
                );
            } else if entry.is_writable() {
                uses[slot(named)] += 1;
                assert_eq!(other.kind, Kind::Writable, "nothing but data is mapped writable");
            }
        }
    }
    for cpu in &memory.cpus {
        for frame in cpu.root.iter().chain(&cpu.user_root).chain(&cpu.gdt) {
            references[slot(*frame)] += 1;
            uses[slot(*frame)] += 1;
        }
    }
    for (number, frame) in memory.frames.iter().enumerate() {
        assert_eq!(
            (frame.references, frame.uses, frame.linear),
            (references[number], uses[number], linear[number]),
            "counts of frame {number}: {frame:?}"
        );
        assert!(frame.linear <= 0 || frame.uses > 0);
        assert!(frame.owner != Owner::Free || frame.references == 0);
    }
    let mine = |frame: &&Frame| matches!(frame.owner, Owner::Guest | Owner::Leaving);
    assert_eq!(memory.frames.iter().filter(mine).count() as u64, memory.pages);
    let free = memory.frames.iter().filter(|frame| frame.owner == Owner::Free).count();
    assert_eq!(free as u64, memory.pool.count());
    audit_engine(guest);
}

/// What is mapped is what the tables say, or less.
fn audit_engine(guest: &Guest) {
    let memory = &guest.memory;
    let Some(root) = memory.root(0) else { return };
    for (address, (frame, protection)) in &guest.engine.pages {
        if memory.machine_to_physical.alias_page(*address).is_some() {
            assert!(!protection.write);
            continue;
        }
        let leaf = memory.walk(root, *address).expect("a mapped page is in the tables");
        assert_eq!(leaf.entry.frame(), *frame, "at {address:#x}");
        assert!(!protection.write || leaf.write && leaf.entry.has(Entry::DIRTY), "at {address:#x}");
        assert!(!protection.execute || leaf.execute, "at {address:#x}");
        assert!(leaf.entry.has(Entry::ACCESSED));
        let known = memory.frame(*frame).expect("a frame of the guest's");
        assert!(
            !protection.write || known.kind == Kind::Writable && known.uses > 0,
            "at {address:#x}"
        );
        assert!(memory.resident.contains(leaf.table.frame, index(*address, 1)));
    }
}
