//! What the monitor's ways in and out cost on this machine: medians over batches, in nanoseconds.
//!
//! `cargo run --profile vmm -p janus --example monitor_cost`

use std::sync::Arc;
use std::time::Instant;

use janus::engine::monitor::{Monitor, MonitorVcpu};
use janus::engine::{EngineError, Exit, Mapping, Protection, Registers, Vcpu};
use janus::machine::ram::{FIRST_FRAME, Ram};
use janus_proto::addr::Mfn;

const CODE: u64 = 0x10_0000;
const PAGE: u64 = 0x30_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x100_0000;

/// `5: mov $entry, %eax; call *%rax; jmp 5b`
const CALLS: &[u8] = &[0xb8, 0x20, 0x00, 0x30, 0x00, 0xff, 0xd0, 0xeb, 0xf7];
/// `5: syscall; jmp 5b`
const SYSCALLS: &[u8] = &[0x0f, 0x05, 0xeb, 0xfc];
/// `5: ud2; jmp 5b`
const UD2: &[u8] = &[0x0f, 0x0b, 0xeb, 0xfc];
/// `5: mov %rbx, (%rbx); add $0x1000, %rbx; jmp 5b`
const TOUCHES: &[u8] = &[0x48, 0x89, 0x1b, 0x48, 0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, 0xeb, 0xf4];

fn start(code: &[u8]) -> Result<(MonitorVcpu, Registers), EngineError> {
    let ram = Arc::new(Ram::new(16384).map_err(EngineError::Host)?);
    for (frame, bytes) in [(0, code), (1, &Monitor::hypercall_page()[..])] {
        let words = ram.words(Mfn(FIRST_FRAME.0 + frame), 1).unwrap_or_default();
        for (word, chunk) in words.iter().zip(bytes.chunks(4)) {
            let mut value = [0; 4];
            value.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            word.store(u32::from_le_bytes(value), std::sync::atomic::Ordering::Relaxed);
        }
    }
    let mut cpus = Monitor::new(ram, 1)?;
    let mut cpu = cpus.remove(0);
    for (address, frame, write) in [(CODE, 0, false), (PAGE, 1, false), (STACK - 0x1000, 2, true)] {
        map(&mut cpu, address, frame, 1, write);
    }
    let registers =
        Registers { rip: CODE, rsp: STACK, rflags: 2, rbx: DATA, ..Registers::default() };
    Ok((cpu, registers))
}

fn map(cpu: &mut MonitorVcpu, address: u64, frame: u64, pages: usize, write: bool) {
    let protection = Protection { write, execute: !write };
    cpu.map(Mapping { address, frame: Mfn(FIRST_FRAME.0 + frame), pages, protection });
}

/// The median and the best of 101 batches.
fn report(name: &str, count: u32, mut batch: impl FnMut(u32)) {
    let mut times: Vec<_> = (0..101)
        .map(|_| {
            let begin = Instant::now();
            batch(count);
            begin.elapsed().as_nanos() / u128::from(count)
        })
        .collect();
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or(0);
    println!("{name:44} {:8} ns (best {})", at(50), at(0));
}

fn trips(
    name: &str,
    code: &[u8],
    skip: u64,
    expected: fn(&Exit) -> bool,
) -> Result<(), EngineError> {
    let (mut cpu, mut registers) = start(code)?;
    report(name, 1000, |count| {
        for _ in 0..count {
            let exit = cpu.run(&mut registers);
            assert!(exit.as_ref().is_ok_and(expected), "{exit:?}");
            registers.rip += skip;
        }
    });
    Ok(())
}

fn main() -> Result<(), EngineError> {
    trips("hypercall by the page", CALLS, 0, |exit| *exit == Exit::Hypercall)?;
    trips("hypercall by `syscall`", SYSCALLS, 0, |exit| *exit == Exit::Syscall)?;
    trips("invalid opcode", UD2, 2, |exit| matches!(exit, Exit::Fault(_)))?;

    for around in [1_u8, 16] {
        let (mut cpu, mut registers) = start(TOUCHES)?;
        let mut frame = 16;
        report(&format!("touch a new page, {around} mapped at a time"), 112, |count| {
            for _ in 0..count / u32::from(around) {
                let exit = cpu.run(&mut registers);
                assert!(matches!(exit, Ok(Exit::Fault(_))), "{exit:?}");
                map(&mut cpu, registers.rbx, frame, around.into(), true);
                frame += u64::from(around);
            }
        });
    }
    let (mut cpu, mut registers) = start(TOUCHES)?;
    report("touch a page, unmapped again, one mapping", 1000, |count| {
        for _ in 0..count {
            registers.rbx = DATA;
            map(&mut cpu, DATA, 16, 1, true);
            let _ = cpu.run(&mut registers);
            cpu.unmap(DATA, 1);
        }
    });
    report("start, one hypercall, end", 1, |_| {
        let first = start(CALLS);
        let ran = first.and_then(|(mut cpu, mut registers)| cpu.run(&mut registers));
        assert!(ran.is_ok());
    });
    Ok(())
}
