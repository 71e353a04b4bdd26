//! What is printed of a guest that ended badly.

use std::path::Path;

use super::tail::Tail;
use crate::pv::domain::Ended;
use crate::pv::mm::space::SharedMemory;
use crate::pv::report::{CpuReport, Deed};
use crate::pv::space::Space as _;
use crate::symbols::Symbols;

/// Lines of the console that are shown.
const LINES: usize = 15;
/// Steps of a backtrace.
const DEPTH: usize = 32;

/// Prints a report for people.
pub(super) fn print(ended: &Ended, kernel: &Path, memory: &SharedMemory, tail: &Tail) {
    let symbols = std::fs::read(kernel).ok().and_then(|file| Symbols::read(&file));
    eprintln!("janus: how it ended: {:?}", ended.reason);
    for cpu in ended.report.iter().flat_map(|report| &report.cpus) {
        print_cpu(cpu, symbols.as_ref(), memory);
    }
    let text = tail.text();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default();
    eprintln!("  the last lines of its console:");
    for line in last {
        eprintln!("    | {}", line.trim_end());
    }
}

fn place(symbols: Option<&Symbols>, address: u64) -> String {
    let name = symbols.and_then(|symbols| symbols.name(address));
    name.map_or_else(|| format!("{address:#018x}"), |name| format!("{address:#018x} {name}"))
}

fn print_cpu(cpu: &CpuReport, symbols: Option<&Symbols>, memory: &SharedMemory) {
    let state = &cpu.state;
    let r = &state.registers;
    let mode = if state.kernel_mode { "kernel" } else { "user" };
    eprintln!("  CPU {} in {mode} mode at {}", cpu.vcpu, place(symbols, r.rip));
    if let Some(fault) = cpu.fault {
        let (vector, error, address) = (fault.vector, fault.error, fault.address);
        eprintln!("    exception {vector}, error code {error:#x}, address {address:#x}");
    }
    for row in [
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
        [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
        [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        [("flg", r.rflags), ("fs ", r.fs_base), ("gs ", r.gs_base), ("cr2", state.cr2)],
    ] {
        let row = row.map(|(name, value)| format!("{name} {value:016x}"));
        eprintln!("    {}", row.join("  "));
    }
    for step in &cpu.walk {
        let (level, table, index, entry) = (step.level, step.table.0, step.index, step.entry);
        eprintln!("    L{level} table in frame {table:#x}, entry {index}: {entry:#018x}");
    }
    eprintln!("    called from:");
    let mut frame = r.rbp;
    for _ in 0..DEPTH {
        let mut words = [0; 16];
        if frame == 0 || memory.read(cpu.vcpu, frame, &mut words).is_err() {
            break;
        }
        let (next, back) = words.split_at(8);
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        eprintln!("      {}", place(symbols, word(back)));
        // Frames lie above each other; anything else is no chain.
        if word(next) <= frame {
            break;
        }
        frame = word(next);
    }
    eprintln!("    the last it did:");
    for deed in &cpu.deeds {
        match deed {
            Deed::Hypercall(number, [first, second], answer) => {
                let name = crate::pv::hypercall::name(number.0);
                eprintln!("      {name}({first:#x}, {second:#x}, ..) = {answer}");
            }
            Deed::Fault(fault, at) => {
                let (vector, address) = (fault.vector, fault.address);
                eprintln!(
                    "      exception {vector} at {}, address {address:#x}",
                    place(symbols, *at)
                );
            }
            Deed::Upcall => eprintln!("      was told of events"),
            Deed::Blocked => eprintln!("      waited for events"),
        }
    }
}
