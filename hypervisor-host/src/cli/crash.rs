//! What is printed and written of a guest that ended badly.

use super::options::RunArguments;
use super::tail::Tail;
use crate::guest::{Description, Guest};
use crate::postmortem;
use crate::pv::domain::Ended;
use crate::pv::report::CpuReport;

/// Where the CPUs of a guest are that does not end by itself; they stand still from here on.
pub(super) fn stopped(guest: &Guest) -> Vec<CpuReport> {
    let domain = &guest.domain;
    domain.pause();
    let cpu = |vcpu| {
        let state = domain.registers(vcpu, |state| *state).filter(|_| domain.is_up(vcpu))?;
        let walk = domain.walk(vcpu, state.registers.rip);
        Some(CpuReport { vcpu, state, walk, ..CpuReport::default() })
    };
    (0..domain.vcpu_count()).filter_map(cpu).collect()
}

/// Tells what a guest was doing.
pub(super) fn report(
    ended: &Ended,
    stopped: &[CpuReport],
    guest: &Guest,
    description: &Description,
    tail: &Tail,
    arguments: &RunArguments,
) {
    let report =
        postmortem::report(ended, stopped, &description.kernel, &guest.memory, &tail.text());
    eprint!("{}", report.text());
    if let Some(file) = &arguments.crash_report
        && let Err(error) = std::fs::write(file, report.json() + "\n")
    {
        eprintln!("janus: --crash-report {}: {error}", file.display());
    }
}
