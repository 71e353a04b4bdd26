//! `janus run`: one guest on this terminal.

use std::io::{IsTerminal as _, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use janus_proto::abi::xen::sched::ShutdownReason;

use super::{crash, terminal};
use crate::guest::{Description, DiskFile, Guest, GuestError, NetworkKind, Writes, disk_number};
use crate::pv::domain::{EndReason, Ended};
use crate::usernet::{Config, Publish};

const USAGE: u8 = 2;
const CRASHED: u8 = 6;
const REBOOT: u8 = 7;
const TIMEOUT: u8 = 124;
const LOST: u8 = 125;
const LEFT: u8 = 130;

/// Bytes of the console's end that are kept for a report.
const TAIL: usize = 64 * 1024;
/// How long a guest may take to end once it was told to.
const GRACE: Duration = Duration::from_secs(5);

/// Runs a guest until it ends. Ctrl-] leaves and ends it.
#[derive(Clone, Debug, Args)]
pub(super) struct RunArguments {
    /// The kernel: an ELF file with Xen notes.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// A raw disk image; with `,ro` the guest may only read it, with `,snapshot` what it writes is forgotten. May be
    /// repeated: xvda, xvdb, ..., or as `,vdev=hda` says.
    #[arg(long, value_name = "FILE[,ro|,snapshot][,vdev=NAME]", value_parser = disk)]
    disk: Vec<DiskFile>,
    /// A network card: `user` needs no rights on the host, `tap:NAME` is an interface of the host. May be repeated.
    #[arg(long, value_name = "user|tap:NAME", value_parser = network)]
    net: Vec<NetworkKind>,
    /// A port of this machine that leads into the guest, on the first card (implies `--net user`). May be repeated.
    #[arg(short = 'p', long = "publish", value_name = "[ADDRESS:]PORT:GUESTPORT[/udp]")]
    publish: Vec<Publish>,
    /// Memory, in MiB unless K, M or G follows.
    #[arg(short, long, default_value = "256M", value_parser = mebibytes)]
    memory: u64,
    /// Serves the guest's xenstore on this socket: `XENSTORED_PATH=SOCKET xenstore-ls -s`.
    #[arg(long, value_name = "SOCKET")]
    xenstore: Option<PathBuf>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: usize,
    /// An initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Runs these shell commands in the default image instead of its shell, and ends with their status.
    #[arg(long, value_name = "COMMANDS")]
    exec: Option<String>,
    /// Ends the guest after so long: seconds unless ms, s or m follows.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// The guest's name.
    #[arg(long, default_value = "guest")]
    name: String,
    /// Ends with code 7 where the guest asks for a reboot, instead of starting it again.
    #[arg(long)]
    no_reboot: bool,
    /// Prints what the guest did: hypercalls with counts and times.
    #[arg(long)]
    stat: bool,
}

fn disk(text: &str) -> Result<DiskFile, String> {
    let mut parts = text.split(',');
    let file = parts.next().filter(|file| !file.is_empty()).ok_or("no file")?;
    let mut disk = DiskFile { file: file.into(), writes: Writes::Kept, number: None };
    for option in parts {
        match (option, option.strip_prefix("vdev=")) {
            ("rw", _) => disk.writes = Writes::Kept,
            ("snapshot", _) => disk.writes = Writes::Forgotten,
            ("ro", _) => disk.writes = Writes::Refused,
            (_, Some(name)) => {
                let number = disk_number(name);
                let wrong = || format!("`{name}` names no disk: xvda, hda, sda, or a number");
                disk.number = Some(number.ok_or_else(wrong)?);
            }
            _ => {
                return Err(format!(
                    "`{option}` is not an option of a disk: rw, ro, snapshot, vdev=NAME"
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

/// The console's end, and the code that the guest reported there.
#[derive(Clone, Default)]
pub(super) struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        if kept.len() > 2 * TAIL {
            let surplus = kept.len() - TAIL;
            kept.drain(..surplus);
        }
    }
    pub(super) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }
    /// N of the last line `janus-report: {"exit":N}`.
    fn reported_exit(&self) -> Option<u8> {
        let text = self.text();
        let mut codes = text.lines().filter_map(|line| {
            let rest = line.split_once("janus-report: {\"exit\":")?.1;
            rest.split_once('}')?.0.trim().parse().ok()
        });
        codes.next_back()
    }
}

/// The guest's output: to our own, and its end kept.
struct Out(Tail);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.add(bytes);
        std::io::stdout().write_all(bytes)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stdout().flush()
    }
}

pub(super) fn run(arguments: &RunArguments) -> ExitCode {
    let description = match describe(arguments) {
        Ok(description) => description,
        Err(error) => {
            eprintln!("janus: {error}");
            return ExitCode::from(USAGE);
        }
    };
    loop {
        match once(arguments, &description) {
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

fn describe(arguments: &RunArguments) -> Result<Description, String> {
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

/// Why a run was ended from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// The time was over.
    Timeout,
    /// Somebody left it.
    Left,
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
    let terminal = terminal::attach(guest.host.console().clone(), end.clone());
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
    let ended = guest.wait();
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

fn code_of(ended: &Ended, cut: Option<Cut>, tail: &Tail, timeout: Option<Duration>) -> u8 {
    let reported = tail.reported_exit();
    match (cut, &ended.reason) {
        (_, EndReason::Shutdown(ShutdownReason::POWEROFF | ShutdownReason::SUSPEND)) => {
            reported.unwrap_or(0)
        }
        (_, EndReason::Shutdown(ShutdownReason::REBOOT)) => REBOOT,
        (_, EndReason::Shutdown(_)) => reported.filter(|code| *code != 0).unwrap_or(CRASHED),
        (Some(Cut::Timeout), _) => {
            eprintln!("janus: the guest was ended after {:?}", timeout.unwrap_or(GRACE));
            TIMEOUT
        }
        (Some(Cut::Left), _) => LEFT,
        (None, EndReason::Crashed(cause)) => {
            eprintln!("janus: the guest crashed: {cause}");
            CRASHED
        }
        (None, EndReason::Engine(error)) => {
            eprintln!("janus: {error}");
            LOST
        }
        (None, EndReason::Destroyed) => LOST,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
            Ok(DiskFile { file: "a".into(), writes: Writes::Refused, number: None })
        );
        let hda = disk("a,vdev=hda,snapshot").unwrap();
        assert_eq!((hda.number, hda.writes), (Some(768), Writes::Forgotten));
        assert!(disk("").is_err() && disk("a,rx").is_err() && disk("a,vdev=q").is_err());
        assert!(network("user").is_ok() && network("tap:t0").is_ok());
        assert!(network("tap:").is_err() && network("bridge").is_err());
    }

    #[test]
    fn the_last_report_is_the_guests_code() {
        let tail = Tail::default();
        tail.add(b"janus-report: {\"exec\":1}\njanus-report: {\"exit\":3}\nx janus-report: {\"exit\":127}\n");
        assert_eq!(tail.reported_exit(), Some(127));
        tail.add(b"janus-report: {\"exit\":4000}\n");
        assert_eq!(tail.reported_exit(), Some(127), "no code is that large");
    }

    #[test]
    fn the_end_of_the_console_is_kept() {
        let tail = Tail::default();
        for _ in 0..1000 {
            tail.add(&[b'x'; 1000]);
        }
        assert!(tail.text().len() <= 2 * TAIL);
    }
}
