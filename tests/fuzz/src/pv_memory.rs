//! A PV guest's memory as a hostile guest uses it, and the files that it is built from.

use std::sync::Arc;

use janus::engine::{EngineError, Exit, Fault, Kicker, Mapping, Registers, Vcpu};
use janus::machine::ram::FIRST_FRAME;
use janus::pv::builder::{self, Built, Config};
use janus::pv::mm::{Kind, Size};
use janus_proto::addr::{Mfn, PAGE_SIZE, Port};
use janus_proto::sync::Ordering;

use super::Script;

const PAGES: u64 = 1024;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
/// `DOMID_SELF`.
const OWN: u64 = 0x7ff0;

/// A kernel's file: one segment at 1 MiB, and the notes that it needs.
fn image() -> Vec<u8> {
    const START: u64 = 0x10_0000;
    let mut notes = Vec::new();
    for (kind, value) in [(1u32, START), (2, START + 0x1000), (3, 0)] {
        for word in [4, 8, kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"Xen\0");
        notes.extend(value.to_le_bytes());
    }
    let contents = [0x90; 64];
    let contents_at = 64 + 2 * 56;
    let notes_at = contents_at + contents.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for long in [START, 64, 0] {
        file.extend(long.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = notes.len() as u64;
    for (kind, at, address, size, memory, align) in [
        (1u32, contents_at, START, contents.len() as u64, 0x2000, 0x1000),
        (4, notes_at, 0, length, length, 4),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for long in [at, address, address, size, memory, align] {
            file.extend(long.to_le_bytes());
        }
    }
    file.extend(contents);
    file.extend(notes);
    file
}

fn build(kernel: &[u8]) -> Option<Built> {
    let built = builder::build(&Config {
        name: "kernel",
        kernel,
        module: None,
        command_line: "",
        size: Size { pages: PAGES, max_pages: PAGES + 8, vcpus: 1 },
        store_port: Port(1),
        console_port: Port(2),
        hypercall_page: &[0; PAGE_SIZE],
    });
    built.ok()
}

/// A file that is nearly a kernel: refused, or a domain whose memory is in order.
pub(super) fn kernel_image(input: &[u8]) {
    let mut script = Script(input);
    let mut file = image();
    let cut = script.index();
    while !script.is_over() {
        let at = usize::from(script.byte()) * 2 + usize::from(script.byte());
        let byte = script.byte();
        if let Some(place) = file.get_mut(at) {
            *place = byte;
        }
    }
    if let Ok(cut) = usize::try_from(cut)
        && cut > 64
    {
        file.truncate(cut);
    }
    if let Some(built) = build(&file) {
        assert_eq!(built.memory.kind(built.root).map(|(kind, _)| kind), Some(Kind::L4));
        nothing_is_writable_and_a_table(&built);
    }
}

/// An engine that runs nothing.
struct Nothing;

impl Vcpu for Nothing {
    fn run(&mut self, _registers: &mut Registers) -> Result<Exit, EngineError> {
        Ok(Exit::Kicked)
    }
    fn map(&mut self, mapping: Mapping) {
        assert!(mapping.pages > 0 && mapping.address.is_multiple_of(PAGE_SIZE as u64));
        assert!(mapping.address >= janus::engine::monitor::BOTTOM);
        let length = (mapping.pages * PAGE_SIZE) as u64;
        assert!(mapping.address + length <= janus::engine::monitor::TOP);
    }
    fn unmap(&mut self, _address: u64, _pages: usize) {}
    fn unmap_all(&mut self) {}
    fn switch(&mut self, _root: Mfn) {}
    fn set_deadline(&mut self, _nanoseconds: Option<u64>) {}
    fn kicker(&self) -> Arc<dyn Kicker> {
        unreachable!("nobody kicks it")
    }
    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }
}

fn nothing_is_writable_and_a_table(built: &Built) {
    let memory = &built.memory;
    for frame in (FIRST_FRAME.0..).map(Mfn).take_while(|frame| memory.kind(*frame).is_some()) {
        let Some((Kind::L1, 1..)) = memory.kind(frame) else { continue };
        for word in memory.ram().frame(frame).into_iter().flatten() {
            let entry = word.load(Ordering::Relaxed);
            if entry & PRESENT == 0 {
                continue;
            }
            let named = memory.kind(Mfn((entry & 0x000f_ffff_ffff_f000) >> 12));
            assert!(named.is_some(), "a frame of nobody's is mapped");
            let is_data = matches!(named, Some((Kind::Writable, 1..)));
            assert!(entry & WRITE == 0 || is_data, "{named:?} is mapped writable");
        }
    }
}

/// Page table updates, pins, faults and reservations of a guest that means harm.
pub(super) fn page_tables(input: &[u8]) {
    let mut script = Script(input);
    let mut built = build(&image()).expect("the kernel is one");
    let engine = &mut Nothing;
    // The boot stack is mapped writable, and arguments come from there, as long as the guest leaves it so.
    let arguments = built.registers.rsp - PAGE_SIZE as u64;
    let tables = (built.root.0 - FIRST_FRAME.0).cast_signed();
    let frame = |script: &mut Script<'_>| {
        let near = i64::from(script.byte()) - 8;
        let base = if script.byte().is_multiple_of(2) { tables } else { 600 };
        FIRST_FRAME.0.wrapping_add_signed(base + near)
    };
    while !script.is_over() {
        let kind = script.byte() % 8;
        let (one, two) = (frame(&mut script), frame(&mut script));
        let bits = u64::from(script.byte() & 0x67) | PRESENT;
        let index = u64::from(script.index() % 512);
        let memory = &mut built.memory;
        let mut words = [0u64; 6];
        match kind {
            0..=2 => {
                [words[0], words[1]] =
                    [(one << 12) | (index * 8) | u64::from(kind), (two << 12) | bits]
            }
            3 => [words[0], words[1], words[2]] = [u64::from(script.byte() % 21), one, two],
            // One extent, behind the structure.
            4 => [words[0], words[1], words[3], words[5]] = [arguments + 40, 1, OWN, one],
            _ => {}
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // What cannot be written there is read as what was there before.
        let _ = memory.copy_to_guest(0, arguments, &bytes);
        let _ = match kind {
            0..=2 => memory.mmu_update(0, engine, [arguments, 1, 0, OWN, 0, 0]),
            3 => memory.mmuext_op(0, engine, [arguments, 1, 0, OWN, 0, 0]),
            4 => {
                let operation =
                    [0, 1, 6, 11].get(usize::from(script.byte()) % 5).copied().unwrap_or(12);
                memory.memory_op(0, engine, [operation, arguments, 0, 0, 0, 0])
            }
            5 => memory.update_va_mapping(0, engine, [index << 12, one << 12 | bits, 0, 0, 0, 0]),
            6 => {
                let error = [4, 6].get(usize::from(script.byte()) % 3).copied().unwrap_or(0x14);
                let fault = Fault { vector: 14, error, address: index << 12 };
                memory.fault(0, engine, &fault);
                Ok(0)
            }
            _ => memory.update_descriptor(
                engine,
                [(one << 12) | (index * 8), (two << 32) | (bits << 40), 0, 0, 0, 0],
            ),
        };
    }
    nothing_is_writable_and_a_table(&built);
}
