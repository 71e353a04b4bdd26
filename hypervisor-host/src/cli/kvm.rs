//! `janus run --engine kvm`: one guest of KVM on this terminal.

use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use janus_proto::abi::xen::sched::ShutdownReason;

use super::options::RunArguments;
use super::outcome::{CRASHED, Cut, LEFT, LOST, REBOOT, TIMEOUT};
use super::tail::{Out, Tail};
use super::terminal;
use crate::guest::{self, Description, NetworkKind, virtio};
use crate::host::{Endpoint, Image};
use crate::kvm::{Config, DomainEnd, End, KvmGuest, probe};
use crate::usernet::UserNet;
use crate::virtio::Model;
use crate::virtio::rng::Rng;

/// The mark of this project's codes on the exit device, and the code in it.
const EXIT_MARK: u8 = 0x10;
const EXIT_CODE: u8 = 0x0f;

/// From start to end, once.
pub(super) fn once(arguments: &RunArguments, description: &Description) -> Result<u8, String> {
    let config = Config {
        device: probe::DEVICE.into(),
        kernel: description.kernel.clone(),
        module: description.module.clone(),
        command_line: description.command_line.clone(),
        memory_mib: description.memory_mib,
        huge_pages: arguments.hugepages,
        vcpus: description.vcpus,
        door: arguments.door.into(),
        xen: arguments.xen.then(guest::uuid),
    };
    let disks: Result<Vec<_>, _> = description.disks.iter().map(guest::image).collect();
    let mut disks = disks.map_err(|error| error.to_string())?;
    let (models, mut networks) = if arguments.xen {
        (Vec::new(), Vec::new())
    } else {
        models(description, std::mem::take(&mut disks))?
    };
    let tail = Tail::default();
    let guest = KvmGuest::new(&config, models, Box::new(Out(tail.clone())));
    let guest = Arc::new(guest.map_err(|error| error.to_string())?);
    let surroundings = match guest.domain() {
        None => None,
        Some((domain, rings)) => {
            let hypervisor = tail.clone();
            domain.set_debug_output(Box::new(move |bytes| {
                let _ = Out(hypervisor.clone()).write_all(bytes);
            }));
            let console = vec![Endpoint::Writer(Box::new(Out(tail.clone())))];
            let surroundings = guest::surround(domain, description, rings, disks, console);
            let (host, of_xen) = surroundings.map_err(|error| error.to_string())?;
            networks = of_xen;
            Some(host)
        }
    };
    for (publish, address) in networks.iter().flat_map(UserNet::published) {
        let (transport, port) = (publish.transport, publish.guest_port);
        eprintln!("janus: {address} leads to the guest's {transport} port {port}");
    }
    guest.run().map_err(|error| error.to_string())?;
    let cut = Arc::new(Mutex::new(None));
    let end = {
        let (cut, guest) = (Arc::clone(&cut), Arc::clone(&guest));
        move |why| {
            cut.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
            guest.destroy();
        }
    };
    let (typed, console) =
        (Arc::clone(&guest), surroundings.as_ref().map(|host| host.console().clone()));
    let type_bytes = move |bytes: &[u8]| match &console {
        Some(console) => console.type_bytes(bytes),
        None => typed.type_bytes(bytes),
    };
    let terminal = terminal::attach(type_bytes, end.clone());
    if let Some(time) = arguments.timeout {
        super::outcome::end_after(time, move || end(Cut::Timeout))?;
    }
    let ended = guest.wait();
    if let Some(host) = &surroundings {
        host.console().close();
    }
    drop(terminal);
    if arguments.stat {
        eprintln!("{:<24} {:>10}", "exit", "count");
        for (name, count) in guest.exits().list() {
            eprintln!("{name:<24} {count:>10}");
        }
    }
    let cut = *cut.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(code_of(&ended, cut, &tail, arguments.timeout))
}

/// virtio devices, in the order in which the guest finds them.
type Models = Vec<Box<dyn Model>>;

/// The virtio devices of a guest, and the networks of its cards.
fn models(description: &Description, images: Vec<Image>) -> Result<(Models, Vec<UserNet>), String> {
    let mut models = Models::new();
    let mut networks = Vec::new();
    for (disk, image) in description.disks.iter().zip(images) {
        models.push(virtio::disk_model(disk, image, description.vcpus));
    }
    let uuid = guest::uuid();
    for (handle, card) in (0u32..).zip(&description.networks) {
        let config = match &card.kind {
            NetworkKind::User(config) => config,
            NetworkKind::Tap(name) => {
                return Err(format!(
                    "--net tap:{name} needs --xen on this engine, or use --net user"
                ));
            }
        };
        let mac = card.mac.unwrap_or_else(|| guest::own_mac(uuid, handle));
        let (model, network) =
            virtio::card_model(mac, config).map_err(|error| error.to_string())?;
        models.push(model);
        networks.push(network);
    }
    models.push(Box::new(Rng::new().map_err(|error| format!("/dev/urandom: {error}"))?));
    Ok((models, networks))
}

/// The exit code of a run, whose unexpected ends are told of here.
fn code_of(ended: &End, cut: Option<Cut>, tail: &Tail, timeout: Option<Duration>) -> u8 {
    let reported = tail.reported_exit();
    match (ended, cut) {
        (End::PowerOff, _) => reported.unwrap_or(0),
        (End::Xen(DomainEnd::Shutdown(reason)), _) => match *reason {
            ShutdownReason::POWEROFF | ShutdownReason::SUSPEND => reported.unwrap_or(0),
            ShutdownReason::REBOOT => REBOOT,
            _ => reported.filter(|code| *code != 0).unwrap_or(CRASHED),
        },
        (End::Exit(value), _) if value & !EXIT_CODE == EXIT_MARK => {
            // There is room for small codes only; the report has all of it.
            let code = value & EXIT_CODE;
            reported.filter(|reported| (*reported).min(EXIT_CODE) == code).unwrap_or(code)
        }
        (End::Reset, _) => REBOOT,
        (End::Destroyed, Some(Cut::Timeout)) => {
            eprintln!("janus: the guest was ended after {:?}", timeout.unwrap_or_default());
            TIMEOUT
        }
        (End::Destroyed, Some(Cut::Left)) => LEFT,
        (End::Exit(_) | End::Panicked | End::TripleFault(_) | End::Xen(_), _) => {
            eprintln!("janus: the guest crashed: {ended}");
            reported.filter(|code| *code != 0).unwrap_or(CRASHED)
        }
        (End::Lost(_) | End::Destroyed, _) => {
            eprintln!("janus: {ended}");
            LOST
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_code() {
        let tail = Tail::default();
        for (end, cut, code) in [
            (End::PowerOff, None, 0),
            (End::Exit(0x13), None, 3),
            (End::Exit(0x55), None, CRASHED),
            (End::Reset, None, REBOOT),
            (End::Xen(DomainEnd::Shutdown(ShutdownReason::POWEROFF)), None, 0),
            (End::Xen(DomainEnd::Shutdown(ShutdownReason::CRASH)), None, CRASHED),
            (End::Panicked, None, CRASHED),
            (End::TripleFault(0x1000), None, CRASHED),
            (End::Lost("x".into()), None, LOST),
            (End::Destroyed, Some(Cut::Left), LEFT),
            (End::Destroyed, Some(Cut::Timeout), TIMEOUT),
        ] {
            assert_eq!(code_of(&end, cut, &tail, None), code, "{end:?}");
        }
        let _ = Out(tail.clone()).write_all(b"janus-report: {\"exit\":127}\n");
        assert_eq!(code_of(&End::Exit(0x1f), None, &tail, None), 127);
        assert_eq!(code_of(&End::PowerOff, None, &tail, None), 127);
    }
}
