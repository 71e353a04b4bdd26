//! The command line `janus`.

mod crash;
mod describe;
mod doctor;
mod engine;
mod kvm;
mod options;
mod outcome;
mod qemu;
mod run;
mod tail;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs guests as ordinary processes: those of Xen PV without Xen, KVM or root, and others where there is KVM.
#[derive(Debug, Parser)]
#[command(name = "janus", version, about, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<options::RunArguments>),
    Doctor(doctor::DoctorArguments),
}

/// What the exit codes mean.
const EXIT_CODES: &str = "\
Exit codes of `run`:
  the guest's own  if it reported one (a line `janus-report: {\"exit\":N}` on its console)
  0    it powered off
  2    the command line, a file or the host prevented the start
  6    it crashed, or did what no guest survives
  7    it asked for a reboot, and --no-reboot was given
  124  it was ended after --timeout
  125  the engine lost it
  130  it was left with Ctrl-]";

/// Does what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    // The sooner, the better is the first rate of the guest's clock, and the less is waited for it.
    crate::pv::timers::begin();
    match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
    }
}
