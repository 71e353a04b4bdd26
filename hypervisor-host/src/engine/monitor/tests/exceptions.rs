//! Each exception that user mode can raise, as the CPU tells of it.

use super::*;

/// Runs code that raises one exception, `offset` bytes behind its start.
fn raises(code: &[u8], expected: Exit, offset: u64) {
    let mut world = World::new(code);
    assert_eq!(world.run(), expected);
    assert_eq!(world.registers.rip, CODE + offset);
}

#[test]
fn divide_error() {
    raises(code!["xor edx, edx", "xor ecx, ecx", "div ecx"], fault(0, 0, 0), 4);
}

#[test]
fn breakpoint_and_overflow_are_traps() {
    raises(code!["int3"], fault(3, 0, 0), 1);
    raises(code!["int 4"], fault(4, 0, 0), 2);
}

#[test]
fn invalid_opcode() {
    raises(code!["nop", "ud2"], fault(6, 0, 0), 1);
}

#[test]
fn general_protection() {
    raises(code!["hlt"], fault(13, 0, 0), 0);
    raises(code!["cli"], fault(13, 0, 0), 0);
    raises(code!["mov rax, cr3"], fault(13, 0, 0), 0);
    raises(code!["int 0x21"], fault(13, 0x21 << 3 | 2, 0), 0);
    raises(code!["mov eax, 0xe02b", "mov ds, eax"], fault(13, 0xe028, 0), 5);
    raises(code!["movabs rax, 0x800000000000", "mov rax, [rax]"], fault(13, 0, 0), 10);
}

#[test]
fn stack_segment() {
    raises(code!["movabs rsp, 0x900000000000", "push rax"], fault(12, 0, 0), 10);
}

#[test]
fn page_faults() {
    raises(code!["mov rax, [0x500123]"], fault(14, 4, NOTHING + 0x123), 0);
    raises(code!["mov [0x500123], al"], fault(14, 6, NOTHING + 0x123), 0);
    // Bit 0 is set where the page was there: which it is, for the host, from the first access on.
    raises(code!["mov al, [0x300007]", "mov [0x300007], al"], fault(14, 7, PAGE + 7), 7);
    raises(code!["xor eax, eax", "mov al, [rax]"], fault(14, 4, 0), 2);
    let mut world = World::new(code!["mov eax, 0x500000", "jmp rax"]);
    assert_eq!(world.run(), fault(14, 0x14, NOTHING));
    assert_eq!(world.registers.rip, NOTHING);
    let mut world = World::new(code!["mov [0x400000], al", "mov eax, 0x400000", "jmp rax"]);
    assert_eq!(world.run(), fault(14, 0x15, DATA));
}

#[test]
fn kernel_addresses_fault_with_the_exact_address() {
    let address = 0xffff_8000_0000_1230;
    raises(code!["movabs rax, 0xffff800000001230", "mov rax, [rax]"], fault(14, 5, address), 10);
}

#[test]
fn floating_point_errors() {
    raises(
        code!["push 0x340", "fldcw [rsp]", "fldz", "fld1", "fdivrp", "fwait", "ud2"],
        fault(16, 0, 0),
        14,
    );
    raises(
        code!["push 0x1f00", "ldmxcsr [rsp]", "xorps xmm0, xmm0", "divss xmm0, xmm0"],
        fault(19, 0, 0),
        12,
    );
}

#[test]
fn alignment_check() {
    let mut world = World::new(code!["mov eax, [0x400001]"]);
    world.registers.rflags |= 1 << 18;
    // Linux itself may mend a split lock, but not a split load.
    assert_eq!(world.run(), fault(17, 0, 0));
    assert_ne!(world.registers.rflags & 1 << 18, 0);
    world.registers.rflags &= !(1 << 18);
    world.registers.rip = CODE;
    assert_ne!(world.run(), fault(17, 0, 0));
}

#[test]
fn a_stack_that_is_not_there_is_a_fault_at_the_gate() {
    // The gate's first instruction pops: a page fault that can be mended, like any other.
    let mut world = World::new(code!["ud2"]);
    (world.registers.rip, world.registers.rax) = (stub::gate(), 5);
    world.registers.rsp = NOTHING + 8;
    assert_eq!(world.run(), fault(14, 4, NOTHING + 8));
    put(&world.ram, 5, &[[0; 8], (CODE + 99).to_le_bytes()].concat());
    world.map(NOTHING, 5, "rw");
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!((world.registers.rax, world.registers.rip), (5, CODE + 99));
}

#[test]
fn a_return_to_nowhere_is_the_guests_fault() {
    for first in [false, true] {
        let mut world = World::new(code!["mov eax, 0x300000", "call rax"]);
        if !first {
            assert_eq!(world.run(), Exit::Hypercall);
        }
        world.registers.rip = 1 << 60;
        assert_eq!(world.run(), fault(13, 0, 0));
        assert_eq!(world.registers.rip, 1 << 60);
        world.registers.rip = CODE;
        assert_eq!(world.run(), Exit::Hypercall);
    }
}
