//! `janus run`: one guest on this terminal.

use std::io::{IsTerminal as _, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::xen::sched::ShutdownReason;

use super::describe::describe;
use super::engine::{Choice, Engine, choose};
use super::options::RunArguments;
use super::outcome::{Cut, REBOOT, USAGE, code_of};
use super::tail::{Out, Tail};
use super::{crash, kvm, qemu, terminal};
use crate::guest::{Description, Guest, GuestError};
use crate::kvm::probe;
use crate::pv::domain::EndReason;

pub(super) fn run(arguments: &RunArguments) -> ExitCode {
    let description = match describe(arguments) {
        Ok(description) => description,
        Err(error) => {
            eprintln!("janus: {error}");
            return ExitCode::from(USAGE);
        }
    };
    let Choice { engine, reason } =
        choose(arguments.engine, || probe::probe(Path::new(probe::DEVICE)));
    if let Some(reason) = reason {
        eprintln!("janus: {} runs on {reason}", description.name);
    }
    loop {
        let ended = match engine {
            Engine::Monitor => once(arguments, &description).map_err(|error| error.to_string()),
            Engine::Kvm => kvm::once(arguments, &description),
            Engine::Qemu { kvm } => qemu::once(arguments, &description, kvm),
        };
        match ended {
            Ok(REBOOT) if !arguments.no_reboot => {
                eprintln!("janus: {} starts again", description.name)
            }
            Ok(code) => return ExitCode::from(code),
            Err(error) => {
                eprintln!("janus: {error}");
                return ExitCode::from(USAGE);
            }
        }
    }
}

/// From start to end, once.
fn once(arguments: &RunArguments, description: &Description) -> Result<u8, GuestError> {
    let tail = Tail::default();
    let guest = Guest::start(description, Box::new(Out(tail.clone())))?;
    let hypervisor = tail.clone();
    guest.domain.set_debug_output(Box::new(move |bytes| {
        let _ = Out(hypervisor.clone()).write_all(bytes);
    }));
    for network in guest.networks() {
        for (publish, address) in network.published() {
            eprintln!(
                "janus: {address} leads to the guest's {} port {}",
                publish.transport, publish.guest_port
            );
        }
    }
    let cut = Arc::new(Mutex::new(None));
    let end = {
        let (cut, domain) = (cut.clone(), guest.domain.clone());
        move |why| {
            cut.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
            domain.destroy();
        }
    };
    let terminal = {
        let console = guest.host.console().clone();
        terminal::attach(move |bytes| console.type_bytes(bytes), end.clone())
    };
    if let Some(time) = arguments.timeout {
        let watch = move || {
            std::thread::sleep(time);
            end(Cut::Timeout);
        };
        std::thread::Builder::new()
            .name("timeout".into())
            .spawn(watch)
            .map_err(GuestError::Thread)?;
    }
    let ended = guest.run();
    drop(terminal);
    let cut = *cut.lock().unwrap_or_else(PoisonError::into_inner);
    if arguments.stat {
        print_stats(&guest);
    }
    let code = code_of(&ended, cut, &tail, arguments.timeout);
    if !matches!(ended.reason, EndReason::Shutdown(reason) if reason != ShutdownReason::CRASH)
        && cut != Some(Cut::Left)
    {
        crash::print(&ended, &description.kernel, &guest.memory, &tail);
    }
    Ok(code)
}

fn print_stats(guest: &Guest) {
    let mut stats = guest.domain.stats();
    stats.calls.sort_by_key(|call| std::cmp::Reverse(call.calls));
    eprintln!("{:<24} {:>10} {:>14}", "hypercall", "calls", "ticks each");
    for call in &stats.calls {
        eprintln!("{:<24} {:>10} {:>14}", call.name(), call.calls, call.ticks / call.calls.max(1));
    }
    eprintln!("{:<24} {:>10}", "(unknown)", stats.unknown_calls);
    eprintln!("{:<24} {:>10}", "(events from the host)", stats.notifications);
    // Whoever reads it wants it whole, also when the output is a pipe.
    if !std::io::stderr().is_terminal() {
        let _ = std::io::stderr().flush();
    }
}
