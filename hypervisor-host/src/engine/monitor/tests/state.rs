//! The state of the CPU, across each way out.

use super::*;

/// Distinct values everywhere.
fn pattern(seed: u64, rip: u64) -> Registers {
    let value = |index: u64| (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Registers {
        r15: value(0),
        r14: value(1),
        r13: value(2),
        r12: value(3),
        rbp: value(4),
        rbx: value(5),
        r11: value(6),
        r10: value(7),
        r9: value(8),
        r8: value(9),
        rax: value(10),
        rcx: value(11),
        rdx: value(12),
        rsi: value(13),
        rdi: value(14),
        rip,
        rflags: 0x202 | value(15) & 0x8d5,
        rsp: STACK - (seed & 0x3f) * 8,
        fs_base: value(16) >> 20,
        gs_base: (value(17) >> 20) | 0xffff_8000_0000_0000,
    }
}

#[test]
fn a_hypercall_comes_and_goes() {
    let mut world = World::new(code!["5:", "mov eax, 0x300000 + 17 * 32", "call rax", "jmp 5b"]);
    for round in 0..100 {
        assert_eq!(world.run(), Exit::Hypercall);
        assert_eq!((world.registers.rax, world.registers.rip), (17, PAGE + 17 * 32 + BEHIND));
        assert_eq!(world.registers.rsp, STACK - 24);
        world.registers.rax = round;
    }
}

#[test]
fn what_a_hypercall_returns_is_seen() {
    let mut world = World::new(code![
        "mov eax, 0x300000 + 12 * 32",
        "call rax",
        "mov [0x400000], rax",
        "mov [0x400008], rdi",
        "syscall"
    ]);
    assert_eq!(world.run(), Exit::Hypercall);
    (world.registers.rax, world.registers.rdi) = (0x1234_5678_9abc, u64::MAX);
    assert_eq!(world.run(), Exit::Syscall);
    let data = [0, 1].map(|index| world.data(index).load(Relaxed));
    assert_eq!(data, [0x1234_5678_9abc, u64::MAX]);
}

#[test]
fn all_registers_survive_each_pair_of_ways() {
    // The entry of call 3, and an exception.
    let mut world = World::new(code!["ud2"]);
    let gate = PAGE + 3 * 32;
    for seed in 0..40 {
        // Each follows each.
        let rip = if seed & 3 == 0 || seed & 3 == 3 { gate } else { CODE };
        let before = pattern(seed, rip);
        world.registers = before;
        if rip == gate {
            assert_eq!(world.run(), Exit::Hypercall);
            let expected = Registers {
                rax: 3,
                rcx: world.registers.rcx,
                r11: world.registers.r11,
                rip: gate + BEHIND,
                rsp: before.rsp - 16,
                ..before
            };
            assert_eq!(world.registers, expected);
            let stack = world.ram.frame(Mfn(FIRST_FRAME.0 + 2)).unwrap();
            let at = usize::try_from(expected.rsp % 0x1000 / 8).unwrap();
            let kept = [at, at + 1].map(|index| stack[index].load(Relaxed));
            assert_eq!(kept, [before.r11, before.rcx]);
        } else {
            assert_eq!(world.run(), fault(6, 0, 0));
            // The CPU sets RF in what it pushes of a fault.
            world.registers.rflags &= !0x1_0000;
            assert_eq!(world.registers, before);
        }
    }
}

#[test]
fn a_raw_system_call_is_an_exit() {
    let mut world = World::new(code!["mov eax, 39", "syscall", "jmp 2b"]);
    for _ in 0..3 {
        assert_eq!(world.run(), Exit::Syscall);
        assert_eq!((world.registers.rax, world.registers.rip), (39, CODE + 7));
    }
}

#[test]
fn iret_has_its_frame_on_the_stack() {
    let mut world =
        World::new(code!["mov ecx, 3", "mov r11d, 11", "mov eax, 0x300000 + 23 * 32", "jmp rax"]);
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!((world.registers.rax, world.registers.rsp), (23, STACK - 24));
    let stack = world.ram.frame(Mfn(FIRST_FRAME.0 + 2)).unwrap();
    let pushed = [509, 510, 511].map(|index: usize| stack[index].load(Relaxed));
    assert_eq!(pushed, [PAGE + 23 * 32, 11, 3]);
}

#[test]
fn single_steps_are_the_guests() {
    let mut world = World::new(code!["nop", "nop", "ud2"]);
    world.registers.rflags |= 0x100;
    for step in 1..=2 {
        let Exit::Fault(Fault { vector: 1, .. }) = world.run() else {
            panic!("no debug exception")
        };
        assert_eq!(world.registers.rip, CODE + step);
    }
}

#[test]
fn segment_bases_are_the_guests_and_must_be_canonical() {
    let mut world = World::new(code![
        "rdfsbase rbx",
        "rdgsbase rcx",
        "mov eax, 0x77000",
        "wrfsbase rax",
        "syscall"
    ]);
    (world.registers.fs_base, world.registers.gs_base) = (0x1234_5678, 0xffff_8000_0000_0010);
    assert_eq!(world.run(), Exit::Syscall);
    let registers = world.registers;
    assert_eq!((registers.rbx, registers.fs_base), (0x1234_5678, 0x7_7000));
    assert_eq!(registers.gs_base, 0xffff_8000_0000_0010);
    world.registers.fs_base = 1 << 47;
    assert!(world.cpu.run(&mut world.registers).is_err());
}

/// The first vector register of an XSAVE area, and its upper half.
fn vector(state: &[u8]) -> (&[u8], &[u8]) {
    (&state[160..176], &state[576..592])
}

#[test]
fn the_fpu_state_survives_each_way() {
    let mut world = World::new(code![
        "movups xmm0, [0x400000]",
        "movups xmm15, [0x400010]",
        "ldmxcsr [0x400020]",
        "fld1",
        "mov eax, 0x300000 + 1 * 32", // each way out
        "call rax",
        "ud2",
        "syscall",
        "5: cmp byte ptr [0x400030], 0",
        "je 5b",
        "movups [0x400040], xmm0", // and what is left after that
        "movups [0x400050], xmm15",
        "stmxcsr [0x400060]",
        "fstp qword ptr [0x400068]",
        "syscall",
    ]);
    for index in 0..4 {
        world.data(index).store(0x1111_2222_3333_4444 * (index as u64 + 1), Relaxed);
    }
    world.data(4).store(0x9fc0, Relaxed);
    let mut known = Vec::new();
    for index in 0..2 {
        known.extend(world.data(index).load(Relaxed).to_le_bytes());
    }
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!(vector(&world.cpu.fpu().unwrap()).0, known);
    assert_eq!(world.run(), fault(6, 0, 0));
    assert_eq!(vector(&world.cpu.fpu().unwrap()).0, known);
    world.registers.rip += 2;
    assert_eq!(world.run(), Exit::Syscall);
    world.cpu.kicker().kick();
    assert_eq!(world.run(), Exit::Kicked);
    world.cpu.set_deadline(Some(host::now() + 1));
    assert_eq!(world.run(), Exit::Kicked);
    world.cpu.set_deadline(None);
    world.data(6).store(1, Relaxed);
    assert_eq!(world.run(), Exit::Syscall);
    for index in 0..4 {
        assert_eq!(world.data(8 + index).load(Relaxed), world.data(index).load(Relaxed));
    }
    assert_eq!(world.data(12).load(Relaxed) & 0xffff_ffff, 0x9fc0);
    assert_eq!(f64::from_bits(world.data(13).load(Relaxed)), 1.0);
}

#[test]
fn the_upper_halves_of_vectors_survive() {
    if !std::arch::is_x86_feature_detected!("avx") {
        // Without them there is nothing to lose; that the CPU agrees is all to be seen here.
        assert_eq!(World::new(code!["vzeroupper"]).run(), fault(6, 0, 0));
        return;
    }
    let mut world = World::new(code![
        "vmovups ymm0, [0x400000]",
        "mov eax, 0x300000 + 1 * 32",
        "call rax",
        "ud2",
        "vmovups [0x400040], ymm0",
        "syscall",
    ]);
    for index in 0..4 {
        world.data(index).store(0x0123_4567_89ab_cdef * (index as u64 + 1), Relaxed);
    }
    let mut upper = Vec::new();
    for index in 2..4 {
        upper.extend(world.data(index).load(Relaxed).to_le_bytes());
    }
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!(vector(&world.cpu.fpu().unwrap()).1, upper);
    assert_eq!(world.run(), fault(6, 0, 0));
    assert_eq!(vector(&world.cpu.fpu().unwrap()).1, upper);
    world.registers.rip += 2;
    assert_eq!(world.run(), Exit::Syscall);
    for index in 0..4 {
        assert_eq!(world.data(8 + index).load(Relaxed), world.data(index).load(Relaxed));
    }
}

/// A guest whose `vcpu_info` is at the start of its data page.
fn with_info(code: &[u8]) -> World {
    let mut world = World::new(code);
    world.cpu.show_info(Some((FIRST_FRAME.0 + 3) * PAGE_SIZE as u64 + 64));
    world
}

/// `evtchn_upcall_pending` and, in the next byte, `evtchn_upcall_mask` of [`with_info`].
fn flags(world: &World) -> &std::sync::atomic::AtomicU64 {
    world.data(8)
}

#[test]
fn the_version_is_answered_on_the_spot_unless_an_event_waits() {
    let mut world = with_info(code![
        "5:",
        "xor edi, edi",
        "mov eax, 0x300000 + 17 * 32",
        "call rax",
        "mov [0x400000], rax",
        "mov edi, 1",
        "mov eax, 0x300000 + 17 * 32",
        "call rax",
        "jmp 5b"
    ]);
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!(world.registers.rdi, 1, "another question than that for the version");
    assert_eq!(world.data(0).load(Relaxed), u64::from(crate::pv::version::VERSION));
    assert_eq!(world.registers.rsp, STACK - 24);
    flags(&world).store(1, Relaxed);
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!((world.registers.rax, world.registers.rdi), (17, 0));
    flags(&world).store(0, Relaxed);
    world.cpu.show_info(None);
    world.registers.rip = CODE;
    world.registers.rsp = STACK;
    assert_eq!(world.run(), Exit::Hypercall);
    assert_eq!(world.registers.rdi, 0);
}

#[test]
fn a_return_into_the_kernel_needs_nobody_unless_an_event_waits() {
    // `struct iret_context`, without the three registers that the page's entry pushes.
    let mut world = with_info(code![
        "mov rbx, rsp",
        "push 0xe02b",
        "push rbx",
        "push 0x202",
        "lea rax, [rip + 5f]",
        "push 0xe030",
        "push rax",
        "push 0",
        "mov eax, 0x1111",
        "mov ecx, 0x2222",
        "mov r11d, 0x3333",
        "push 0x300000 + 23 * 32",
        "ret",
        "5:",
        "mov [0x400000], rax",
        "mov [0x400008], rcx",
        "mov [0x400010], r11",
        "syscall"
    ]);
    flags(&world).store(1 << 8, Relaxed);
    let start = world.registers;
    assert_eq!(world.run(), Exit::Syscall);
    assert_eq!(flags(&world).load(Relaxed), 0, "events are let in");
    let seen = [0, 1, 2].map(|index| world.data(index).load(Relaxed));
    assert_eq!((seen, world.registers.rsp), ([0x1111, 0x2222, 0x3333], STACK));

    // With an event that waits, or to another code segment, it is a hypercall.
    for (pending, shown) in [(1_u64, true), (0, false)] {
        world.registers = start;
        flags(&world).store(1 << 8 | pending, Relaxed);
        if !shown {
            world.cpu.show_info(None);
        }
        assert_eq!(world.run(), Exit::Hypercall);
        assert_eq!(world.registers.rax, 23);
        assert_eq!(flags(&world).load(Relaxed), 1 << 8 | pending, "nothing has changed");
    }
}
