//! What `janus run` can be told, and how its values are written.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::engine::EngineArgument;
use crate::guest::{DiskFile, NetworkKind, Writes, disk_number};
use crate::kvm::Door;
use crate::usernet::{Config, Publish};

/// Runs a guest until it ends. Ctrl-] leaves and ends it.
#[derive(Clone, Debug, Args)]
pub(super) struct RunArguments {
    /// The kernel: an ELF file with Xen notes; on KVM also one with a PVH note, or a bzImage.
    #[arg(value_name = "IMAGE")]
    pub(super) image: PathBuf,
    /// A disk image, raw or qcow2; with `,ro` the guest may only read it, with `,snapshot` what it writes is forgotten.
    /// `,format=raw` or `=qcow2` where name and contents disagree, `,backing` to let the guest read the file that a
    /// qcow2 image is a change of, `,direct` to go past the page cache. May be repeated: xvda, xvdb, ..., or as
    /// `,vdev=hda` says.
    #[arg(long, value_name = "FILE[,ro|,snapshot][,format=raw|qcow2][,...]", value_parser = disk)]
    pub(super) disk: Vec<DiskFile>,
    /// A network card: `user` needs no rights on the host, `tap:NAME` is an interface of the host. May be repeated.
    #[arg(long, value_name = "user|tap:NAME", value_parser = network)]
    pub(super) net: Vec<NetworkKind>,
    /// A port of this machine that leads into the guest, on the first card (implies `--net user`). May be repeated.
    #[arg(short = 'p', long = "publish", value_name = "[ADDRESS:]PORT:GUESTPORT[/udp]")]
    pub(super) publish: Vec<Publish>,
    /// Memory, in MiB unless K, M or G follows.
    #[arg(short, long, default_value = "256M", value_parser = mebibytes)]
    pub(super) memory: u64,
    /// What it runs on.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) engine: EngineArgument,
    /// On KVM: by which protocol the kernel is entered.
    #[arg(long, value_enum, default_value = "any")]
    pub(super) door: DoorArgument,
    /// On KVM: memory in huge pages of the host.
    #[arg(long)]
    pub(super) hugepages: bool,
    /// With `--engine qemu`: prints QEMU's command line, and does nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Serves the guest's xenstore on this socket: `XENSTORED_PATH=SOCKET xenstore-ls -s`.
    #[arg(long, value_name = "SOCKET")]
    pub(super) xenstore: Option<PathBuf>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    pub(super) cpus: usize,
    /// An initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub(super) append: String,
    /// Runs these shell commands in the default image instead of its shell, and ends with their status.
    #[arg(long, value_name = "COMMANDS")]
    pub(super) exec: Option<String>,
    /// Ends the guest after so long: seconds unless ms, s or m follows.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) timeout: Option<Duration>,
    /// The guest's name.
    #[arg(long, default_value = "guest")]
    pub(super) name: String,
    /// Ends with code 7 where the guest asks for a reboot, instead of starting it again.
    #[arg(long)]
    pub(super) no_reboot: bool,
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
                     backing, format=raw|qcow2, vdev=NAME"
                ));
            }
        }
    }
    Ok(disk)
}

fn network(text: &str) -> Result<NetworkKind, String> {
    match text.split_once(':') {
        None if text == "user" => Ok(NetworkKind::User(Config::default())),
        Some(("tap", name)) if !name.is_empty() => Ok(NetworkKind::Tap(name.to_owned())),
        _ => Err(format!("`{text}` is not a network: user, or tap:NAME")),
    }
}

fn mebibytes(text: &str) -> Result<u64, String> {
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

fn duration(text: &str) -> Result<Duration, String> {
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
        assert!(network("tap:").is_err() && network("bridge").is_err());
    }
}
