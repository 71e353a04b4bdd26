//! What `janus run` can be told, and how its values are written.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::engine::EngineArgument;
use crate::gdb;
use crate::guest::{Bus, Card, DiskFile, NetworkKind, VirtioConsolePlace, Writes, disk_number};
use crate::kvm::Door;
use crate::usernet::{Config, Publish};

/// Runs a guest until it ends. Ctrl-] leaves and ends it.
#[derive(Clone, Debug, Args)]
pub(super) struct RunArguments {
    /// The kernel: an ELF file with Xen notes; on KVM also one with a PVH note, or a bzImage.
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(super) image: Option<PathBuf>,
    /// Takes what is not on the command line from a file: TOML with these options' names as keys, or the configuration
    /// of an `xl` PV guest.
    #[arg(long, value_name = "FILE.toml|FILE.cfg", value_hint = ValueHint::FilePath)]
    pub(super) config: Option<PathBuf>,
    /// A disk image, raw or qcow2; with `,ro` the guest may only read it, with `,snapshot` what it writes is forgotten.
    /// `,format=raw` or `=qcow2` where name and contents disagree, `,backing` to let the guest read the file that a
    /// qcow2 image is a change of, `,direct` to go past the page cache. May be repeated: xvda, xvdb, ..., or as
    /// `,vdev=hda` says.
    #[arg(long, value_name = "FILE[,ro|,snapshot][,format=raw|qcow2][,...]", value_parser = disk, value_hint = ValueHint::FilePath)]
    pub(super) disk: Vec<DiskFile>,
    /// A network card: `user` needs no rights on the host, `tap:NAME` is an interface of the host. May be repeated.
    #[arg(long, value_name = "user|tap:NAME[,mac=ADDRESS]", value_parser = network)]
    pub(super) net: Vec<Card>,
    /// All disks and cards are virtio devices; alone, a disk or card is one with `,bus=virtio`.
    #[arg(long)]
    pub(super) virtio: bool,
    /// virtio devices see only memory that the guest grants them.
    #[arg(long)]
    pub(super) virtio_grants: bool,
    /// A virtio entropy source.
    #[arg(long)]
    pub(super) rng: bool,
    /// A virtio console, beside the one that every guest has. May be repeated.
    #[arg(long, value_name = "file:PATH|socket:PATH|pty")]
    pub(super) virtio_console: Vec<VirtioConsolePlace>,
    /// A virtio balloon.
    #[arg(long)]
    pub(super) balloon: bool,
    /// A port of this machine that leads into the guest, on the first card (implies `--net user`). May be repeated.
    #[arg(short = 'p', long = "publish", value_name = "[ADDRESS:]PORT:GUESTPORT[/udp]")]
    pub(super) publish: Vec<Publish>,
    /// Memory, in MiB unless K, M or G follows.
    #[arg(short, long, default_value = "256M", value_parser = mebibytes)]
    pub(super) memory: u64,
    /// What `janus memory` may let it grow to.
    #[arg(long, value_name = "MEMORY", value_parser = mebibytes)]
    pub(super) max_memory: Option<u64>,
    /// What it runs on.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) engine: EngineArgument,
    /// On KVM: by which protocol the kernel is entered.
    #[arg(long, value_enum, default_value = "any")]
    pub(super) door: DoorArgument,
    /// On KVM: as a PVH guest of Xen's, with Xen's devices.
    #[arg(long)]
    pub(super) xen: bool,
    /// On KVM: memory in huge pages of the host.
    #[arg(long)]
    pub(super) hugepages: bool,
    /// With `--engine qemu`: prints QEMU's command line, and does nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Serves the guest's xenstore on this socket: `XENSTORED_PATH=SOCKET xenstore-ls -s`.
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    pub(super) xenstore: Option<PathBuf>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    pub(super) cpus: usize,
    /// An initial RAM disk.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub(super) append: String,
    /// Runs these shell commands in the default image instead of its shell, and ends with their status.
    #[arg(long, value_name = "COMMANDS")]
    pub(super) exec: Option<String>,
    /// Where the console goes: this terminal, a new pseudo terminal, a file, or a socket for one client. May be
    /// repeated; what is typed at any of them goes to the guest.
    #[arg(long, value_name = "stdio|pty|file:PATH|socket:PATH", value_parser = console, value_hint = ValueHint::FilePath)]
    pub(super) console: Vec<ConsolePlace>,
    /// Ends the guest after so long: seconds unless ms, s or m follows.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) timeout: Option<Duration>,
    /// The guest's name, which no other running guest of this user may have: the image's and this process's number.
    #[arg(long, value_parser = name)]
    pub(super) name: Option<String>,
    /// The guest's UUID; a random one otherwise.
    #[arg(long, value_parser = uuid)]
    pub(super) uuid: Option<[u8; 16]>,
    /// What follows when the guest powers off.
    #[arg(long, value_enum, value_name = "ACTION", default_value = "destroy")]
    pub(super) on_poweroff: Action,
    /// What follows when it asks for a reboot.
    #[arg(long, value_enum, value_name = "ACTION", default_value = "restart")]
    pub(super) on_reboot: Action,
    /// What follows when it crashes.
    #[arg(long, value_enum, value_name = "ACTION", default_value = "destroy")]
    pub(super) on_crash: Action,
    /// Ends with code 7 where the guest asks for a reboot: `--on-reboot destroy`.
    #[arg(long)]
    pub(super) no_reboot: bool,
    /// Runs the guest in the background once it has started; its console is `janus console`.
    #[arg(long)]
    pub(super) detach: bool,
    /// Starts it paused: `janus resume` lets it go.
    #[arg(long)]
    pub(super) paused: bool,
    /// Writes what happens as JSON lines (docs/control.md): to a file, standard output, or an open descriptor.
    #[arg(long, value_name = "FILE|-|fd:N", value_hint = ValueHint::FilePath)]
    pub(super) json: Option<String>,
    /// Writes a report as JSON if the guest crashes.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) crash_report: Option<PathBuf>,
    /// Waits for gdb before the first instruction: `target remote :PORT`.
    #[arg(long, value_name = "[ADDRESS:]PORT|unix:PATH", value_hint = ValueHint::FilePath)]
    pub(super) gdb: Option<gdb::Address>,
    /// Makes no control socket: the guest is not in `janus ls`.
    #[arg(long)]
    pub(super) no_control: bool,
    /// Prints what the guest did: hypercalls with counts and times.
    #[arg(long)]
    pub(super) stat: bool,
}

/// By which protocol a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum DoorArgument {
    /// By the PVH note if there is one, else as Linux.
    #[default]
    Any,
    /// By the PVH note.
    Pvh,
    /// By Linux's 64-bit boot protocol.
    Linux,
}

impl From<DoorArgument> for Door {
    fn from(door: DoorArgument) -> Self {
        match door {
            DoorArgument::Any => Self::Any,
            DoorArgument::Pvh => Self::Pvh,
            DoorArgument::Linux => Self::Linux,
        }
    }
}

/// What follows the end of a guest, as xl.cfg(5) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Action {
    /// Nothing: the run is over.
    Destroy,
    /// It starts again.
    Restart,
    /// It stays as it ended, for `janus stat`, until `janus kill`.
    Preserve,
}

/// Where a console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ConsolePlace {
    /// This process's input and output.
    Stdio,
    /// A new pseudo terminal.
    Pty,
    /// A file.
    File(PathBuf),
    /// A socket.
    Socket(PathBuf),
}

fn console(text: &str) -> Result<ConsolePlace, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(ConsolePlace::Stdio),
        None if text == "pty" => Ok(ConsolePlace::Pty),
        Some(("file", path)) if !path.is_empty() => Ok(ConsolePlace::File(path.into())),
        Some(("socket", path)) if !path.is_empty() => Ok(ConsolePlace::Socket(path.into())),
        _ => Err(format!("`{text}` is no place for a console: stdio, pty, file:PATH, socket:PATH")),
    }
}

/// A name that is a file's name as well.
fn name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let first = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if first && text.len() <= 64 && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err("a name is at most 64 letters, digits and . _ - +, and begins with a letter or digit"
        .into())
}

fn uuid(text: &str) -> Result<[u8; 16], String> {
    let wrong = || format!("`{text}` is not a UUID: 8-4-4-4-12 hexadecimal digits");
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if lengths != [8, 4, 4, 4, 12] || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|_| wrong())
}

fn disk(text: &str) -> Result<DiskFile, String> {
    let mut parts = text.split(',');
    let file = parts.next().filter(|file| !file.is_empty()).ok_or("no file")?;
    let mut disk = DiskFile { file: file.into(), ..DiskFile::default() };
    for option in parts {
        match (option, option.strip_prefix("vdev=")) {
            ("rw", _) => disk.writes = Writes::Kept,
            ("snapshot", _) => disk.writes = Writes::Forgotten,
            ("ro", _) => disk.writes = Writes::Refused,
            ("direct", _) => disk.direct = true,
            ("backing", _) => disk.backing = true,
            (option, _) if let Some(bus) = option.strip_prefix("bus=") => disk.bus = bus.parse()?,
            (option, _) if let Some(name) = option.strip_prefix("format=") => {
                disk.format = Some(name.parse()?);
            }
            (_, Some(name)) => {
                let number = disk_number(name);
                let wrong = || format!("`{name}` names no disk: xvda, hda, sda, or a number");
                disk.number = Some(number.ok_or_else(wrong)?);
            }
            _ => {
                return Err(format!(
                    "`{option}` is not an option of a disk: rw, ro, snapshot, direct, \
                     backing, format=raw|qcow2, bus=xen|virtio, vdev=NAME"
                ));
            }
        }
    }
    Ok(disk)
}

fn network(text: &str) -> Result<Card, String> {
    let (network, options) = text.split_once(',').unwrap_or((text, ""));
    let kind = match network.split_once(':') {
        None if network == "user" => NetworkKind::User(Config::default()),
        Some(("tap", name)) if !name.is_empty() => NetworkKind::Tap(name.to_owned()),
        _ => return Err(format!("`{network}` is not a network: user, or tap:NAME")),
    };
    let mut card = Card { kind, mac: None, bus: Bus::default() };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match (option.strip_prefix("mac="), option.strip_prefix("bus=")) {
            (Some(address), _) => card.mac = Some(mac(address)?),
            (_, Some(bus)) => card.bus = bus.parse()?,
            _ => {
                let options = "mac=ADDRESS, bus=xen|virtio";
                return Err(format!("`{option}` is not an option of a card: {options}"));
            }
        }
    }
    Ok(card)
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2))
        .collect();
    let address: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
    let wrong = || format!("`{text}` is not an address such as 00:16:3e:00:00:01");
    let address = address.ok_or_else(wrong)?;
    if address[0] & 1 != 0 {
        return Err(format!("`{text}` is the address of a group, which no card has"));
    }
    Ok(address)
}

pub(super) fn mebibytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not an amount of memory, such as 256M or 1G");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = text.get(digits.len()..).unwrap_or_default();
    let mib = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => Some(number),
        "g" | "gb" | "gib" => number.checked_mul(1024),
        "k" | "kb" | "kib" => Some(number / 1024),
        _ => None,
    };
    mib.filter(|mib| *mib > 0 && *mib <= 1 << 24).ok_or_else(wrong)
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let wrong = || format!("`{text}` is not a time, such as 30s, 500ms or 2m");
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let factor = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * factor).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Format;

    #[test]
    fn amounts_and_times_are_read_with_their_units() {
        assert_eq!(mebibytes("256M"), Ok(256));
        assert_eq!(mebibytes("64"), Ok(64));
        assert_eq!(mebibytes("2g"), Ok(2048));
        assert_eq!(mebibytes("4096K"), Ok(4));
        for wrong in ["", "0", "M", "12x", "-1", "1.5G", "99999999999999999999"] {
            assert!(mebibytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("2m"), Ok(Duration::from_mins(2)));
        assert!(duration("2h").is_err() && duration("").is_err() && duration("-1s").is_err());
    }

    #[test]
    fn names_and_uuids_are_checked() {
        assert_eq!(name("web.1-a_b+"), Ok("web.1-a_b+".into()));
        let long = "x".repeat(65);
        for wrong in ["", "../x", "a/b", ".a", "a b", "-x", &long] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(uuid(text).map(|uuid| (uuid[1], uuid[15])), Ok((0x11, 0xff)));
        for wrong in [
            "",
            "00112233445566778899aabbccddeeff",
            &text[1..],
            "g0112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert!(uuid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn consoles_have_places() {
        assert_eq!(console("file:/a:b"), Ok(ConsolePlace::File("/a:b".into())));
        assert_eq!(
            (console("stdio"), console("pty")),
            (Ok(ConsolePlace::Stdio), Ok(ConsolePlace::Pty))
        );
        assert!(console("file:").is_err() && console("tty").is_err() && console("").is_err());
    }

    #[test]
    fn disks_are_files_with_options() {
        assert_eq!(
            disk("a,ro"),
            Ok(DiskFile { file: "a".into(), writes: Writes::Refused, ..DiskFile::default() })
        );
        let hda = disk("a,vdev=hda,snapshot").unwrap();
        assert_eq!((hda.number, hda.writes), (Some(768), Writes::Forgotten));
        let qcow2 = disk("a,format=qcow2,direct").unwrap();
        assert_eq!((qcow2.format, qcow2.direct), (Some(Format::Qcow2), true));
        assert!(disk("a,format=vmdk").is_err());
        assert!(disk("").is_err() && disk("a,rx").is_err() && disk("a,vdev=q").is_err());
        assert!(network("user").is_ok() && network("tap:t0").is_ok());
        let card = network("user,mac=00:16:3e:00:00:0a").unwrap();
        assert_eq!(card.mac, Some([0, 0x16, 0x3e, 0, 0, 10]));
        for wrong in
            ["user,mac=00:16:3e", "user,mac=01:00:00:00:00:00", "user,x", "user,mac=+0:16:3e:0:0:0"]
        {
            assert!(network(wrong).is_err(), "{wrong}");
        }
        assert_eq!(network("user,bus=virtio").map(|card| card.bus), Ok(Bus::Virtio));
        assert_eq!(disk("a,bus=virtio").map(|disk| disk.bus), Ok(Bus::Virtio));
        assert!(network("user,bus=usb").is_err() && disk("a,bus=").is_err());
        assert!(network("tap:").is_err() && network("bridge").is_err());
    }
}
