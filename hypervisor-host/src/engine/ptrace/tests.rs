//! Guests of a few instructions under the ptrace engine: mappings, exits, faults and kicks.

use janus_proto::abi::xen::Errno;

use super::*;
use crate::engine::Protection;
use crate::machine::ram::FIRST_FRAME;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;

fn guest(code: &[u8]) -> (PtraceVcpu, Registers, Arc<Ram>) {
    let ram = Arc::new(Ram::new(4).unwrap());
    let words = ram.words(FIRST_FRAME, 1).unwrap();
    assert!(crate::memory::copy_in(words, 0, code));
    let mut vcpu = PtraceVcpu::new(&ram, 1).unwrap().pop().unwrap();
    let protection = Protection { write: false, execute: true };
    vcpu.map(Mapping { address: CODE, frame: FIRST_FRAME, pages: 1, protection });
    let registers = Registers { rip: CODE, rflags: 0x202, ..Registers::default() };
    (vcpu, registers, ram)
}

#[test]
fn a_system_call_is_an_exit_and_is_not_made() {
    // mov $39 (getpid), %eax; syscall; ud2
    let (mut vcpu, mut registers, _) = guest(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b]);
    (registers.rdi, registers.gs_base) = (7, 0x1234_5000);
    assert_eq!(vcpu.run(&mut registers).unwrap(), Exit::Syscall);
    assert_eq!((registers.rax, registers.rip, registers.rdi), (39, CODE + 7, 7));
    assert_eq!(registers.gs_base, 0x1234_5000);
    registers.rax = u64::from(Errno::ENOSYS.0.cast_unsigned());
    let undefined = Exit::Fault(Fault { vector: 6, error: 0, address: 0 });
    assert_eq!(vcpu.run(&mut registers).unwrap(), undefined);
    assert_eq!(registers.rax, 38);
    assert!(vcpu.fpu().unwrap().len() >= 576);
}

#[test]
fn faults_say_what_they_were_and_go_away_with_a_page() {
    // mov %rax, (%rbx); mov (%rbx), %rcx; int $0x21
    let (mut vcpu, mut registers, ram) = guest(&[0x48, 0x89, 0x03, 0x48, 0x8b, 0x0b, 0xcd, 0x21]);
    (registers.rax, registers.rbx) = (77, DATA + 8);
    let fault = |error, address| Exit::Fault(Fault { vector: 14, error, address });
    assert_eq!(vcpu.run(&mut registers).unwrap(), fault(6, DATA + 8));
    let frame = Mfn(FIRST_FRAME.0 + 1);
    let mut mapping = Mapping {
        address: DATA,
        frame,
        pages: 1,
        protection: Protection { write: false, execute: false },
    };
    vcpu.map(mapping);
    assert_eq!(vcpu.run(&mut registers).unwrap(), fault(7, DATA + 8));
    mapping.protection.write = true;
    vcpu.map(mapping);
    let int = Exit::Fault(Fault { vector: 13, error: 0x21 << 3 | 2, address: 0 });
    assert_eq!(vcpu.run(&mut registers).unwrap(), int);
    assert_eq!(registers.rcx, 77);
    assert_eq!(ram.words(frame, 1).unwrap()[2].load(Ordering::SeqCst), 77);
    registers.rip = DATA;
    vcpu.unmap(DATA, 1);
    assert_eq!(vcpu.run(&mut registers).unwrap(), fault(0x14, DATA));
}

#[test]
fn a_guest_that_computes_is_kicked_timed_and_killed() {
    // 1: jmp 1b
    let (mut vcpu, mut registers, _) = guest(&[0xeb, 0xfe]);
    let kicker = vcpu.kicker();
    kicker.kick();
    assert_eq!(vcpu.run(&mut registers).unwrap(), Exit::Kicked);
    vcpu.set_deadline(Some(now() + 1_000_000));
    assert_eq!(vcpu.run(&mut registers).unwrap(), Exit::Kicked);
    kicker.kill();
    assert!(vcpu.run(&mut registers).is_err());
}
