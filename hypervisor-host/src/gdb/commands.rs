//! `monitor` commands: what gdb does not know of a Xen guest.

use std::fmt::Write as _;

use super::debuggee::Debuggee;

const HELP: &str = "\
monitor ports          event channels and what they are bound to
monitor grants         grants that the host uses
monitor calls          hypercalls so far
monitor walk ADDRESS   the page tables' entries for an address (CPU 0's tables; add a CPU's number)
monitor cpus           virtual CPUs, their mode and page tables
";

/// Does one, and answers what it prints.
pub(super) fn run(debuggee: &Debuggee, command: &str) -> String {
    let mut words = command.split_whitespace();
    let domain = &debuggee.domain;
    let mut text = String::new();
    match (words.next(), words.next(), words.next()) {
        (None | Some("help"), ..) => text.push_str(HELP),
        (Some("ports"), ..) => {
            for (port, status) in domain.events().ports() {
                let (kind, vcpu) = (status.status, status.vcpu);
                let (remote, remote_port) = (status.remote, status.remote_port);
                let _ = writeln!(
                    text,
                    "port {port}: {kind:?}, vCPU {vcpu}, remote {remote}:{remote_port}"
                );
            }
        }
        (Some("grants"), ..) => {
            let pins = domain.grants_in_use();
            let _ = writeln!(text, "{} grants in use", pins.len());
            for (reference, frame, readers, writers) in pins {
                let _ = writeln!(
                    text,
                    "reference {}: frame {:#x}, {readers} readers, {writers} writers",
                    reference.0, frame.0
                );
            }
        }
        (Some("calls"), ..) => {
            for call in domain.stats().calls {
                let ns = domain.nanoseconds(call.ticks);
                let _ =
                    writeln!(text, "{:<24} {:>10} calls {:>12} ns", call.name(), call.calls, ns);
            }
        }
        (Some("walk"), Some(address), cpu) => {
            let digits = address.strip_prefix("0x").unwrap_or(address);
            let cpu = cpu.map_or(Some(0), |cpu| cpu.parse().ok());
            let known = |cpu: &usize| *cpu < domain.vcpu_count();
            match (u64::from_str_radix(digits, 16), cpu.filter(known)) {
                (Ok(address), Some(cpu)) => {
                    for step in domain.walk(cpu, address) {
                        let (level, table, index) = (step.level, step.table.0, step.index);
                        let _ = writeln!(
                            text,
                            "L{level} table in frame {table:#x}, entry {index}: {:#018x}",
                            step.entry
                        );
                    }
                }
                _ => text.push_str("monitor walk ADDRESS [CPU], the address in hexadecimal\n"),
            }
        }
        (Some("cpus"), ..) => {
            for cpu in 0..domain.vcpu_count() {
                let _ = match debuggee.state(cpu).filter(|_| domain.is_up(cpu)) {
                    Some(state) => writeln!(
                        text,
                        "vCPU {cpu}: {} mode, rip {:#x}, fs base {:#x}, gs base {:#x}",
                        if state.kernel_mode { "kernel" } else { "user" },
                        state.registers.rip,
                        state.registers.fs_base,
                        state.registers.gs_base,
                    ),
                    None => writeln!(text, "vCPU {cpu}: down"),
                };
            }
        }
        (Some(other), ..) => {
            let _ = writeln!(text, "`{other}` is no command of this monitor:\n{HELP}");
        }
    }
    text
}
