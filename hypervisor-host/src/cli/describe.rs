//! From the command line to the description of a guest.

use super::options::RunArguments;
use crate::guest::{Description, NetworkKind};
use crate::usernet::Config;

/// The guest that was asked for.
pub(super) fn describe(arguments: &RunArguments) -> Result<Description, String> {
    let mut command_line = arguments.append.clone();
    if let Some(commands) = &arguments.exec {
        command_line = format!("{command_line} {}", exec_words(commands)?);
    }
    let mut networks = arguments.net.clone();
    if !arguments.publish.is_empty() {
        let user = |network: &&mut NetworkKind| matches!(network, NetworkKind::User(_));
        if networks.iter_mut().find(user).is_none() {
            networks.push(NetworkKind::User(Config::default()));
        }
        if let Some(NetworkKind::User(config)) = networks.iter_mut().find(user) {
            config.publish.clone_from(&arguments.publish);
        }
    }
    Ok(Description {
        name: arguments.name.clone(),
        kernel: arguments.image.clone(),
        module: arguments.initrd.clone(),
        command_line: command_line.trim().to_owned(),
        memory_mib: arguments.memory,
        vcpus: arguments.cpus,
        disks: arguments.disk.clone(),
        networks,
        store_socket: arguments.xenstore.clone(),
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
