//! Guests that try to reach the host. Each gets an exit instead, or its end.

use std::mem::offset_of;

use super::*;
use crate::engine::monitor::layout::OURS;

/// The stub's `syscall` instruction.
fn stub_system_call() -> u64 {
    stub::system_call() - 2
}

/// Goes to an address with these system call registers.
fn jump(to: u64, number: u64, arguments: [u64; 6]) -> (World, Exit) {
    let mut world = World::new(code!["syscall", "ud2"]);
    let [rdi, rsi, rdx, r10, r8, r9] = arguments;
    world.registers =
        Registers { rax: number, rdi, rsi, rdx, r10, r8, r9, rip: to, ..world.registers };
    let exit = world.run();
    (world, exit)
}

/// That a system call is told of, both by a guest's own instruction and by the stub's.
fn refused(number: i64, arguments: [u64; 6]) {
    for place in [CODE, stub_system_call()] {
        let (world, exit) = jump(place, number.cast_unsigned(), arguments);
        assert_eq!(exit, Exit::Syscall, "{number} at {place:#x}");
        // What the host would have returned is not there.
        assert_eq!(world.registers.rax, number.cast_unsigned());
    }
}

const RW: u64 = 3;
const RWX: u64 = 7;
const ANONYMOUS: u64 = 0x32; // private, fixed
const SHARED: u64 = 0x11;

#[test]
fn host_calls_do_not_reach_the_host() {
    refused(libc::SYS_getpid, [0; 6]);
    refused(libc::SYS_write, [1, CODE, 1, 0, 0, 0]);
    refused(libc::SYS_openat, [0; 6]);
    refused(libc::SYS_exit_group, [0; 6]);
    refused(libc::SYS_kill, [1, 0, 0, 0, 0, 0]);
    refused(libc::SYS_clone, [0; 6]);
    refused(libc::SYS_execveat, [3, CODE, 0, 0, 0, 0]);
    refused(libc::SYS_ftruncate, [3, 0, 0, 0, 0, 0]);
    refused(libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0, 8, 0, 0]);
    refused(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0, 0]);
    refused(libc::SYS_seccomp, [0; 6]);
    refused(libc::SYS_futex, [CODE, 0, 0, 0, 0, 0]);
    refused(libc::SYS_futex, [STUB + MAILBOX as u64, 3, 0, 0, 0, 0]);
    refused(libc::SYS_mremap, [CODE, 0x1000, 0x2000, 1, 0, 0]);
    refused(libc::SYS_madvise, [CODE, 0x1000, 9, 0, 0, 0]);
    refused(-1, [0; 6]);
}

#[test]
fn numbers_of_x32_do_not_reach_the_host() {
    refused(0x4000_0000 | libc::SYS_getpid, [0; 6]);
    refused(0x4000_0000 | libc::SYS_munmap, [DATA, 0x1000, 0, 0, 0, 0]);
}

#[test]
fn foreign_memory_cannot_be_mapped() {
    let file = RAM_FILE;
    refused(libc::SYS_mmap, [NOTHING, 0x1000, RWX, ANONYMOUS, u64::MAX, 0]);
    refused(libc::SYS_mmap, [0, 0x1000, RW, 0x1, file, 0]);
    refused(libc::SYS_mmap, [NOTHING, 0x1000, RW, SHARED, 0, 0]);
    refused(libc::SYS_mmap, [NOTHING, 0x1000, RW, SHARED | 0x20, file, 0]);
    refused(libc::SYS_mmap, [NOTHING, 0x1000, RW | 0x0100_0000, SHARED, file, 0]);
}
const RAM_FILE: u64 = 3;

#[test]
fn the_stub_and_the_mailbox_stay() {
    let mailbox = STUB + MAILBOX as u64;
    for address in
        [STUB, STUB + 0x1000, mailbox, mailbox + SIGNAL_STACK as u64, ABOVE, u64::MAX - 0xfff]
    {
        refused(libc::SYS_munmap, [address, 0x1000, 0, 0, 0, 0]);
        refused(libc::SYS_mprotect, [address, 0x1000, RWX, 0, 0, 0]);
        refused(libc::SYS_mmap, [address, 0x1000, RWX, SHARED, RAM_FILE, 0]);
    }
    for (address, length) in [
        (BOTTOM, STUB),
        (TOP, 2 << 32),
        (TOP - 0x1000, 4 << 32),
        (0, u64::MAX),
        (0x1000, u64::MAX - 0xfff),
        (0xffff_ffff_0000, 0xffff_0000_0000_0000),
    ] {
        refused(libc::SYS_munmap, [address, length, 0, 0, 0, 0]);
        refused(libc::SYS_mmap, [address, length, RWX, SHARED, RAM_FILE, 0]);
    }
    refused(libc::SYS_mprotect, [DATA, 0x1000, RWX, 0, 0, 0]);
}
const ABOVE: u64 = STUB + (1 << 32);

#[test]
fn calls_of_32_bits_do_not_reach_the_host() {
    // getpid and exit of i386
    for number in [20_u64, 1] {
        let mut world = World::new(code!["nop", "int 0x80", "ud2"]);
        world.registers.rax = number;
        assert_eq!(world.run(), fault(13, 0x402, 0));
        assert_eq!((world.registers.rip, world.registers.rax), (CODE + 1, number));
    }
    // The same from the middle of nowhere in the stub is not there to be found, and sysenter is no way either.
    let mut world = World::new(code!["sysenter", "ud2"]);
    assert!(matches!(world.run(), Exit::Fault(_)));
}

#[test]
fn the_vsyscall_page_does_not_reach_the_host() {
    let mut world = World::new(code!["mov rax, 0xffffffffff600400", "call rax", "ud2"]);
    // time() of the host, were it allowed; where the page does not exist it is a page fault.
    let exit = world.run();
    assert!(matches!(exit, Exit::Syscall | Exit::Fault(Fault { vector: 14, .. })), "{exit:?}");
}

/// A signal frame of `rt_sigreturn`, as a guest would forge it, from its context on.
fn forged(rip: u64, cs: u64, mask: u64, altstack_flags: u64) -> Vec<u8> {
    let mut words = vec![0_u64; 40];
    words[3] = altstack_flags; // uc_stack.ss_flags
    words[20] = STACK;
    words[21] = rip;
    words[22] = 0x202;
    words[23] = cs | 0x2b << 48;
    words[37] = mask;
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Returns from a signal that never was.
fn returns(frame: &[u8]) -> World {
    let mut world = World::new(code!["syscall", "ud2", "5: jmp 5b"]);
    put(&world.ram, 3, frame);
    world.registers.rax = libc::SYS_rt_sigreturn as u64;
    world.registers.rip = stub_system_call();
    world.registers.rsp = DATA;
    world
}

#[test]
fn a_forged_signal_frame_gives_nothing() {
    let mut world = returns(&forged(CODE + 2, 0x33, 0, 2));
    assert_eq!(world.run(), fault(6, 0, 0));
    assert_eq!(world.registers.rip, CODE + 2);
    // And now without an alternate stack.
    world.registers.rip = CODE;
    world.registers.rax = libc::SYS_getpid as u64;
    assert_eq!(world.run(), Exit::Syscall);
    // The selectors of the kernel are refused, or made harmless.
    for cs in [0x10, 0x08, 0x23] {
        let mut world = returns(&forged(CODE + 2, cs, 0, 2));
        let end = world.cpu.run(&mut world.registers);
        assert!(matches!(end, Ok(Exit::Fault(_)) | Err(EngineError::Ended(_))), "{cs:#x}: {end:?}");
    }
}

#[test]
fn a_guest_that_does_not_hear_kicks_is_killed() {
    let mut world = returns(&forged(CODE + 4, 0x33, u64::MAX, 2));
    world.cpu.patience = Duration::from_millis(300);
    // A kick that comes before the guest has gone deaf is heard; one of the next is not.
    let end = loop {
        world.cpu.set_deadline(Some(host::now() + 50_000_000));
        match world.cpu.run(&mut world.registers) {
            Ok(Exit::Kicked) => {}
            end => break end,
        }
    };
    assert!(matches!(end, Err(EngineError::Hung)), "{end:?}");
}

#[test]
fn lies_in_the_mailbox_are_noticed() {
    let mailbox = STUB + MAILBOX as u64;
    // Nobody's turn.
    let mut world = World::new(code!["mov dword ptr [rax], 7", "5: jmp 5b"]);
    world.registers.rax = mailbox;
    let end = world.cpu.run(&mut world.registers);
    assert!(matches!(end, Err(EngineError::Corrupt(_))), "{end:?}");
    // A reason that there is not, and vectors and bases that cannot be.
    for (offset, value, kind) in [
        (offset_of!(layout::Mailbox, kind), 77, 77),
        (offset_of!(layout::Mailbox, fs_base), 1 << 50, kind::HYPERCALL),
        (offset_of!(layout::Mailbox, trap), 256, kind::SIGNAL),
        (offset_of!(layout::Mailbox, trap), u64::MAX, kind::SIGNAL),
        (offset_of!(layout::Mailbox, ops), u64::MAX, kind::DONE),
    ] {
        let mut world = World::new(code![
            "mov [rbx], rcx",
            "mov [r8], r9",
            "mov [rdx], esi",
            "mov dword ptr [rax], 1",
            "5: jmp 5b"
        ]);
        assert_eq!(OURS, 1);
        world.registers.rax = mailbox;
        world.registers.rbx = mailbox + offset as u64;
        world.registers.rcx = value;
        world.registers.r8 = mailbox + offset_of!(layout::Mailbox, signal) as u64;
        world.registers.r9 = 11 | 1 << 32;
        world.registers.rdx = mailbox + offset_of!(layout::Mailbox, kind) as u64;
        world.registers.rsi = u64::from(kind);
        let end = world.cpu.run(&mut world.registers);
        assert!(matches!(end, Err(EngineError::Corrupt(_))), "{offset}: {end:?}");
    }
}

#[test]
fn a_lie_about_the_fpu_state_reads_nothing_else() {
    let mut world = World::new(code!["ud2"]);
    assert_eq!(world.run(), fault(6, 0, 0));
    for lie in [1, STUB, STUB + MAILBOX as u64, u64::MAX, STUB + (MAILBOX + FPU) as u64] {
        world.cpu.fpu_frame = lie;
        assert!(world.cpu.fpu().is_err());
    }
    let last = STUB + (MAILBOX + SIGNAL_STACK + SIGNAL_STACK_SIZE) as u64 - 1;
    world.cpu.fpu_frame = last;
    assert_eq!(world.cpu.fpu().unwrap().len(), 1);
}

#[test]
fn a_guest_that_breaks_its_stub_only_ends_itself() {
    // No stack for signals in sight, and no handler that could run.
    let mut world = returns(&forged(CODE + 2, 0x33, u64::MAX, 2));
    let end = world.cpu.run(&mut world.registers);
    assert!(matches!(end, Err(EngineError::Ended(_))), "{end:?}");
}

/// What the host says of a guest's process.
fn proc(world: &World, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{}/{file}", world.cpu.seat.child.pid())).unwrap()
}

#[test]
fn a_guests_process_has_one_file_no_rights_and_nothing_of_ours() {
    let mut world = World::new(code!["ud2"]);
    assert_eq!(world.run(), fault(6, 0, 0));
    let status = proc(&world, "status");
    for line in
        ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"]
    {
        // Tests may run as root: what root's process may do the filter forbids all the same.
        let is_capability = line.starts_with("Cap");
        assert!(
            status.contains(line) || is_capability && rustix::process::geteuid().is_root(),
            "{line} in {status}"
        );
    }
    let files: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", world.cpu.seat.child.pid()))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, ["3"]);
    for line in proc(&world, "maps").lines() {
        let known = ["memfd:guest", "memfd:janus-", "[vsyscall]"];
        assert!(known.iter().any(|name| line.contains(name)), "{line}");
    }
}

#[test]
fn every_place_in_the_stub_is_a_door_to_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let canary = folder.path().join("canary");
    std::fs::write(&canary, "sings").unwrap();
    let start = stub::gate();
    // `getpid`, `exit_group`, and what the stub itself calls: with registers that would do harm if they counted.
    let numbers = [libc::SYS_getpid, libc::SYS_exit_group, libc::SYS_mmap, libc::SYS_kill];
    for (offset, number) in (0..stub::code().len() as u64).step_by(11).zip(numbers.iter().cycle()) {
        let mut world = World::new(code!["ud2"]);
        world.cpu.patience = Duration::from_millis(30);
        let registers = &mut world.registers;
        (registers.rip, registers.rax) = (start + offset, number.cast_unsigned());
        (registers.rdi, registers.rsi, registers.rdx) = (STUB, 0x1000, RWX);
        (registers.r10, registers.r8, registers.r9) = (SHARED, RAM_FILE, 0);
        world.cpu.set_deadline(Some(host::now() + 20_000_000));
        // Whatever it is: an exit of the guest's, or its end.
        for _ in 0..4 {
            match world.cpu.run(&mut world.registers) {
                Ok(Exit::Kicked) => world.cpu.kicker().kick(),
                Ok(_) => {}
                // Killed, or caught lying: also about what the host had refused it.
                Err(_) => break,
            }
        }
    }
    assert_eq!(std::fs::read_to_string(&canary).unwrap(), "sings");
}
