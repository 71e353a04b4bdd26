//! The Xen lab: real Xen and a Debian dom0 inside QEMU's TCG, driven line by line from here.
//!
//! One boot costs a few seconds and then serves many guests. Commands go to dom0, and everything
//! comes back, over one virtio-serial port; Xen and the dom0 kernel talk on the serial line.

pub(crate) mod command;
mod dom0;
pub(crate) mod kvm;

use std::fmt::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

pub(crate) use dom0::{add_busybox, kernel_version, modules};

use crate::console::{Console, Echo, Missed};
use crate::cpio::Cpio;
use crate::matrix::steps::{self, Fetched};
use crate::paths;
use crate::process::{self, Process};

/// How Xen runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Paravirtualised: hypercalls for everything.
    Pv,
    /// Hardware virtualisation with a direct kernel boot.
    Pvh,
}

impl Mode {
    /// The word for `type=` in a domain's configuration.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
        }
    }
}

/// What a lab is started with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    /// Files that dom0 finds as `/images/NAME`.
    pub(crate) images: Vec<(String, PathBuf)>,
    /// Raw disk images that dom0 finds as `/dev/vda`, `/dev/vdb`, ...; written to in memory only.
    pub(crate) disks: Vec<PathBuf>,
    /// Memory for dom0, in MiB; 0 for the usual 512.
    pub(crate) dom0_mib: u32,
    /// Memory of the machine, in MiB; 0 for the usual 1024.
    pub(crate) machine_mib: u32,
}

/// A guest to create.
#[derive(Clone, Debug)]
pub(crate) struct Domain {
    /// Its name, and that of its files in dom0.
    pub(crate) name: String,
    /// How it runs.
    pub(crate) mode: Mode,
    /// The kernel's file in dom0.
    pub(crate) kernel: String,
    /// An initramfs's file in dom0, or none.
    pub(crate) ramdisk: Option<String>,
    /// The kernel's command line.
    pub(crate) command_line: String,
    /// Its memory in MiB.
    pub(crate) memory_mib: u32,
    /// Virtual CPUs.
    pub(crate) cpus: u32,
    /// Block devices of dom0, the first as xvda.
    pub(crate) disks: Vec<String>,
    /// Whether it has a network (10.0.0.1 is dom0, 10.0.0.2 the guest).
    pub(crate) network: bool,
}

/// How a guest ended, and what it said.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// The reason it gave Xen (`xen/include/public/sched.h`, SHUTDOWN_*); `None` if it never ran.
    pub(crate) reason: Option<u32>,
    /// Its console.
    pub(crate) console: String,
}

/// A running lab.
#[derive(Debug)]
pub(crate) struct Lab {
    machine: Process,
    port: UnixStream,
    /// Everything that dom0 says over the port.
    pub(crate) output: Console,
    next: u32,
    directory: PathBuf,
}

/// CPU model: plain `max` crashes the dom0 kernel under TCG; without rdrand each `xl create` waits 3 s for entropy.
pub(crate) const CPU: &str = "qemu64,+svm,+npt,+rdrand";

impl Lab {
    /// Boots Xen and dom0 and waits until the toolstack is ready.
    ///
    /// # Errors
    /// A package is missing, or the lab does not come up within its time.
    pub(crate) fn start(setup: &Setup, echo: Echo) -> Result<Self> {
        let parts = dom0::assemble()?;
        let directory = own_directory()?;
        let initrd = initramfs(&parts.base, &directory, &setup.images)?;

        let or = |value: u32, usual: u32| if value == 0 { usual } else { value };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "1", "-m"])
            .arg(or(setup.machine_mib, 1024).to_string())
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(&parts.xen)
            .arg("-append")
            .arg(format!(
                "dom0_mem={}M console=com1 com1=115200 loglvl=warning guest_loglvl=warning dom0=pv",
                or(setup.dom0_mib, 512)
            ))
            .arg("-initrd")
            .arg(format!(
                "{} console=hvc0 quiet panic=-1,{}",
                parts.kernel.display(),
                initrd.display()
            ));
        Self::boot(qemu, &setup.disks, directory, echo)
    }

    /// Starts the machine, and waits until its `/init` obeys.
    fn boot(mut qemu: Command, disks: &[PathBuf], directory: PathBuf, echo: Echo) -> Result<Self> {
        // Below the limit for socket paths wherever the workspace lies.
        let socket =
            std::env::temp_dir().join(format!("janus-lab-{}-{}", std::process::id(), unique()));
        let listener = UnixListener::bind(&socket).context("cannot make the lab's socket")?;
        qemu.arg("-chardev")
            .arg(format!("socket,id=lab,path={}", socket.display()))
            .args([
                "-device",
                "virtio-serial-pci",
                "-device",
                "virtserialport,chardev=lab,name=lab",
            ])
            .stdin(Stdio::null());
        for (index, disk) in disks.iter().enumerate() {
            qemu.arg("-drive")
                .arg(format!("file={},if=none,id=d{index},format=raw,snapshot=on", disk.display()))
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=d{index}"));
        }
        let machine = process::spawn(&mut qemu, Echo::Quiet)?;
        let port = accept(&listener, &machine);
        std::fs::remove_file(&socket)?;
        let port = port?;
        let output = Console::attach(port.try_clone()?, echo);
        let lab = Self { machine, port, output, next: 1, directory };
        let deadline = lab.machine.started + Duration::from_secs(90);
        lab.output
            .line(&mut 0, deadline, |line| line.starts_with("lab: ready").then_some(()))
            .map_err(|missed| lab.failure("the lab did not come up", missed))?;
        Ok(lab)
    }

    fn failure(&self, what: &str, missed: Missed) -> anyhow::Error {
        anyhow!(
            "{what} ({missed}); the last of its serial line:{}{}\n  of the port:{}",
            self.machine.console.tail(15),
            self.machine.errors.tail(3),
            self.output.tail(10)
        )
    }

    /// Whether the port is closed: the machine has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.output.is_closed()
    }

    /// Seconds since the machine was started.
    pub(crate) fn age(&self) -> f32 {
        self.machine.started.elapsed().as_secs_f32()
    }

    /// Xen's own serial line so far: hypervisor messages and the dom0 kernel's.
    pub(crate) fn serial(&self) -> String {
        self.machine.console.text()
    }

    /// Runs a shell command in dom0; answers its exit status and what it printed.
    ///
    /// # Errors
    /// It takes longer than `limit`, or the lab died.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<(i32, String)> {
        use std::io::Write as _;
        if command.contains('\n') {
            bail!("a dom0 command is one line");
        }
        let number = self.next;
        self.next += 1;
        let mut cursor = self.output.position();
        self.port
            .write_all(format!("{number} {command}\n").as_bytes())
            .context("the lab is gone")?;
        let done = format!("lab: done {number} ");
        let mut printed = String::new();
        let (status, _) = self
            .output
            .line(&mut cursor, Instant::now() + limit, |line| {
                if let Some(status) = line.strip_prefix(&done) {
                    return Some(status.trim().parse().unwrap_or(-1));
                }
                // Guests talk on the same port, each line under its name.
                if !is_guest_line(line) && !line.starts_with("lab: ") {
                    printed.push_str(line);
                    printed.push('\n');
                }
                None
            })
            .map_err(|missed| self.failure(&format!("in dom0: {command}"), missed))?;
        Ok((status, printed))
    }

    /// Fetches with the lab's own curl.
    ///
    /// # Errors
    /// curl fails, or the lab died.
    pub(crate) fn fetch(&mut self, url: &str, deadline: Instant) -> Result<Fetched> {
        let words = steps::curl_words(url, "/tmp/fetched", deadline);
        let command = format!(
            "rm -f /tmp/fetched; curl {} && echo && sha256sum /tmp/fetched",
            words.join(" ")
        );
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        let (status, text) = self.run(&command, left)?;
        if status != 0 {
            bail!("curl in the lab: {}", text.trim());
        }
        let mut parts = text.split_whitespace();
        let status = parts.next().context("curl printed no status")?.parse()?;
        Ok(Fetched { status, sha256: parts.next().context("no sum")?.to_owned() })
    }

    /// Creates a guest, which then runs beside whatever comes next.
    ///
    /// # Errors
    /// The lab died.
    pub(crate) fn create(&mut self, domain: &Domain) -> Result<Guest> {
        self.begin(&domain.name, &domain.config())
    }

    /// Starts what the text describes: a domain for `xl`, or a command for the shell of the KVM lab.
    fn begin(&mut self, name: &str, text: &str) -> Result<Guest> {
        self.configure(name, text)?;
        let start = self.output.position();
        let limit = Duration::from_secs(10);
        self.run(&format!("guest {name} </dev/null >/dev/null 2>&1 &"), limit)?;
        Ok(Guest { name: name.to_owned(), cursor: start, start })
    }

    /// Creates a guest that waits for `xl unpause`.
    ///
    /// # Errors
    /// The lab died, or `xl` cannot create the guest.
    pub(crate) fn create_paused(&mut self, domain: &Domain) -> Result<Guest> {
        self.configure(&domain.name, &domain.config())?;
        let start = self.output.position();
        let (status, text) =
            self.run(&format!("paused {}", domain.name), Duration::from_secs(30))?;
        if status != 0 {
            bail!("xl create: {}", text.trim());
        }
        Ok(Guest { name: domain.name.clone(), cursor: start, start })
    }

    fn configure(&mut self, name: &str, text: &str) -> Result<()> {
        let command = format!("printf '%b' '{}' >/run/{name}.cfg", escaped(text));
        self.run(&command, Duration::from_secs(10))?;
        Ok(())
    }

    /// Creates a guest whose console is the port itself until it ends; gives the port to write to.
    ///
    /// Everything printed then comes through [`Self::output`]; the last line is `lab: ended NAME REASON`.
    ///
    /// # Errors
    /// The lab died.
    pub(crate) fn attach(&mut self, domain: &Domain) -> Result<UnixStream> {
        use std::io::Write as _;
        self.configure(&domain.name, &domain.config())?;
        self.port.write_all(format!("0 attach {}\n", domain.name).as_bytes())?;
        Ok(self.port.try_clone()?)
    }

    /// Types on a guest's console.
    ///
    /// # Errors
    /// The lab died.
    pub(crate) fn type_to(&mut self, guest: &Guest, text: &str) -> Result<()> {
        let command = format!("typed {} '{}'", guest.name, escaped(text));
        let (status, said) = self.run(&command, Duration::from_secs(10))?;
        if status != 0 {
            bail!("typing to the guest: {}", said.trim());
        }
        Ok(())
    }

    /// Waits for a line of a guest's console.
    ///
    /// # Errors
    /// It does not come in time, or the guest ends first.
    pub(crate) fn guest_line<T>(
        &self,
        guest: &mut Guest,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<(T, Instant)> {
        let prefix = format!("{}| ", guest.name);
        let ended = format!("lab: ended {} ", guest.name);
        let mut cursor = guest.cursor;
        let found = self.output.line(&mut cursor, Instant::now() + limit, |line| {
            if let Some(line) = line.strip_prefix(&prefix) {
                return wanted(line).map(Some);
            }
            line.starts_with(&ended).then_some(None)
        });
        match found {
            Ok((Some(found), at)) => {
                guest.cursor = cursor;
                Ok((found, at))
            }
            // The cursor stays before the end line, for `end` to find.
            Ok((None, _)) => Err(anyhow!("the guest ended")),
            Err(missed) => Err(anyhow!("the guest {missed}")),
        }
        .map_err(|error| {
            error.context(format!("last lines:{}", crate::console::tail(&self.said(guest), 12)))
        })
    }

    /// Waits for a guest's end; destroys it at the time limit.
    ///
    /// # Errors
    /// It did not end by itself; the message has its last lines.
    pub(crate) fn end(&mut self, guest: &Guest, limit: Duration) -> Result<Ended> {
        let marker = format!("lab: ended {} ", guest.name);
        let mut cursor = guest.start;
        let found = self.output.line(&mut cursor, Instant::now() + limit, |line| {
            line.strip_prefix(&marker).map(|reason| reason.trim().parse::<u32>().ok())
        });
        match found {
            Ok((reason, _)) => Ok(Ended { reason, console: self.said(guest) }),
            Err(Missed::Timeout) => {
                let said = crate::console::tail(&self.said(guest), 15);
                self.destroy(guest)?;
                bail!(
                    "the guest did not end within {:.0} s; last lines:{said}",
                    limit.as_secs_f32()
                )
            }
            Err(missed) => Err(self.failure("the lab died under a guest", missed)),
        }
    }

    /// Destroys a guest, if it still runs, and waits until it is gone.
    ///
    /// # Errors
    /// The lab died.
    pub(crate) fn destroy(&mut self, guest: &Guest) -> Result<()> {
        self.run(&format!("destroy {}", guest.name), Duration::from_secs(20))?;
        let marker = format!("lab: ended {} ", guest.name);
        let deadline = Instant::now() + Duration::from_secs(10);
        self.output
            .line(&mut guest.start.clone(), deadline, |line| {
                line.starts_with(&marker).then_some(())
            })
            .map_err(|missed| self.failure("a destroyed guest is still there", missed))?;
        Ok(())
    }

    /// What a guest has printed so far (and what `xl` said, if it could not create it).
    pub(crate) fn said(&self, guest: &Guest) -> String {
        let text = self.output.text();
        let mut out = String::new();
        for line in text.get(guest.start..).unwrap_or_default().lines() {
            let rest = line.strip_prefix(guest.name.as_str());
            if let Some(line) =
                rest.and_then(|rest| rest.strip_prefix("| ").or(rest.strip_prefix("! ")))
            {
                out.push_str(line);
                out.push('\n');
            }
        }
        out
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.machine.kill();
        // What is left behind is only lost space under target/.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A guest in the lab.
#[derive(Debug)]
pub(crate) struct Guest {
    name: String,
    cursor: usize,
    start: usize,
}

impl Guest {
    /// Its name for `xl`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// Boots an image straight under Xen in the place of dom0: boot, memory, traps, events and timers in
/// about a second, but no devices. A PVH dom0 needs an IOMMU.
///
/// # Errors
/// A package is missing.
pub(crate) fn dom0_smoke(mode: Mode, image: &Path, command_line: &str) -> Result<Command> {
    let parts = dom0::assemble()?;
    let (machine, more) = match mode {
        Mode::Pv => ("pc", "dom0=pv"),
        Mode::Pvh => ("q35", "dom0=pvh iommu=no-intremap"),
    };
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-M", machine, "-cpu", CPU, "-smp", "1", "-m", "512"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(&parts.xen)
        .arg("-append")
        .arg(format!("dom0_mem=128M console=com1 com1=115200 loglvl=warning {more}"))
        .arg("-initrd")
        // QEMU splits modules at commas; a doubled one stands for itself.
        .arg(format!("{} {}", image.display(), command_line.replace(',', ",,")));
    if mode == Mode::Pvh {
        qemu.args(["-device", "amd-iommu"]);
    }
    Ok(qemu)
}

impl Domain {
    /// Its configuration for `xl`.
    fn config(&self) -> String {
        let mut text = format!(
            "name=\"{}\"\ntype=\"{}\"\nkernel=\"{}\"\nmemory={}\nvcpus={}\nextra=\"{}\"\n",
            self.name,
            self.mode.name(),
            self.kernel,
            self.memory_mib,
            self.cpus,
            self.command_line.replace('\\', "\\\\").replace('"', "\\\"")
        );
        text.push_str("on_poweroff=\"destroy\"\non_reboot=\"destroy\"\non_crash=\"destroy\"\n");
        if let Some(ramdisk) = &self.ramdisk {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "ramdisk=\"{ramdisk}\"");
        }
        let disks: Vec<String> = self
            .disks
            .iter()
            .zip('a'..='z')
            .map(|(device, letter)| {
                format!(
                    "\"format=raw,vdev=xvd{letter},access=rw,script=janus-block,target={device}\""
                )
            })
            .collect();
        let _ = writeln!(text, "disk=[{}]", disks.join(","));
        if self.network {
            text.push_str("vif=[\"mac=00:16:3e:00:00:02,script=janus-vif\"]\n");
        }
        text
    }
}

/// Text as it stands between single quotes for the shell, and then for printf's %b.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('\'', "'\\''")
}

fn is_guest_line(line: &str) -> bool {
    let word = line.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(line.len());
    word > 0 && matches!(line.get(word..word + 2), Some("| " | "! "))
}

/// A directory for one run of a lab.
fn own_directory() -> Result<PathBuf> {
    Ok(paths::cache(&format!("lab/run-{}-{}", std::process::id(), unique()))?)
}

/// An initramfs of a base and the files of this run, as `/images/NAME`.
fn initramfs(base: &Path, directory: &Path, images: &[(String, PathBuf)]) -> Result<PathBuf> {
    let mut bytes = std::fs::read(base)?;
    let mut archive = Cpio::default();
    for (name, file) in images {
        let contents =
            std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        archive.file(&format!("images/{name}"), &contents);
    }
    bytes.extend(archive.finish());
    let file = directory.join("initramfs.cpio");
    std::fs::write(&file, bytes)?;
    Ok(file)
}

/// A number that no other lab of this process has.
fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Waits until QEMU connects, or has died.
fn accept(listener: &UnixListener, machine: &Process) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() > deadline || machine.errors.position() > 0 {
            std::thread::sleep(Duration::from_millis(100));
            bail!("QEMU did not start:{}", machine.errors.tail(5));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_lines_are_told_from_command_output() {
        assert!(is_guest_line("kxen-1| hello"));
        assert!(is_guest_line("a! xl: no"));
        assert!(!is_guest_line("a pipe | in a line"));
        assert!(!is_guest_line("| x"));
    }

    #[test]
    fn a_configuration_quotes_its_command_line() {
        let domain = Domain {
            name: "t".into(),
            mode: Mode::Pvh,
            kernel: "/images/k".into(),
            ramdisk: None,
            command_line: "--exec 'echo \"x\"'".into(),
            memory_mib: 64,
            cpus: 1,
            disks: vec!["/dev/vda".into(), "/dev/vdb".into()],
            network: true,
        };
        let config = domain.config();
        assert!(config.contains("extra=\"--exec 'echo \\\"x\\\"'\"\n"), "{config}");
        assert!(config.contains("vdev=xvda,") && config.contains("vdev=xvdb,"), "{config}");
    }
}
