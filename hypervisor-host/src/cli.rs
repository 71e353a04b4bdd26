//! The command line `janus`.

mod config;
mod console;
mod crash;
mod describe;
mod detach;
mod doctor;
mod engine;
mod guests;
mod helper;
mod kvm;
mod options;
mod outcome;
mod qemu;
mod run;
mod signals;
mod table;
mod tail;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::control::protocol::Request;

/// Runs guests as ordinary processes: those of Xen PV without Xen, KVM or root, and others where there is KVM.
#[derive(Debug, Parser)]
#[command(name = "janus", version, about, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(after_help = EXIT_CODES)]
    Run(Box<options::RunArguments>),
    Doctor(doctor::DoctorArguments),
    Ls(guests::List),
    /// Attaches this terminal to a guest's console; Ctrl-] leaves it.
    Console(guests::Named),
    Stop(guests::Stop),
    /// Ends a guest as it is.
    Kill(guests::Named),
    /// Asks a guest to reboot.
    Reboot(guests::Named),
    /// Stops a guest's CPUs.
    Pause(guests::Named),
    /// Lets a paused guest go on.
    Resume(guests::Named),
    Memory(guests::Memory),
    Stat(guests::Statistics),
    Wait(guests::Wait),
    /// Prints what happens to a guest as JSON lines, until it ends.
    Events(guests::Named),
}

/// What the exit codes mean.
const EXIT_CODES: &str = "\
Exit codes of `run` and `wait`:
  the guest's own  if it reported one (a line `janus-report: {\"exit\":N}` on its console)
  0    it powered off
  2    the command line, a file or the host prevented the start
  6    it crashed, or did what no guest survives
  7    it asked for a reboot, and --no-reboot or --on-reboot destroy was given
  124  it was ended after --timeout
  125  the engine lost it
  130  it was left with Ctrl-]
  137  it was ended by `janus kill`
  128+N  this process was ended by signal N, and the guest with it
Other commands end with 0, or with 2 and a line that says why not.";

/// The command line, with what `--config` adds to it.
fn arguments() -> Result<Arguments, String> {
    let line: Vec<OsString> = std::env::args_os().collect();
    let parsed = Arguments::parse_from(&line);
    let Command::Run(run) = &parsed.command else { return Ok(parsed) };
    let Some(file) = &run.config else { return Ok(parsed) };
    let configuration = crate::config::read(file).map_err(|error| error.to_string())?;
    // The process in the background need not say it again.
    for (line, remark) in configuration.remarks.iter().filter(|_| !detach::is_detached()) {
        eprintln!("janus: {}:{line}: {remark}", file.display());
    }
    let mut whole = Arguments::command();
    whole.build();
    let command = whole.find_subcommand("run").ok_or("no command `run`")?.clone();
    let given = whole.get_matches_from(&line);
    let given = given.subcommand_matches("run").ok_or("no command `run`")?;
    let added =
        config::words(&configuration, &command, given).map_err(|error| error.to_string())?;
    // Behind the command's name, which comes first: the program has no options of its own.
    let (head, tail) = line.split_at(2.min(line.len()));
    let all = head.iter().chain(&added).chain(tail);
    let matches = Arguments::command().get_matches_from(all);
    Arguments::from_arg_matches(&matches).map_err(|error| error.to_string())
}

/// Does what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    // The sooner, the better is the first rate of the guest's clock, and the less is waited for it.
    crate::pv::timers::begin();
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => return guests::code(Err(error)),
    };
    guests::code(match arguments.command {
        Command::Run(arguments) => return run::run(&arguments),
        Command::Doctor(arguments) => return doctor::run(&arguments),
        Command::Ls(list) => list.run(),
        Command::Console(guest) => console::attach(&guest),
        Command::Stop(stop) => stop.run(),
        Command::Kill(guest) => guests::kill(&guest),
        Command::Reboot(guest) => guests::simple(&guest, &Request::Reboot),
        Command::Pause(guest) => guests::simple(&guest, &Request::Pause),
        Command::Resume(guest) => guests::simple(&guest, &Request::Resume),
        Command::Memory(memory) => memory.run(),
        Command::Stat(stat) => stat.run(),
        Command::Wait(wait) => wait.run(),
        Command::Events(guest) => guests::events(&guest),
    })
}
