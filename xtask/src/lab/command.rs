//! `cargo xtask lab xen`: one guest in the lab, its console here, its result as exit status.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{Domain, Lab, Mode, Setup};
use crate::console::Echo;
use crate::guest;

/// Runs a guest under real Xen with a Debian dom0, inside QEMU.
#[derive(Clone, Debug, Args)]
pub(crate) struct XenArguments {
    /// As a PV guest (the default).
    #[arg(long, conflicts_with = "pvh")]
    pv: bool,
    /// As a PVH guest.
    #[arg(long)]
    pvh: bool,
    /// The kernel to boot; the default image, freshly built, if not given.
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// An initramfs for it.
    #[arg(long, value_name = "PATH")]
    ramdisk: Option<PathBuf>,
    /// A raw disk image; the guest's writes are thrown away. May be repeated.
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Gives it a network: dom0 is 10.0.0.1 (and serves DHCP), the guest 10.0.0.2.
    #[arg(long)]
    net: bool,
    /// Kernel command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Shell commands for the default image to run before it powers off.
    #[arg(long, value_name = "COMMANDS")]
    exec: Option<String>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 128)]
    memory: u32,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// A shell command to run in dom0 once the guest is up (with `--wait-for`: once it printed that). May be repeated.
    #[arg(long, value_name = "COMMAND")]
    dom0: Vec<String>,
    /// Text in the guest's console to wait for before the `--dom0` commands run.
    #[arg(long, value_name = "TEXT")]
    wait_for: Option<String>,
    /// Seconds the guest may take.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

/// The reasons of `xen/include/public/sched.h`, SHUTDOWN_*.
pub(crate) fn reason_name(reason: u32) -> &'static str {
    match reason {
        0 => "poweroff",
        1 => "reboot",
        2 => "suspend",
        3 => "crash",
        4 => "watchdog",
        5 => "soft reset",
        _ => "unknown reason",
    }
}

/// Runs it.
///
/// # Errors
/// The lab fails, a dom0 command fails, or the guest ends by anything but power-off or reboot.
pub(crate) fn xen(arguments: &XenArguments) -> Result<()> {
    let image = match &arguments.image {
        Some(image) => image.clone(),
        None => guest::build(guest::DEFAULT_IMAGE)?,
    };
    let mut setup = Setup { disks: arguments.disk.clone(), ..Setup::default() };
    setup.images.push(("kernel".to_owned(), image));
    if let Some(ramdisk) = &arguments.ramdisk {
        setup.images.push(("ramdisk".to_owned(), ramdisk.clone()));
    }
    eprintln!("janus: booting Xen and dom0");
    let mut lab = Lab::start(&setup, Echo::Live)?;
    eprintln!("janus: dom0 is ready after {:.1} s", lab.age());
    let mut command_line = arguments.append.clone();
    if let Some(exec) = &arguments.exec {
        command_line = format!("{command_line} {}", crate::run::exec_words(exec)?);
    }
    let limit = Duration::from_secs(arguments.timeout);
    let mut guest = lab.create(&Domain {
        name: "guest".to_owned(),
        mode: if arguments.pvh { Mode::Pvh } else { Mode::Pv },
        kernel: "/images/kernel".to_owned(),
        ramdisk: arguments.ramdisk.as_ref().map(|_| "/images/ramdisk".to_owned()),
        command_line,
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        disks: ('a'..='z')
            .take(arguments.disk.len())
            .map(|letter| format!("/dev/vd{letter}"))
            .collect(),
        network: arguments.net,
    })?;
    if let Some(text) = &arguments.wait_for {
        lab.guest_line(&mut guest, limit, |line| line.contains(text.as_str()).then_some(()))?;
    }
    for command in &arguments.dom0 {
        let (status, _) = lab.run(command, limit)?;
        if status != 0 {
            bail!("in dom0: `{command}` failed with status {status}");
        }
    }
    let ended = lab.end(&guest, limit)?;
    let said_by_xen: String = lab
        .serial()
        .lines()
        .filter(|line| line.starts_with("(XEN)") && line.contains("d1"))
        .fold(String::new(), |all, line| all + "\n" + line);
    let reason =
        ended.reason.context("the guest could not be created (see xl's messages above)")?;
    eprintln!(
        "janus: the guest ended: {} ({reason}), {:.1} s after the start{said_by_xen}",
        reason_name(reason),
        lab.age()
    );
    if reason > 1 {
        bail!("the guest ended with {}", reason_name(reason));
    }
    Ok(())
}

/// The terminal without line editing, restored when dropped.
struct RawTerminal {
    before: String,
}

impl RawTerminal {
    /// `None` if standard input is no terminal.
    fn enter() -> Option<Self> {
        let stty = |words: &[&str]| {
            let output = Command::new("stty").args(words).stdin(Stdio::inherit()).output().ok()?;
            output
                .status
                .success()
                .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let before = stty(&["-g"])?;
        stty(&["raw", "-echo"])?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done if the terminal has gone.
        let _ = Command::new("stty").arg(&self.before).stdin(Stdio::inherit()).status();
    }
}

/// Boots an image in the lab with this terminal as its console: `cargo xtask run --machine xen-pv`.
///
/// # Errors
/// The lab fails, or the guest cannot be created.
pub(crate) fn shell(
    mode: Mode,
    image: PathBuf,
    disks: Vec<PathBuf>,
    command_line: String,
    memory_mib: u32,
    cpus: u32,
) -> Result<ExitCode> {
    eprintln!("janus: booting Xen and dom0 (about 6 s)");
    let count = disks.len();
    let setup = Setup { images: vec![("kernel".to_owned(), image)], disks, ..Setup::default() };
    let mut lab = Lab::start(&setup, Echo::Quiet)?;
    eprintln!("janus: dom0 is ready after {:.1} s; leave with `poweroff`, or Ctrl-]", lab.age());
    let mut from = lab.output.position();
    let mut port = lab.attach(&Domain {
        name: "guest".to_owned(),
        mode,
        kernel: "/images/kernel".to_owned(),
        ramdisk: None,
        command_line,
        memory_mib,
        cpus,
        disks: ('a'..='z').take(count).map(|letter| format!("/dev/vd{letter}")).collect(),
        network: true,
    })?;
    let raw = RawTerminal::enter();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            let Some(bytes) = buffer.get(..count) else { break };
            if port.write_all(bytes).is_err() {
                break;
            }
        }
    });
    let newline: &[u8] = if raw.is_some() { b"\r\n" } else { b"\n" };
    loop {
        // Whatever is there, at least every 20 ms: a prompt has no newline.
        let _ = lab.output.contains(
            from,
            "lab: ended guest ",
            Instant::now() + Duration::from_millis(20),
        );
        let text = lab.output.text();
        let fresh = text.get(from..).unwrap_or_default();
        let (shown, reason) = match fresh.split_once("lab: ended guest ") {
            Some((shown, reason)) => (shown, Some(reason.trim().parse::<u32>().ok())),
            None => (fresh, None),
        };
        let mut out = std::io::stdout().lock();
        for part in shown.split_inclusive('\n') {
            match part.strip_suffix('\n') {
                Some(line) => {
                    out.write_all(line.as_bytes())?;
                    out.write_all(newline)?;
                }
                None => out.write_all(part.as_bytes())?,
            }
        }
        out.flush()?;
        from += shown.len();
        if let Some(reason) = reason {
            drop(raw);
            let reason = reason.context("the guest could not be created")?;
            eprintln!("janus: the guest ended: {}", reason_name(reason));
            return Ok(if reason <= 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if lab.is_over() {
            bail!("the lab ended under the guest");
        }
    }
}
