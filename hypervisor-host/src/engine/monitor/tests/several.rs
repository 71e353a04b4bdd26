//! Several virtual CPUs at once: what one does to the others, and what it must not.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

use super::*;

const ENDLESS: &[u8] = &[0xeb, 0xfe];

#[test]
fn cpus_that_unmap_from_each_other_do_not_wait_for_each_other() {
    // Each touches its own page for ever, which the other takes away all the time.
    const ROUNDS: u32 = 200;
    let code = code!["5: inc qword ptr [rdi]", "jmp 5b"];
    let worlds = several(code, 2);
    std::thread::scope(|scope| {
        for (own, mut world) in (0_u64..).zip(worlds) {
            scope.spawn(move || {
                let page = |cpu: u64| NOTHING + cpu * 0x1000;
                world.registers.rdi = page(own);
                for _ in 0..ROUNDS {
                    world.map(page(own), 8 + own, "rw");
                    // The other may have stopped for good: this one then waits for no fault of its own.
                    world.cpu.set_deadline(Some(host::now() + 20_000_000));
                    match world.run() {
                        Exit::Fault(Fault { vector: 14, error: 6, address }) => {
                            assert_eq!(address, page(own));
                        }
                        Exit::Kicked => {}
                        other => panic!("{other:?}"),
                    }
                    world.cpu.unmap(page(1 - own), 1);
                }
            });
        }
    });
}

#[test]
fn a_cpu_that_computes_does_not_hold_up_the_kicks_of_others() {
    let mut worlds = several(ENDLESS, 3);
    let kickers: Vec<_> = worlds.iter().map(|world| world.cpu.kicker()).collect();
    let (mut third, mut second, mut first) = (worlds.remove(2), worlds.remove(1), worlds.remove(0));
    std::thread::scope(|scope| {
        let computing = scope.spawn(move || first.run());
        for _ in 0..50 {
            kickers[1].kick();
            assert_eq!(second.run(), Exit::Kicked);
            kickers[2].kick();
            assert_eq!(third.run(), Exit::Kicked);
        }
        assert!(!computing.is_finished());
        kickers[0].kick();
        assert_eq!(computing.join().unwrap(), Exit::Kicked);
    });
}

#[test]
fn all_cpus_can_be_killed_while_they_run() {
    let worlds = several(ENDLESS, 4);
    let kickers: Vec<_> = worlds.iter().map(|world| world.cpu.kicker()).collect();
    std::thread::scope(|scope| {
        let runners: Vec<_> = worlds
            .into_iter()
            .map(|mut world| scope.spawn(move || world.cpu.run(&mut world.registers)))
            .collect();
        kickers.iter().for_each(|kicker| kicker.kill());
        for runner in runners {
            let end = runner.join().unwrap();
            assert!(matches!(end, Err(EngineError::Ended(libc::SIGKILL))), "{end:?}");
        }
    });
}

#[test]
fn a_cpu_can_go_while_others_unmap() {
    for _ in 0..10 {
        let mut worlds = several(ENDLESS, 2);
        let (mut second, mut first) = (worlds.remove(1), worlds.remove(0));
        let kicker = second.cpu.kicker();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let _ = second.cpu.run(&mut second.registers);
            });
            scope.spawn(move || kicker.kill());
            for _ in 0..50 {
                first.cpu.unmap(NOTHING, 1);
            }
        });
    }
}

#[test]
fn each_cpu_keeps_its_own_vectors_and_bases() {
    const CALLS: u64 = 1000;
    let worlds = several(
        code![
            "movq xmm0, rbx",
            "movq xmm15, rbx",
            "5: mov eax, 0x300000 + 17 * 32",
            "call rax",
            "movq rcx, xmm0",
            "movq rdx, xmm15",
            "rdgsbase rsi",
            "cmp rcx, rbx",
            "jne 6f",
            "cmp rdx, rbx",
            "jne 6f",
            "cmp rsi, rbx",
            "je 5b",
            "6: ud2",
        ],
        2,
    );
    let kickers: Vec<_> = worlds.iter().map(|world| world.cpu.kicker()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let runners: Vec<_> = (1_u64..)
            .zip(worlds)
            .map(|(number, mut world)| {
                scope.spawn(move || {
                    (world.registers.rbx, world.registers.gs_base) = (number << 20, number << 20);
                    // Their stacks are one frame: each has its half.
                    world.registers.rsp -= (number - 1) * 0x800;
                    let mut calls = 0;
                    while calls < CALLS {
                        match world.run() {
                            Exit::Hypercall => calls += 1,
                            Exit::Kicked => {}
                            other => return Some(other),
                        }
                    }
                    None
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(SeqCst) {
                kickers.iter().for_each(|kicker| kicker.kick());
                std::thread::yield_now();
            }
        });
        let ends: Vec<_> = runners.into_iter().map(|runner| runner.join()).collect();
        // Lets the other thread go, whatever happened.
        done.store(true, SeqCst);
        for end in ends {
            assert_eq!(end.unwrap(), None);
        }
    });
}

#[test]
fn a_cpu_that_does_not_run_remembers_little() {
    let mut queue = queue::Queue::default();
    for page in 0..100_000 {
        let address = DATA + page * 0x2000;
        queue.push(Change { address, length: 0x1000, protection: UNMAP, offset: 0 });
    }
    let world = World::new(ENDLESS);
    let mut count = 0;
    loop {
        let (taken, all) = queue.take(world.cpu.seat.mailbox());
        assert!(count != 0 || taken[0] == EVERYTHING, "what was forgotten is gone all the same");
        count += taken.len();
        if all {
            break;
        }
    }
    assert!(count <= 2000, "{count} changes");
    world.cpu.seat.mailbox().ops.store(0, Relaxed);
}
