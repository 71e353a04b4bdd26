//! `janus run --engine qemu`: the same description of a guest, run by QEMU.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::options::RunArguments;
use super::outcome::{CRASHED, LOST, TIMEOUT};
use super::tail::{Out, Tail};
use crate::guest::{Description, NetworkKind, Writes};
use crate::storage::open::Format;
use crate::usernet::Transport;

const PROGRAM: &str = "qemu-system-x86_64";

/// The words that QEMU is called with.
fn words(description: &Description, kvm: bool) -> Vec<String> {
    let accelerator =
        if kvm { ["-accel", "kvm", "-cpu", "host"] } else { ["-accel", "tcg", "-cpu", "max"] };
    let mut words: Vec<String> = Vec::new();
    let mut add = |more: &[&str]| words.extend(more.iter().map(|word| (*word).to_owned()));
    add(&accelerator);
    add(&["-M", "q35", "-smp", &description.vcpus.to_string()]);
    add(&["-m", &format!("{}M", description.memory_mib), "-name", &doubled(&description.name)]);
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    add(&["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "pvpanic"]);
    add(&["-device", "virtio-rng-pci", "-kernel", &description.kernel.to_string_lossy()]);
    if let Some(module) = &description.module {
        add(&["-initrd", &module.to_string_lossy()]);
    }
    if !description.command_line.is_empty() {
        add(&["-append", &description.command_line]);
    }
    for (index, disk) in description.disks.iter().enumerate() {
        let writes = match disk.writes {
            Writes::Kept => "",
            Writes::Forgotten => ",snapshot=on",
            Writes::Refused => ",readonly=on",
        };
        let file = doubled(&disk.file.to_string_lossy());
        let named = if disk.file.extension().is_some_and(|end| end == "qcow2") {
            Format::Qcow2
        } else {
            Format::Raw
        };
        let format = disk.format.unwrap_or(named);
        let cache = if disk.direct { ",cache.direct=on" } else { "" };
        add(&[
            "-drive",
            &format!(
                "file={file},if=none,id=d{index},format={format},discard=unmap{cache}{writes}"
            ),
        ]);
        add(&["-device", &format!("virtio-blk-pci,drive=d{index}")]);
    }
    for (index, network) in description.networks.iter().enumerate() {
        let mut card = match &network.kind {
            NetworkKind::User(_) => format!("user,id=n{index}"),
            NetworkKind::Tap(name) => {
                format!("tap,id=n{index},ifname={},script=no,downscript=no", doubled(name))
            }
        };
        if let NetworkKind::User(config) = &network.kind {
            for publish in &config.publish {
                let transport = match publish.transport {
                    Transport::Tcp => "tcp",
                    Transport::Udp => "udp",
                };
                let (host, port) = (publish.host.ip(), publish.host.port());
                let guest = publish.guest_port;
                card.push_str(&format!(",hostfwd={transport}:{host}:{port}-:{guest}"));
            }
        }
        let mac = network.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
        let mac = mac.map(|mac| format!(",mac={mac}")).unwrap_or_default();
        add(&["-netdev", &card, "-device", &format!("virtio-net-pci,netdev=n{index}{mac}")]);
    }
    words
}

/// QEMU takes a comma for the end of a value, and a doubled one for itself.
fn doubled(text: &str) -> String {
    text.replace(',', ",,")
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// From start to end, once.
pub(super) fn once(
    arguments: &RunArguments,
    description: &Description,
    kvm: bool,
) -> Result<u8, String> {
    let words = words(description, kvm);
    if arguments.dry_run {
        let line: Vec<_> = words.iter().map(|word| quoted(word)).collect();
        println!("{PROGRAM} {}", line.join(" "));
        return Ok(0);
    }
    let child = Command::new(PROGRAM).args(&words).stdout(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| {
        format!("{PROGRAM} cannot be started: {error} (Debian: apt-get install qemu-system-x86)")
    })?;
    let tail = Tail::default();
    let output = child.stdout.take();
    let child = Arc::new(Mutex::new(child));
    let late = Arc::new(AtomicBool::new(false));
    if let Some(time) = arguments.timeout {
        let (child, late) = (Arc::clone(&child), Arc::clone(&late));
        super::outcome::end_after(time, move || {
            late.store(true, Ordering::SeqCst);
            // It may have ended by itself meanwhile.
            let _ = child.lock().unwrap_or_else(PoisonError::into_inner).kill();
        })?;
    }
    if let Some(mut output) = output {
        let mut out = Out(tail.clone());
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default();
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }
    }
    let status = child.lock().unwrap_or_else(PoisonError::into_inner).wait();
    let status = status.map_err(|error| format!("{PROGRAM}: {error}"))?;
    if late.load(Ordering::SeqCst) {
        eprintln!("janus: the guest was ended after {:?}", arguments.timeout.unwrap_or_default());
        return Ok(TIMEOUT);
    }
    Ok(code_of(status.code(), tail.reported_exit()))
}

/// The guest's code in QEMU's status: isa-debug-exit makes `value << 1 | 1` of what is written, here `0x10 | code`.
fn code_of(status: Option<i32>, reported: Option<u8>) -> u8 {
    let Some(status) = status.and_then(|status| u8::try_from(status).ok()) else { return LOST };
    match (status, status >> 1) {
        (0, _) => reported.unwrap_or(0),
        (1, _) => LOST,
        (_, value) if status & 1 == 1 && value & 0xf0 == 0x10 => {
            reported.filter(|code| (*code).min(0xf) == value & 0xf).unwrap_or(value & 0xf)
        }
        _ => CRASHED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Bus, Card, DiskFile, VirtioDevices};
    use crate::usernet::Config;

    #[test]
    fn qemu_is_told_the_whole_description() {
        let user = Config { publish: vec!["8080:80".parse().unwrap()], ..Config::default() };
        let description = Description {
            name: "a,b".into(),
            kernel: "/k".into(),
            module: Some("/m".into()),
            command_line: "--exec 'uptime'".into(),
            memory_mib: 64,
            vcpus: 2,
            disks: vec![
                DiskFile { file: "/d,1".into(), writes: Writes::Refused, ..DiskFile::default() },
                DiskFile {
                    file: "/d.qcow2".into(),
                    writes: Writes::Forgotten,
                    ..DiskFile::default()
                },
            ],
            networks: [NetworkKind::User(user), NetworkKind::Tap("t0".into())]
                .map(|kind| Card { kind, mac: None, bus: Bus::Xen })
                .to_vec(),
            virtio: VirtioDevices::default(),
            store_socket: None,
            max_memory_mib: 0,
            uuid: None,
            paused: false,
        };
        let line = words(&description, false).join(" ");
        for part in [
            "-accel tcg -cpu max",
            "-smp 2 -m 64M -name a,,b",
            "-kernel /k -initrd /m -append --exec 'uptime'",
            "file=/d,,1,if=none,id=d0,format=raw,discard=unmap,readonly=on",
            "file=/d.qcow2,if=none,id=d1,format=qcow2,discard=unmap,snapshot=on",
            "user,id=n0,hostfwd=tcp:127.0.0.1:8080-:80",
            "tap,id=n1,ifname=t0,script=no,downscript=no",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(words(&description, true).join(" ").contains("-accel kvm -cpu host"));
        assert_eq!(quoted("--exec 'uptime'"), r"'--exec '\''uptime'\'''");
    }

    #[test]
    fn qemus_status_has_the_guests_code() {
        assert_eq!(code_of(Some(0), Some(3)), 3);
        assert_eq!(code_of(Some(33), None), 0);
        assert_eq!(code_of(Some(43), None), 5);
        assert_eq!(code_of(Some(63), Some(127)), 127);
        assert_eq!(code_of(Some(1), None), LOST);
        assert_eq!(code_of(None, None), LOST);
    }
}
