//! `cargo xtask bench`: Janus beside Debian's Linux, as guests of the same machine with the same disk and
//! network, in turns, in one run.
//!
//! Absolute figures are those of an emulated CPU on this machine; the ratios are what counts.

mod figures;
mod guests;
mod monitor;
mod peer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::console::Echo;
use crate::lab::{Domain, Lab, Mode, Setup};
use crate::qemu::{self, Boot, Disk, Machine, Vm};
use crate::{disk, guest, packages};
use figures::{Figures, Metric, Side};
use guests::{InLab, InQemu, Ready, STREAM, STREAM_PORTS, Subject};
use peer::Peer;

/// Where to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// QEMU, virtio over PCI.
    Q35,
    /// QEMU, virtio over MMIO.
    Microvm,
    /// Real Xen, paravirtualised.
    XenPv,
    /// Real Xen, PVH.
    XenPvh,
    /// The bundled VMM, beside the machine itself and other VMMs of its kind.
    Monitor,
}

impl Where {
    fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
            Self::XenPv => "xen-pv",
            Self::XenPvh => "xen-pvh",
            Self::Monitor => "monitor",
        }
    }
}

/// Measures Janus beside Debian's Linux as guests.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArguments {
    /// Where; q35, microvm and xen-pv if not given; `monitor` measures the bundled VMM. May be repeated.
    #[arg(long = "on", value_enum)]
    places: Vec<Where>,
    /// Rounds: each boots both guests.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each disk measurement.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// Starts of each program on the monitor.
    #[arg(long, default_value_t = 50)]
    runs: u32,
    #[command(flatten)]
    outsiders: monitor::Outsiders,
    /// Prints JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Also writes the JSON to this file.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Guest memory, in MiB, for both.
const MEMORY: u32 = 256;
/// Fetches after the first.
const FETCHES: u32 = 3;
/// What a side prints when its disk is mounted, its address set and its server listening.
const fn ready_texts(side: Side) -> &'static [&'static str] {
    match side {
        Side::Janus | Side::Crate => &["janus: ready", "has the address"],
        Side::Linux => &["peer: ready"],
    }
}

/// What makes our image use the crate's drivers.
const CRATE_WORDS: &str = " virtio.disk=baseline virtio.net=baseline";

struct Bench<'a> {
    arguments: &'a BenchArguments,
    image: PathBuf,
    disk: PathBuf,
    figures: Figures,
}

/// Runs it.
///
/// # Errors
/// Something it needs is missing, or a guest does not do its work.
pub(crate) fn run(arguments: &BenchArguments) -> Result<ExitCode> {
    let mut failed = false;
    let (mut rows, monitor) = (Vec::new(), arguments.places.contains(&Where::Monitor));
    if monitor {
        // On a thread of its own, which is pinned.
        let measured = std::thread::scope(|scope| {
            scope.spawn(|| monitor::run(&arguments.outsiders, arguments.runs)).join()
        });
        (rows, failed) = measured.map_err(|_| anyhow::anyhow!("a measurement panicked"))??;
    }
    let places = match &*arguments.places {
        [] => &[Where::Q35, Where::Microvm, Where::XenPv][..],
        places => places,
    };
    let figures = if places.iter().all(|place| *place == Where::Monitor) {
        Figures::default()
    } else {
        let (figures, missed) = beside_linux(arguments, places)?;
        failed |= missed;
        figures
    };
    let mut json = figures.json();
    if monitor && let Some(json) = json.as_object_mut() {
        json.insert("monitor".into(), monitor::json(&rows));
    }
    let json = serde_json::to_string_pretty(&json)?;
    if let Some(file) = &arguments.output {
        std::fs::write(file, &json)?;
    }
    if arguments.json {
        println!("{json}");
    } else {
        if monitor {
            println!("\n{}", monitor::table(&rows));
        }
        if !figures.is_empty() {
            println!("\n{}", figures.table());
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Janus and Linux as guests; answers what was measured, and whether something failed.
fn beside_linux(arguments: &BenchArguments, places: &[Where]) -> Result<(Figures, bool)> {
    packages::ensure(&[packages::QEMU, packages::CLOUD])?;
    let image = guest::build(guest::DEFAULT_IMAGE)?;
    let (disk, _) = disk::files()?;
    let mut bench = Bench { arguments, image, disk, figures: Figures::default() };
    let mut failed = false;
    for place in places {
        let done = match place {
            Where::Q35 => bench.qemu(*place, Machine::Q35, "virtio_pci"),
            Where::Microvm => bench.qemu(*place, Machine::Microvm, "virtio_mmio"),
            Where::XenPv => bench.xen(*place, Mode::Pv),
            Where::XenPvh => bench.xen(*place, Mode::Pvh),
            // Measured by itself.
            Where::Monitor => Ok(()),
        };
        if let Err(error) = done {
            // What was measured until then, and elsewhere, is still worth showing.
            eprintln!("janus: bench {}: {error:#}", place.name());
            failed = true;
        }
    }
    Ok((bench.figures, failed))
}

impl Bench<'_> {
    fn qemu(&mut self, place: Where, machine: Machine, transport: &str) -> Result<()> {
        let peer = peer::make(place.name(), &[transport, "virtio_blk", "virtio_net"])?;
        for round in 1..=self.arguments.rounds {
            for side in [Side::Janus, Side::Crate, Side::Linux] {
                eprintln!("janus: bench {}, round {round}, {side:?}", place.name());
                let (mut subject, ready) = self.booted(machine, side, &peer)?;
                self.measure(place, side, "vda", ready, &mut subject)
                    .with_context(|| format!("{side:?} on {}", place.name()))?;
            }
        }
        Ok(())
    }

    /// Boots one side in QEMU until it is ready.
    ///
    /// Linux now and then fails to calibrate its clock on microvm and hangs: that boot is told and repeated.
    fn booted(&self, machine: Machine, side: Side, peer: &Peer) -> Result<(InQemu, Ready)> {
        let attempts = if side == Side::Linux { 4 } else { 1 };
        let mut error = None;
        for _ in 0..attempts {
            let mut subject = InQemu::start(&self.vm(machine, side, peer)?)?;
            match subject.ready(ready_texts(side)) {
                Ok(ready) => return Ok((subject, ready)),
                Err(missed) => {
                    eprintln!("janus: {side:?} did not boot: {missed:#}");
                    error = Some(missed);
                }
            }
        }
        Err(error.context("no attempt was made")?)
    }

    fn vm(&self, machine: Machine, side: Side, peer: &Peer) -> Result<Vm> {
        let address = "10.0.2.15/24";
        let mut vm = match side {
            Side::Janus | Side::Crate => {
                let mut vm = Vm::new(machine, Boot::Kernel(self.image.clone()));
                vm.append = format!("ip={address} gw=10.0.2.2");
                if side == Side::Crate {
                    vm.append.push_str(CRATE_WORDS);
                }
                vm
            }
            Side::Linux => {
                let mut vm = Vm::new(machine, Boot::Kernel(peer.kernel.clone()));
                vm.initrd = Some(peer.initramfs.clone());
                vm.append = format!(
                    "console=ttyS0 quiet panic=-1 reboot=t peer_disk=vda peer_address={address}"
                );
                vm
            }
        };
        vm.memory_mib = MEMORY;
        vm.disks.push(Disk { file: self.disk.clone(), keep_writes: false });
        let mut forwards = vec![(qemu::free_port(0)?, 80)];
        for port in STREAM_PORTS {
            forwards.push((qemu::free_port(0)?, port));
        }
        vm.forwards = Some(forwards);
        Ok(vm)
    }

    fn xen(&mut self, place: Where, mode: Mode) -> Result<()> {
        let peer = peer::make(place.name(), &["xen-blkfront", "xen-netfront"])?;
        let file = |name: &str, path: &Path| (name.to_owned(), path.to_owned());
        let setup = Setup {
            images: vec![
                file("janus", &self.image),
                file("linux", &peer.kernel),
                file("initramfs", &peer.initramfs),
            ],
            disks: vec![self.disk.clone()],
            dom0_mib: 768,
            machine_mib: 1536,
        };
        let mut lab = Lab::start(&setup, Echo::Quiet)?;
        // From memory: the disk of the emulated machine is not what is measured.
        let (status, text) = lab.run(
            &format!(
                "dd if=/dev/vda of=/dev/ram0 bs=1M && head -c {STREAM} /dev/zero >/tmp/stream"
            ),
            Duration::from_secs(60),
        )?;
        if status != 0 {
            bail!("in dom0: {text}");
        }
        let address = "10.0.0.2/24";
        for round in 1..=self.arguments.rounds {
            for side in [Side::Janus, Side::Linux] {
                eprintln!("janus: bench {}, round {round}, {side:?}", place.name());
                let (kernel, ramdisk, command_line) = match side {
                    Side::Janus | Side::Crate => {
                        ("janus", None, format!("ip={address} gw=10.0.0.1"))
                    }
                    Side::Linux => (
                        "linux",
                        Some("/images/initramfs".to_owned()),
                        format!(
                            "console=hvc0 quiet panic=-1 peer_disk=xvda peer_address={address}"
                        ),
                    ),
                };
                let domain = Domain {
                    name: format!("b{round}{}", kernel),
                    mode,
                    kernel: format!("/images/{kernel}"),
                    ramdisk,
                    command_line,
                    memory_mib: MEMORY,
                    cpus: 1,
                    disks: vec!["/dev/ram0".to_owned()],
                    network: true,
                };
                let mut subject = InLab::start(&mut lab, &domain)?;
                let ready = subject.ready(ready_texts(side))?;
                self.measure(place, side, "xvda", ready, &mut subject)
                    .with_context(|| format!("{side:?} on {}", place.name()))?;
                subject.destroy()?;
            }
        }
        Ok(())
    }

    /// Everything that is measured of one boot.
    fn measure(
        &mut self,
        place: Where,
        side: Side,
        disk: &str,
        ready: Ready,
        subject: &mut dyn Subject,
    ) -> Result<()> {
        self.figures.add(place.name(), Metric::Ready, side, ready.whole.as_secs_f64() * 1000.0);
        if let Some(own_ms) = ready.own_ms {
            self.figures.add(place.name(), Metric::GuestReady, side, own_ms);
        }
        let seconds = self.arguments.seconds;
        for (metric, pattern, size, depth) in [
            (Metric::Sequential, "seq", 1 << 20, 1),
            (Metric::Random1, "random", 4096, 1),
            (Metric::Random32, "random", 4096, 32),
        ] {
            let answer = subject.ask(
                &format!("bench {disk} {pattern} {size} {depth} {seconds}"),
                "janus-bench: ",
            )?;
            let rate = rate(&answer)?;
            let value = if metric == Metric::Sequential {
                rate * f64::from(size) / f64::from(1 << 20)
            } else {
                rate
            };
            self.figures.add(place.name(), metric, side, value);
        }
        for number in 0..=FETCHES {
            let (bytes, seconds) = subject.fetch(&format!("/{}", disk::BIG_FILE))?;
            if bytes != disk::BIG_FILE_BYTES as u64 {
                bail!("{bytes} bytes came instead of {}", disk::BIG_FILE_BYTES);
            }
            let metric = if number == 0 { Metric::HttpCold } else { Metric::Http };
            self.figures.add(place.name(), metric, side, 64.0 / seconds);
        }
        let [sink, source] = STREAM_PORTS;
        subject.ask(&format!("tcp-sink {sink} {STREAM}"), "listening on port")?;
        subject.push(sink)?;
        let answer = subject.answer("janus-bench: ")?;
        self.figures.add(place.name(), Metric::TcpIn, side, megabits(&answer)?);
        subject.ask(&format!("tcp-source {source} {STREAM}"), "listening on port")?;
        subject.pull(source)?;
        let answer = subject.answer("janus-bench: ")?;
        self.figures.add(place.name(), Metric::TcpOut, side, megabits(&answer)?);
        Ok(())
    }
}

/// `name` a microsecond, of a guest's `{"requests":N,"us":N,...}`.
fn per_microsecond(answer: &str, name: &str) -> Result<f64> {
    let value: serde_json::Value =
        serde_json::from_str(answer).with_context(|| answer.to_owned())?;
    let number = |name: &str| {
        value.get(name).and_then(serde_json::Value::as_f64).context("a number is missing")
    };
    Ok(number(name)? / number("us")?)
}

/// Requests a second.
fn rate(answer: &str) -> Result<f64> {
    Ok(per_microsecond(answer, "requests")? * 1e6)
}

/// Mbit/s of a stream, which is bits a microsecond.
fn megabits(answer: &str) -> Result<f64> {
    Ok(per_microsecond(answer, "bytes")? * 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_the_guests_line() {
        assert!((rate("{\"requests\":500,\"us\":250000}").unwrap() - 2000.0).abs() < 1e-9);
        assert!((megabits("{\"bytes\":1000,\"us\":80}").unwrap() - 100.0).abs() < 1e-9);
        assert!(rate("{}").is_err() && rate("x").is_err());
    }
}
