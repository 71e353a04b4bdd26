//! Kicks, deadlines, and the ends of guests.

use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use super::*;

const ENDLESS: &[u8] = &[0xeb, 0xfe];

#[test]
fn a_kick_ends_an_endless_loop() {
    let mut world = World::new(ENDLESS);
    let kicker = world.cpu.kicker();
    std::thread::scope(|scope| {
        scope.spawn(|| kicker.kick());
        assert_eq!(world.run(), Exit::Kicked);
    });
    assert_eq!(world.registers.rip, CODE);
}

#[test]
fn a_deadline_ends_an_endless_loop() {
    let mut world = World::new(ENDLESS);
    world.cpu.set_deadline(Some(host::now() + 2_000_000));
    assert_eq!(world.run(), Exit::Kicked);
    assert_eq!(world.run(), Exit::Kicked); // it has passed
    world.cpu.set_deadline(Some(host::now() + 2_000_000));
    assert_eq!(world.run(), Exit::Kicked);
}

#[test]
fn no_kick_is_lost() {
    // One hypercall, and then for ever: each round needs its kick.
    let mut world = World::new(code!["5: mov eax, 0x300000", "call rax", "inc rbx", "6: jmp 6b"]);
    let start = world.registers;
    let kicker = world.cpu.kicker();
    let (asked, seen) = (AtomicU64::new(0), AtomicU64::new(0));
    const ROUNDS: u64 = 3000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                for _ in 0..round * 7919 % 2000 {
                    std::hint::spin_loop();
                }
                asked.store(round, SeqCst);
                kicker.kick();
                while seen.load(SeqCst) < round {
                    std::thread::yield_now();
                }
            }
        });
        let mut calls = 0;
        let wrong = loop {
            let exit = world.cpu.run(&mut world.registers);
            let now = asked.load(SeqCst);
            seen.store(now, SeqCst);
            match exit {
                Ok(Exit::Hypercall) if world.registers.rip == PAGE + BEHIND => calls += 1,
                Ok(Exit::Kicked) if now == ROUNDS => break None,
                Ok(Exit::Kicked) => {
                    if world.registers.rbx != 0 {
                        world.registers = Registers { rbx: 0, ..start };
                    }
                }
                other => break Some(other),
            }
        };
        // Lets the other thread go, whatever happened.
        seen.store(u64::MAX, SeqCst);
        assert!(wrong.is_none() && calls > 0, "{wrong:?} after {calls} calls");
    });
}

#[test]
fn a_kicked_guest_goes_on_where_it_was() {
    // Counts its own calls; kicks must neither repeat nor lose one.
    let mut world = World::new(code!["5: inc rbx", "mov eax, 0x300000", "call rax", "jmp 5b"]);
    let kicker = world.cpu.kicker();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(SeqCst) {
                kicker.kick();
                std::thread::yield_now();
            }
        });
        let mut calls = 0;
        let wrong = loop {
            match world.cpu.run(&mut world.registers) {
                Ok(Exit::Hypercall) if calls == 5000 => break None,
                Ok(Exit::Hypercall) if world.registers.rbx == calls + 1 => {
                    calls += 1;
                    world.registers.rax = calls ^ 0x5555;
                }
                Ok(Exit::Kicked) => {}
                other => break Some(other),
            }
        };
        // Lets the other thread go, whatever happened.
        done.store(true, SeqCst);
        assert!(wrong.is_none(), "{wrong:?} at {:?} after {calls} calls", world.registers);
    });
}

#[test]
fn a_killed_guest_says_so() {
    let mut world = World::new(ENDLESS);
    let kicker = world.cpu.kicker();
    std::thread::scope(|scope| {
        scope.spawn(|| kicker.kill());
        let end = world.cpu.run(&mut world.registers).unwrap_err();
        assert!(matches!(end, EngineError::Ended(libc::SIGKILL)), "{end}");
    });
    assert!(world.cpu.run(&mut world.registers).is_err());
}

fn exists(pid: i32) -> bool {
    std::fs::exists(format!("/proc/{pid}")).unwrap()
}

#[test]
fn a_dropped_guest_leaves_no_zombie() {
    let mut world = World::new(code!["syscall"]);
    assert_eq!(world.run(), Exit::Syscall);
    let pid = world.cpu.seat.child.pid();
    let kicker = world.cpu.kicker();
    assert!(exists(pid));
    drop(world);
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) }, -1);
    kicker.kick();
    kicker.kill();
    let world = World::new(code!["syscall"]);
    drop(world); // one that never ran
}

#[test]
fn guests_end_with_the_process_that_made_them() {
    // This test again, in a process of its own, which shows its guest and waits to be killed.
    const HOLD: &str = "JANUS_TEST_HOLDS_A_GUEST";
    if std::env::var_os(HOLD).is_some() {
        let mut world = World::new(code!["syscall", "5: jmp 5b"]);
        assert_eq!(world.run(), Exit::Syscall);
        println!("guest={}", world.cpu.seat.child.pid());
        let _ = world.run();
        return;
    }
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "engine::monitor::tests::life::guests_end_with_the_process_that_made_them",
        ])
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = io::BufReader::new(holder.stdout.take().unwrap());
    let guest = io::BufRead::lines(output)
        .map_while(Result::ok)
        .find_map(|line| line.split_once("guest=").and_then(|(_, pid)| pid.trim().parse().ok()))
        .unwrap();
    assert!(exists(guest));
    holder.kill().unwrap();
    holder.wait().unwrap();
    // Its end may take a while, but needs nobody.
    for _ in 0..3000 {
        let stat = std::fs::read_to_string(format!("/proc/{guest}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") || stat.contains(") X ") {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the guest is still there");
}

#[test]
fn guests_outlive_the_thread_that_made_them() {
    let mut world =
        std::thread::spawn(|| World::new(code!["5: syscall", "jmp 5b"])).join().unwrap();
    assert_eq!(world.run(), Exit::Syscall);
    let mut world = std::thread::spawn(move || {
        assert_eq!(world.run(), Exit::Syscall);
        world
    })
    .join()
    .unwrap();
    assert_eq!(world.run(), Exit::Syscall);
}
