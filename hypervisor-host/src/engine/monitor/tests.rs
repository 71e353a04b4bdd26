//! Guests of a few instructions each. They run whatever the machine's speed: where a test waits, it waits for an event.
// UNSAFETY: takes the bytes of assembled code, and looks at processes.
#![expect(unsafe_code, reason = "assembled guest code")]

mod escape;
mod exceptions;
mod life;
mod paging;
mod several;
mod state;

use std::sync::Arc;

use super::*;
use crate::machine::ram::FIRST_FRAME;

const CODE: u64 = 0x10_0000;
/// The hypercall page.
const PAGE: u64 = 0x30_0000;
/// Where the gate's call returns to, in an entry of it; `rcx` and `r11` are on the stack then.
const BEHIND: u64 = 21;
/// The end of one page of stack.
const STACK: u64 = 0x20_0000;
/// A page of data.
const DATA: u64 = 0x40_0000;
/// Nothing is here.
const NOTHING: u64 = 0x50_0000;

/// The bytes of some instructions.
macro_rules! code {
    ($($line:literal),+ $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: takes two addresses and jumps over the code.
        unsafe {
            std::arch::asm!("lea {0}, [rip + 2f]", "lea {1}, [rip + 3f]", "jmp 3f",
                "2:", $($line,)+ "3:", out(reg) start, out(reg) end, options(nomem, nostack))
        };
        // SAFETY: the code between the two labels.
        unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
    }};
}
use code;

/// A guest: code in frame 0, hypercall page in frame 1, stack in frame 2, data in frame 3; frames from 4 on are free.
struct World {
    ram: Arc<Ram>,
    cpu: MonitorVcpu,
    registers: Registers,
}

fn put(ram: &Ram, frame: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(ram.file().try_clone_to_owned().unwrap());
    file.write_all_at(bytes, ram.offset(Mfn(FIRST_FRAME.0 + frame)).unwrap()).unwrap();
}

fn several(code: &[u8], count: usize) -> Vec<World> {
    let ram = Arc::new(Ram::new(4096).unwrap());
    put(&ram, 0, code);
    put(&ram, 1, &Monitor::hypercall_page());
    let cpus = Monitor::new(Arc::clone(&ram), count).unwrap();
    let world = |cpu| {
        let registers = Registers { rip: CODE, rsp: STACK, rflags: 0x202, ..Registers::default() };
        let mut world = World { ram: Arc::clone(&ram), cpu, registers };
        world.map(CODE, 0, "rx");
        world.map(PAGE, 1, "rx");
        world.map(STACK - 0x1000, 2, "rw");
        world.map(DATA, 3, "rw");
        world
    };
    cpus.into_iter().map(world).collect()
}

impl World {
    fn new(code: &[u8]) -> Self {
        several(code, 1).remove(0)
    }

    fn map(&mut self, address: u64, frame: u64, access: &str) {
        let frame = Mfn(FIRST_FRAME.0 + frame);
        let protection = Protection { write: access.contains('w'), execute: access.contains('x') };
        self.cpu.map(Mapping { address, frame, pages: 1, protection });
    }

    fn run(&mut self) -> Exit {
        self.cpu.run(&mut self.registers).unwrap()
    }

    /// A word of the data page.
    fn data(&self, index: usize) -> &std::sync::atomic::AtomicU64 {
        &self.ram.frame(Mfn(FIRST_FRAME.0 + 3)).unwrap()[index]
    }
}

fn fault(vector: u8, error: u32, address: u64) -> Exit {
    Exit::Fault(Fault { vector, error, address })
}
