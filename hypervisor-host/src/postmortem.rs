//! What is told of a guest that ended badly: which rule was broken and what to look at, where every CPU was and how it
//! got there, the page tables' entries, the last events, the last words. As text for people, and as JSON.

mod places;
mod words;

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use self::places::{Place, Places};
use crate::pv::domain::Ended;
use crate::pv::mm::space::SharedMemory;
use crate::pv::report::{CpuReport, Deed};
use crate::pv::space::Space as _;

/// The version of the JSON.
const VERSION: u32 = 1;
/// Lines of the console that are shown.
const LINES: usize = 15;
/// Steps of a backtrace.
const DEPTH: usize = 32;

/// A report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    version: u32,
    /// How it ended.
    reason: String,
    /// The rule that was broken.
    rule: String,
    /// What to look at.
    advice: String,
    kernel: String,
    /// The CPU that ended it.
    vcpu: Option<usize>,
    cpus: Vec<Cpu>,
    ports: Vec<String>,
    /// The last lines of the console.
    console: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Cpu {
    vcpu: usize,
    mode: &'static str,
    registers: Vec<(&'static str, String)>,
    fault: Option<Fault>,
    walk: Vec<Step>,
    backtrace: Vec<Place>,
    /// The last it did, oldest first.
    events: Vec<String>,
    /// Bytes at the instruction pointer.
    code: String,
    /// Words from the stack pointer upwards.
    stack: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Fault {
    vector: u8,
    name: &'static str,
    error: u32,
    address: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Step {
    level: u8,
    table: String,
    index: u16,
    entry: String,
    flags: String,
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// Puts a report together. `cpus` are the CPUs of a guest that was stopped and has no report of its own.
#[must_use]
pub fn report(
    ended: &Ended,
    cpus: &[CpuReport],
    kernel: &Path,
    memory: &SharedMemory,
    console: &str,
) -> Report {
    let places = Places::new(kernel);
    let own = ended.report.iter().flat_map(|report| &report.cpus);
    let cpus: Vec<Cpu> = own.chain(cpus).map(|cpu| self::cpu(cpu, &places, memory)).collect();
    let ports = ended.report.iter().flat_map(|report| &report.ports);
    let culprit = ended.report.iter().flat_map(|report| &report.cpus);
    let culprit = culprit.into_iter().find(|cpu| Some(cpu.vcpu) == ended.vcpu);
    let (rule, advice) = words::explain(&ended.reason, culprit);
    let lines: Vec<&str> = console.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default();
    Report {
        version: VERSION,
        reason: words::reason(&ended.reason),
        rule,
        advice,
        kernel: kernel.display().to_string(),
        vcpu: ended.vcpu,
        cpus,
        ports: ports
            .map(|(port, status)| {
                format!(
                    "port {port}: {:?}, vCPU {}, remote {}:{}",
                    status.status, status.vcpu, status.remote, status.remote_port
                )
            })
            .collect(),
        console: last.iter().map(|line| line.trim_end().to_owned()).collect(),
    }
}

fn cpu(cpu: &CpuReport, places: &Places, memory: &SharedMemory) -> Cpu {
    let state = &cpu.state;
    let r = &state.registers;
    let registers = [
        ("rip", r.rip),
        ("rax", r.rax),
        ("rbx", r.rbx),
        ("rcx", r.rcx),
        ("rdx", r.rdx),
        ("rsi", r.rsi),
        ("rdi", r.rdi),
        ("rbp", r.rbp),
        ("rsp", r.rsp),
        ("r8", r.r8),
        ("r9", r.r9),
        ("r10", r.r10),
        ("r11", r.r11),
        ("r12", r.r12),
        ("r13", r.r13),
        ("r14", r.r14),
        ("r15", r.r15),
        ("rflags", r.rflags),
        ("fs_base", r.fs_base),
        ("gs_base", r.gs_base),
        ("cr2", state.cr2),
    ];
    Cpu {
        vcpu: cpu.vcpu,
        mode: if state.kernel_mode { "kernel" } else { "user" },
        registers: registers.map(|(name, value)| (name, hex(value))).to_vec(),
        fault: cpu.fault.map(|fault| Fault {
            vector: fault.vector,
            name: words::exception(fault.vector),
            error: fault.error,
            address: hex(fault.address),
        }),
        walk: cpu
            .walk
            .iter()
            .map(|step| Step {
                level: step.level,
                table: hex(step.table.0),
                index: step.index,
                entry: format!("{:#018x}", step.entry),
                flags: words::entry(step.entry),
            })
            .collect(),
        backtrace: backtrace(cpu, places, memory),
        events: cpu.deeds.iter().map(|deed| self::deed(deed, places)).collect(),
        code: cpu.code.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "),
        stack: cpu.stack.iter().map(|word| format!("{word:#018x}")).collect(),
    }
}

/// Where it is, and from where it came: frames by frame pointers, and what was inlined in each.
fn backtrace(cpu: &CpuReport, places: &Places, memory: &SharedMemory) -> Vec<Place> {
    let mut found = places.at(cpu.state.registers.rip, false);
    let mut frame = cpu.state.registers.rbp;
    for _ in 0..DEPTH {
        let mut words = [0; 16];
        if frame == 0 || memory.read(cpu.vcpu, frame, &mut words).is_err() {
            break;
        }
        let (next, back) = words.split_at(8);
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        if word(back) == 0 {
            break;
        }
        found.extend(places.at(word(back), true));
        // Frames lie above each other; anything else is no chain.
        if word(next) <= frame {
            break;
        }
        frame = word(next);
    }
    found
}

fn deed(deed: &Deed, places: &Places) -> String {
    match deed {
        Deed::Hypercall(number, [first, second], answer) => {
            let name = crate::pv::hypercall::name(number.0);
            format!("{name}({first:#x}, {second:#x}, ..) = {answer}")
        }
        Deed::Fault(fault, at) => {
            let name = words::exception(fault.vector);
            let place = places.at(*at, false).first().map(Place::to_string).unwrap_or_default();
            format!("exception {} ({name}) at {place}, address {:#x}", fault.vector, fault.address)
        }
        Deed::Upcall => "was told of events".into(),
        Deed::Blocked => "waited for events".into(),
    }
}

impl Report {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!(
            "janus: how it ended: {}\n  the rule: {}\n  look at:  {}\n",
            self.reason, self.rule, self.advice
        );
        for cpu in &self.cpus {
            cpu.write(&mut text);
        }
        text.push_str("  the last lines of its console:\n");
        for line in &self.console {
            let _ = writeln!(text, "    | {line}");
        }
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> String {
        // Nothing in it can fail: no map has other keys than texts.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

impl Cpu {
    fn write(&self, text: &mut String) {
        let place = self.backtrace.first().map(Place::to_string).unwrap_or_default();
        let _ = writeln!(text, "  CPU {} in {} mode at {place}", self.vcpu, self.mode);
        if let Some(fault) = &self.fault {
            let Fault { vector, name, error, address } = fault;
            let _ = writeln!(
                text,
                "    exception {vector} ({name}), error code {error:#x}, address {address}"
            );
        }
        for row in self.registers.chunks(4) {
            let row: Vec<String> =
                row.iter().map(|(name, value)| format!("{name:<7} {:>18}", value)).collect();
            let _ = writeln!(text, "    {}", row.join("  "));
        }
        for Step { level, table, index, entry, flags } in &self.walk {
            let _ = writeln!(
                text,
                "    L{level} table in frame {table}, entry {index}: {entry} {flags}"
            );
        }
        if !self.code.is_empty() {
            let _ = writeln!(text, "    code: {}", self.code);
        }
        let _ = writeln!(text, "    backtrace:");
        for place in &self.backtrace {
            let _ = writeln!(text, "      {place}");
        }
        if !self.events.is_empty() {
            let _ = writeln!(text, "    the last it did:");
        }
        for event in &self.events {
            let _ = writeln!(text, "      {event}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Fault as EngineFault;
    use crate::pv::domain::EndReason;
    use crate::pv::mm::{Memory, Size};
    use crate::pv::report::{Cause, Report as Data, WalkStep};
    use janus_proto::addr::Mfn;

    #[test]
    fn a_report_says_which_rule_was_broken_in_text_and_json() {
        let memory = Memory::new(Size { pages: 16, max_pages: 16, vcpus: 1 }).unwrap();
        let memory = SharedMemory::new(memory);
        let fault = EngineFault { vector: 14, error: 2, address: 0x1234 };
        let cpu = CpuReport {
            fault: Some(fault),
            walk: vec![WalkStep { level: 4, table: Mfn(7), index: 3, entry: 0 }],
            deeds: vec![Deed::Blocked, Deed::Upcall],
            code: vec![0x0f, 0x0b],
            ..CpuReport::default()
        };
        let data = Data { cpus: vec![cpu], ports: Vec::new() };
        let ended = Ended {
            reason: EndReason::Crashed(Cause::NoHandler(fault)),
            vcpu: Some(0),
            report: Some(Box::new(data)),
        };
        let report = report(&ended, &[], Path::new("/nonexistent"), &memory, "one\ntwo\n");
        let text = report.text();
        for part in [
            "no handler",
            "set_trap_table",
            "page fault",
            "0x1234",
            "not present",
            "0f 0b",
            "| two",
            "waited for events",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["cpus"][0]["fault"]["vector"], 14);
        assert_eq!(json["cpus"][0]["events"][1], "was told of events");
        assert_eq!(json["console"][0], "one");
    }
}
