//! Guests of a few instructions each.

use std::sync::Arc;

use super::*;
use crate::engine::Vcpu;
use crate::machine::ram::FIRST_FRAME;

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const PAGE: u64 = 0x30_0000;

/// A guest: code in frame 0, hypercall page in frame 1, stack in frame 2.
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

impl World {
    fn new(code: &[u8]) -> Self {
        let ram = Arc::new(Ram::new(16).unwrap());
        put(&ram, 0, code);
        put(&ram, 1, &Monitor::hypercall_page());
        let cpu = Monitor::new(Arc::clone(&ram), 1).unwrap().remove(0);
        let mut world = Self { ram, cpu, registers: Registers::default() };
        world.map(CODE, 0, false, true);
        world.map(PAGE, 1, false, true);
        world.map(STACK - 4096, 2, true, false);
        world.registers.rip = CODE;
        world.registers.rsp = STACK;
        world.registers.rflags = 2;
        world
    }

    fn map(&mut self, address: u64, frame: u64, write: bool, execute: bool) {
        let frame = Mfn(FIRST_FRAME.0 + frame);
        let protection = Protection { write, execute };
        self.cpu.map(Mapping { address, frame, pages: 1, protection });
    }

    fn run(&mut self) -> Exit {
        self.cpu.run(&mut self.registers).unwrap()
    }
}

/// `call [PAGE + 32 * number]`, in a loop: mov eax, entry; call rax; jmp back.
fn calls(number: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((PAGE as u32 + 32 * number).to_le_bytes());
    code.extend([0xff, 0xd0, 0xeb, 0xf7]);
    code
}

#[test]
fn a_hypercall_comes_and_goes() {
    let mut world = World::new(&calls(17));
    for round in 0..100 {
        assert_eq!(world.run(), Exit::Hypercall);
        assert_eq!((world.registers.rax, world.registers.rip), (17, CODE + 7));
        assert_eq!(world.registers.rsp, STACK);
        world.registers.rax = round;
    }
}
