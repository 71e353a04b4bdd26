//! What the default image does: mounts the disks that appear, serves them, and runs the shell.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;

use crate::block::Block;
use crate::command_line::Options;
use crate::fs::mounts;
use crate::fs::volume::Volume;
use crate::net::Net;
use crate::power::ExitStatus;
use crate::shell::{self, ConsoleOutput, Session, Status};
use crate::{devices, entropy, http, println, sync, task, time};

/// How long the devices that were there at boot may take.
const SETTLE: Duration = Duration::from_secs(10);

/// The main function of the default image.
pub async fn run() -> ExitStatus {
    let options = Options::parse(crate::command_line());
    for word in &options.unusable {
        println!("janus: {word} on the command line makes no sense; going on without it");
    }
    mount_modules().await;
    drop(task::spawn("mounter", mount_disks()));
    drop(task::spawn("network", serve_networks(options.clone())));
    settle().await;
    if !entropy::is_strong() {
        log::warn!(
            "entropy: neither the CPU nor a device gives random numbers; what is here is good for sequence \
             numbers, not for keys"
        );
    }
    let uptime = Duration::from_nanos(time::now().as_nanos());
    println!("janus: ready after {}.{:03} ms", uptime.as_millis(), uptime.subsec_micros() % 1000);
    if options.exec_without_commands {
        println!("janus: --exec has nothing to run: write --exec 'command; command'");
        return ExitStatus::PowerOff(Status::USAGE.0);
    }
    if options.exec.is_empty() {
        shell::interactive::run().await;
    }
    let mut status = Status::SUCCESS;
    let mut output = ConsoleOutput;
    let mut session = Session::new(&mut output);
    for line in &options.exec {
        let ended = session.run_line(line).await;
        if ended != Status::SUCCESS {
            status = ended;
        }
    }
    println!("janus-report: {{\"exec\":{}}}", status.0);
    ExitStatus::PowerOff(status.0)
}

/// Disks that have been looked at, and a signal for each.
static SEEN: sync::Notify = sync::Notify::new();

/// Waits until the devices that were there at boot are found, and each disk has been looked at.
async fn settle() {
    let all_seen = async {
        devices::settled().await;
        while devices::blocks().iter().any(|disk| !was_looked_at(disk)) {
            SEEN.notified().await;
        }
    };
    if time::timeout(SETTLE, all_seen).await.is_err() {
        println!(
            "janus: a device did not answer within {} s; going on without it",
            SETTLE.as_secs()
        );
    }
}

static LOOKED_AT: sync::IrqMutex<Vec<Arc<Block>>> = sync::IrqMutex::new(Vec::new());

fn was_looked_at(disk: &Arc<Block>) -> bool {
    LOOKED_AT.lock().iter().any(|known| Arc::ptr_eq(known, disk))
}

/// Mounts each disk when it appears, and takes it out of the tree when it goes.
async fn mount_disks() {
    loop {
        let generation = devices::generation();
        let disks = devices::blocks();
        let gone: Vec<Arc<Block>> = {
            let mut known = LOOKED_AT.lock();
            let is_gone =
                |disk: &mut Arc<Block>| !disks.iter().any(|other| Arc::ptr_eq(other, disk));
            known.extract_if(.., is_gone).collect()
        };
        for disk in gone {
            if let Some(place) = mounts::remove(disk.name()) {
                println!("janus: {} is gone from {place}", disk.name());
            }
        }
        for disk in disks {
            if !was_looked_at(&disk) {
                mount_disk(&disk).await;
                LOOKED_AT.lock().push(disk);
                SEEN.notify();
            }
        }
        devices::changed_since(generation).await;
    }
}

async fn mount_disk(disk: &Arc<Block>) {
    match Volume::mount(Arc::clone(disk)).await {
        Ok(volume) => {
            let kind = volume.type_name();
            let place = mounts::add(volume);
            println!("janus: mounted {} ({kind}) on {place}", disk.name());
        }
        Err(error) => println!("janus: {}: not mounted: {error}", disk.name()),
    }
}

/// Gives each network interface an address when it appears, and serves the volumes on it.
async fn serve_networks(options: Options) {
    let mut seen: Vec<Arc<Net>> = Vec::new();
    loop {
        let generation = devices::generation();
        let nets = devices::nets();
        seen.retain(|known| nets.iter().any(|net| Arc::ptr_eq(net, known)));
        for net in nets {
            if !seen.iter().any(|known| Arc::ptr_eq(known, &net)) {
                serve_network(&net, &options);
                seen.push(net);
            }
        }
        devices::changed_since(generation).await;
    }
}

fn serve_network(net: &Arc<Net>, options: &Options) {
    match options.address {
        Some((address, gateway)) => {
            if let Err(error) = net.set_static(address, gateway) {
                println!("janus: {}: {address}: {error}", net.name());
            }
        }
        None => net.use_dhcp(),
    }
    let (waiting, port) = (Arc::clone(net), options.http_port);
    drop(task::spawn("address", async move {
        if let Ok(address) = waiting.configured().await {
            println!("janus: {} has the address {address}", waiting.name());
            match port {
                0 => {}
                80 => println!("janus: serving http://{}/", address.address()),
                port => println!("janus: serving http://{}:{port}/", address.address()),
            }
        }
    }));
    if port != 0 {
        let net = Arc::clone(net);
        drop(task::spawn("http-server", async move {
            let name = String::from(net.name());
            if let Err(error) = http::server::run(net, port).await {
                println!("janus: no longer serving port {port} of {name}: {error}");
            }
        }));
    }
}

async fn mount_modules() {
    let modules = crate::boot_info().map_or(&[][..], |info| &info.modules);
    for (index, module) in modules.iter().enumerate() {
        let name = alloc::format!("module{index}");
        match Volume::mount_module(&name, module.data).await {
            Ok(volume) => {
                let kind = volume.type_name();
                let place = mounts::add(volume);
                println!("janus: mounted {name} ({kind}) on {place}");
            }
            Err(error) => match compression(module.data) {
                Some(kind) => println!(
                    "janus: {name}: not mounted: it is compressed ({kind}), and this kernel unpacks nothing: \
                     give it the plain archive"
                ),
                None => println!("janus: {name}: not mounted: {error}"),
            },
        }
    }
}

/// The compression that a file's first bytes tell: what people give to kernels that unpack their initramfs.
fn compression(data: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 6] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (b"BZh", "bzip2"),
        (&[0x5d, 0, 0], "lzma"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
    ];
    KINDS.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_module_is_called_so() {
        assert_eq!(compression(&[0x1f, 0x8b, 8, 0]), Some("gzip"));
        assert_eq!(compression(&[0x28, 0xb5, 0x2f, 0xfd, 4]), Some("zstd"));
        assert_eq!(compression(b"070701"), None);
        assert_eq!(compression(&[0x1f]), None);
    }
}
