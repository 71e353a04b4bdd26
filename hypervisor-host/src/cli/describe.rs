//! From the command line to the description of a guest.

use std::path::Path;

use super::detach;
use super::options::RunArguments;
use crate::guest::{Bus, Card, Description, NetworkKind, VirtioDevices};
use crate::host::Reach;
use crate::usernet::Config;

/// The guest that was asked for.
pub(super) fn describe(arguments: &RunArguments) -> Result<Description, String> {
    let missing = "no kernel: `janus run IMAGE`, or a file with `image` for --config";
    let kernel = arguments.image.clone().ok_or(missing)?;
    if let Some(most) = arguments.max_memory.filter(|most| *most < arguments.memory) {
        return Err(format!("--max-memory {most}M is less than --memory {}M", arguments.memory));
    }
    let name = arguments.name.clone().or_else(detach::name).unwrap_or_else(|| own_name(&kernel));
    let mut command_line = arguments.append.clone();
    if let Some(commands) = &arguments.exec {
        command_line = format!("{command_line} {}", exec_words(commands)?);
    }
    let mut networks = arguments.net.clone();
    if !arguments.publish.is_empty() {
        let user = |card: &&mut Card| matches!(card.kind, NetworkKind::User(_));
        if networks.iter_mut().find(user).is_none() {
            networks.push(Card {
                kind: NetworkKind::User(Config::default()),
                mac: None,
                bus: Bus::default(),
            });
        }
        if let Some(Card { kind: NetworkKind::User(config), .. }) = networks.iter_mut().find(user) {
            config.publish.clone_from(&arguments.publish);
        }
    }
    let mut disks = arguments.disk.clone();
    if arguments.virtio {
        networks.iter_mut().for_each(|card| card.bus = Bus::Virtio);
        disks.iter_mut().for_each(|disk| disk.bus = Bus::Virtio);
    }
    let reach = if arguments.virtio_grants { Reach::Grants } else { Reach::Machine };
    let virtio = VirtioDevices {
        reach,
        rng: arguments.rng,
        balloon: arguments.balloon,
        consoles: arguments.virtio_console.clone(),
    };
    Ok(Description {
        name,
        kernel,
        module: arguments.initrd.clone(),
        command_line: command_line.trim().to_owned(),
        memory_mib: arguments.memory,
        max_memory_mib: arguments.max_memory.unwrap_or(0),
        uuid: arguments.uuid,
        vcpus: arguments.cpus,
        disks,
        networks,
        virtio,
        store_socket: arguments.xenstore.clone(),
        paused: arguments.paused || arguments.gdb.is_some(),
    })
}

/// Puts shell commands on a kernel command line.
fn exec_words(commands: &str) -> Result<String, String> {
    match (commands.contains('\''), commands.contains('"')) {
        (false, _) => Ok(format!("--exec '{commands}'")),
        (true, false) => Ok(format!("--exec \"{commands}\"")),
        (true, true) => {
            Err("--exec: commands with both ' and \" do not fit on a kernel command line".into())
        }
    }
}

/// The name of a guest that was given none: its kernel's, and the number of this process.
fn own_name(kernel: &Path) -> String {
    let stem = kernel.file_stem().unwrap_or_default().to_string_lossy();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let mut stem: String = stem.chars().filter(|c| fits(*c)).take(40).collect();
    if !stem.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        stem.insert_str(0, "guest");
    }
    format!("{stem}-{}", std::process::id())
}
