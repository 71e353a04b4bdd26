//! The address space: what is mapped is there, and nothing else.

use std::sync::atomic::Ordering::SeqCst;

use super::*;

#[test]
fn what_is_taken_out_is_gone_and_what_replaces_it_is_seen() {
    let mut world = World::new(code!["5:", "mov rbx, [0x400000]", "syscall", "jmp 5b"]);
    put(&world.ram, 3, &[3; 8]);
    put(&world.ram, 7, &[7; 8]);
    assert_eq!(world.run(), Exit::Syscall);
    assert_eq!(world.registers.rbx, 0x0303_0303_0303_0303);
    world.map(DATA, 7, "r");
    assert_eq!(world.run(), Exit::Syscall);
    assert_eq!(world.registers.rbx, 0x0707_0707_0707_0707);
    world.cpu.unmap(DATA, 1);
    assert_eq!(world.run(), fault(14, 4, DATA));
    world.map(DATA, 3, "r");
    assert_eq!(world.run(), Exit::Syscall);
    assert_eq!(world.registers.rbx, 0x0303_0303_0303_0303);
    world.cpu.unmap_all();
    assert_eq!(world.run(), fault(14, 0x14, world.registers.rip));
}

#[test]
fn an_address_space_goes_with_its_root() {
    let mut world = World::new(code!["5:", "syscall", "jmp 5b"]);
    world.cpu.switch(Mfn(1));
    assert_eq!(world.run(), Exit::Syscall);
    world.cpu.switch(Mfn(1));
    assert_eq!(world.run(), Exit::Syscall);
    world.cpu.switch(Mfn(2));
    assert_eq!(world.run(), fault(14, 0x14, CODE + 2));
}

#[test]
fn more_changes_than_one_turn_takes() {
    let mut world = World::new(code![
        "mov ecx, 600",
        "mov edi, 0x1000000",
        "5: mov qword ptr [rdi], rcx",
        "add rdi, 0x2000",
        "dec ecx",
        "jnz 5b",
        "syscall",
    ]);
    for page in 0..600 {
        world.map(0x100_0000 + page * 0x2000, 8 + page * 3, "rw");
    }
    assert_eq!(world.run(), Exit::Syscall);
    let last = world.ram.frame(Mfn(FIRST_FRAME.0 + 8 + 599 * 3)).unwrap();
    assert_eq!(last[0].load(Relaxed), 1);
}

#[test]
fn nonsense_is_not_mapped() {
    let mut world = World::new(code!["syscall"]);
    let protection = Protection { write: true, execute: true };
    let frame = FIRST_FRAME;
    for (address, frame, pages) in [
        (0, frame, 1),
        (DATA + 1, frame, 1),
        (TOP, frame, 1),
        (TOP - 0x1000, frame, 2),
        (STUB, frame, 1),
        (STUB + MAILBOX as u64, frame, 1),
        (u64::MAX - 0xfff, frame, 1),
        (DATA, Mfn(0), 1),
        (DATA, Mfn(frame.0 + 4096), 1),
        (DATA, frame, 4097),
        (DATA, frame, usize::MAX),
        (DATA, frame, 0),
    ] {
        world.cpu.map(Mapping { address, frame, pages, protection });
    }
    world.cpu.unmap(STUB, 1 << 40);
    world.cpu.unmap(u64::MAX, usize::MAX);
    assert_eq!(world.run(), Exit::Syscall);
}

#[test]
fn the_highest_page_is_the_guests() {
    let mut world = World::new(code!["movabs rax, 0x7ff7fffffff8", "mov [rax], rax", "syscall"]);
    world.map(TOP - 0x1000, 9, "rw");
    assert_eq!(world.run(), Exit::Syscall);
    world.registers.rip = CODE;
    world.cpu.unmap(TOP - 0x1000, 1);
    assert_eq!(world.run(), fault(14, 6, TOP - 8));
}

#[test]
fn pages_are_taken_from_other_cpus_while_they_run() {
    for _ in 0..20 {
        let mut worlds = several(code!["5: inc qword ptr [0x400000]", "jmp 5b"], 2);
        let (mut second, mut first) = (worlds.remove(1), worlds.remove(0));
        std::thread::scope(|scope| {
            let runner = scope.spawn(move || {
                let exit = second.run();
                (exit, second)
            });
            while first.data(0).load(SeqCst) < 1000 {
                std::thread::yield_now();
            }
            first.cpu.unmap(DATA, 1);
            let count = first.data(0).load(SeqCst);
            let (exit, _second) = runner.join().unwrap();
            assert_eq!(exit, fault(14, 6, DATA));
            assert_eq!(first.data(0).load(SeqCst), count);
        });
    }
}

#[test]
fn more_mappings_than_the_host_has_are_evicted() {
    // Every second page of a range, each its own mapping: more of them than vm.max_map_count.
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: u64 = limit.trim().parse().unwrap();
    if limit > 200_000 {
        // A host that is set up for more has the same code, and the test would take minutes.
        return;
    }
    let mut world = World::new(code!["5:", "syscall", "jmp 5b"]);
    for page in 0..limit + 10 {
        world.map(0x1_0000_0000 + page * 0x2000, 8 + page % 4000, "rw");
    }
    // The code was taken out with the rest, and is mapped again on demand.
    let mut exit = world.run();
    if exit == fault(14, 0x14, world.registers.rip) {
        world.map(CODE, 0, "rx");
        exit = world.run();
    }
    assert_eq!(exit, Exit::Syscall);
}
