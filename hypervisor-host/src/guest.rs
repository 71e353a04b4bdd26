//! A guest from its description to its end: builds the domain, surrounds it, starts it.

pub(crate) mod virtio;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{DomId, Port};

pub use self::virtio::{Bus, VirtioConsolePlace, VirtioDevices};
use crate::engine::monitor::Monitor;
use crate::engine::{EngineError, Vcpu};
use crate::host::{DiskOptions, Endpoint, Host, HostError, Identity, Image, Network, PlugError};
use crate::machine::contents::Contents;
use crate::pv::builder::{self, BuildError, Cause, Kernel};
use crate::pv::domain::{Domain, Ended, FirstCpu, Setup};
use crate::pv::mm::Size;
use crate::pv::mm::space::SharedMemory;
pub use crate::storage::open::{DiskFile, Format, Writes};
use crate::storage::open::{OpenError, open};
use crate::usernet::{Config as NetConfig, StartError, UserNet};

/// Frames of 4 KiB in a MiB.
const FRAMES_PER_MIB: u64 = 256;
/// The end of what a process has.
const LOWER_HALF: u64 = 1 << 47;
/// Linux's number of `xvda`; every further disk is 16 later.
const FIRST_DISK: u32 = 51712;
/// How a disk's number grows.
const DISK_STEP: u32 = 16;

/// The number of a disk by its name (`xen-vbd-interface(7)`): `xvda`, `hdc`, `sdb`, or a plain number.
#[must_use]
pub fn disk_number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let (kind, letter) = name.split_at_checked(name.len().checked_sub(1)?)?;
    let index = letter.bytes().next()?.checked_sub(b'a').filter(|index| *index < 26)?;
    let index = u32::from(index);
    match kind {
        "xvd" if index < 16 => Some(FIRST_DISK + index * DISK_STEP),
        "sd" if index < 16 => Some((8 << 8) + index * DISK_STEP),
        "hd" if index < 2 => Some((3 << 8) + index * 64),
        "hd" if index < 4 => Some((22 << 8) + (index - 2) * 64),
        _ => None,
    }
}

/// A guest to be made.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its kernel's file.
    pub kernel: PathBuf,
    /// Its initial RAM disk, if there is one.
    pub module: Option<PathBuf>,
    /// Its command line.
    pub command_line: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// What its memory may grow to while it runs, in MiB; less than it has: it may not.
    pub max_memory_mib: u64,
    /// Its UUID; `None`: a random one.
    pub uuid: Option<[u8; 16]>,
    /// Its virtual CPUs.
    pub vcpus: usize,
    /// Its disks: `xvda`, `xvdb`, ...
    pub disks: Vec<DiskFile>,
    /// Its cards, each on a network of its own.
    pub networks: Vec<Card>,
    /// Its virtio devices beside disks and cards.
    pub virtio: VirtioDevices,
    /// Where its xenstore is served to the host's own tools.
    pub store_socket: Option<PathBuf>,
    /// It is paused once before its first instruction: [`Domain::unpause`] starts it.
    pub paused: bool,
}

/// A network card of a guest.
#[derive(Clone, Debug)]
pub struct Card {
    /// What it is plugged into.
    pub kind: NetworkKind,
    /// Its address; `None`: one of Xen's, made from the guest's UUID.
    pub mac: Option<[u8; 6]>,
    /// Its protocol.
    pub bus: Bus,
}

/// What a card is plugged into.
#[derive(Clone, Debug)]
pub enum NetworkKind {
    /// A network that needs no rights on the host.
    User(NetConfig),
    /// A TAP interface of the host.
    Tap(String),
}

/// A guest cannot be started.
#[derive(Debug)]
pub enum GuestError {
    /// A file cannot be read.
    File(PathBuf, io::Error),
    /// A disk cannot be had.
    Disk(PathBuf, OpenError),
    /// The kernel cannot be built into a domain.
    Build(BuildError),
    /// The domain cannot be made.
    Domain(Errno),
    /// Its surroundings cannot be made.
    Host(HostError),
    /// Its network cannot be had.
    Network(StartError),
    /// The engine cannot start.
    Engine(EngineError),
    /// The host has no thread left.
    Thread(io::Error),
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file, error) => write!(f, "{}: {error}", file.display()),
            Self::Disk(file, error) => write!(f, "{}: {error}", file.display()),
            Self::Build(error) => error.fmt(f),
            Self::Domain(error) => write!(f, "the domain cannot be made: {error}"),
            Self::Host(error) => error.fmt(f),
            Self::Network(error) => error.fmt(f),
            Self::Engine(error) => write!(f, "the engine cannot start: {error}"),
            Self::Thread(error) => write!(f, "no thread for a virtual CPU: {error}"),
        }
    }
}

impl std::error::Error for GuestError {}

impl From<StartError> for GuestError {
    fn from(error: StartError) -> Self {
        Self::Network(error)
    }
}

impl From<HostError> for GuestError {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

/// A guest; its first CPU runs while somebody waits in [`Guest::run`]. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    /// The domain.
    pub domain: Arc<Domain>,
    /// Its store, console and devices.
    pub host: Host,
    /// Its memory.
    pub memory: Arc<SharedMemory>,
    networks: Vec<UserNet>,
    first: Mutex<Option<FirstCpu>>,
}

/// The address of a card that was given none.
pub(crate) fn own_mac(uuid: [u8; 16], handle: u32) -> [u8; 6] {
    let [a, b, c, ..] = uuid;
    // Xen's own prefix.
    [0x00, 0x16, 0x3e, a & 0x7f, b, c.wrapping_add(handle.to_le_bytes()[0])]
}

/// Opens a disk.
pub(crate) fn image(disk: &DiskFile) -> Result<Image, GuestError> {
    open(disk).map_err(|error| GuestError::Disk(disk.file.clone(), error))
}

/// A UUID that is as good as random: of this process and this moment.
pub(crate) fn uuid() -> [u8; 16] {
    let mut bytes = [0; 16];
    if File::open("/dev/urandom")
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut bytes))
        .is_err()
    {
        let time = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos());
        bytes = (time ^ u128::from(std::process::id()) << 96).to_ne_bytes();
    }
    // Version 4, variant 1 (RFC 9562).
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    bytes
}

/// Refuses a kernel that is entered where the host's kernel lives.
fn in_lower_half(entry: u64) -> Result<(), Cause> {
    if entry < LOWER_HALF { Ok(()) } else { Err(Cause::UpperHalf(entry)) }
}

/// Whether a kernel is for the monitor: a PV kernel of the lower half, or a file in which only the monitor's builder
/// knows what is wrong.
#[must_use]
pub fn suits_monitor(kernel: &Path) -> bool {
    /// "HdrS" at 0x202: a bzImage.
    const LINUX: std::ops::Range<usize> = 0x202..0x206;
    let Ok(file) = read(kernel) else { return true };
    match Kernel::parse(&file) {
        Ok(kernel) => in_lower_half(kernel.entry).is_ok(),
        Err(Cause::OnlyPvh | Cause::NoNotes) => false,
        Err(Cause::NotElf) => file.get(LINUX) != Some(b"HdrS"),
        Err(_) => true,
    }
}

fn read(path: &Path) -> Result<Contents, GuestError> {
    Contents::of(path).map_err(|error| GuestError::File(path.to_owned(), error))
}

/// What is around a domain: its store, console and devices, and the networks of its cards. The frames of its console's
/// and its store's ring are `rings`, and `disks` the images of the description's.
pub(crate) fn surround(
    domain: &Arc<Domain>,
    description: &Description,
    rings: (u64, u64),
    disks: Vec<Image>,
    console: Vec<Endpoint>,
) -> Result<(Host, Vec<UserNet>), GuestError> {
    let max_memory_mib = description.max_memory_mib.max(description.memory_mib);
    let identity = Identity {
        name: description.name.clone(),
        uuid: domain.uuid(),
        memory_kib: description.memory_mib * 1024,
        max_memory_kib: max_memory_mib * 1024,
        vcpus: description.vcpus,
        rings,
    };
    let host = Host::with_console(domain, &identity, console)?;
    if let Some(socket) = &description.store_socket {
        host.listen_store(socket)?;
    }
    let numbers = (FIRST_DISK..).step_by(DISK_STEP as usize);
    for ((number, disk), image) in numbers.zip(&description.disks).zip(disks) {
        if disk.bus == Bus::Virtio {
            let reach = description.virtio.reach;
            virtio::plug_disk(&host, reach, disk, image, description.vcpus)?;
            continue;
        }
        // Direct I/O waits for the device, and the guest's CPU shall not.
        let options = DiskOptions { worker: disk.direct, ..DiskOptions::default() };
        host.plug_disk_with(disk.number.unwrap_or(number), image, options)?;
    }
    let mut networks = Vec::new();
    for (handle, card) in (0u32..).zip(&description.networks) {
        let mac = card.mac.unwrap_or_else(|| own_mac(domain.uuid(), handle));
        if card.bus == Bus::Virtio {
            let reach = description.virtio.reach;
            networks.extend(virtio::plug_card(&host, reach, mac, &card.kind)?);
            continue;
        }
        let config = match &card.kind {
            NetworkKind::User(config) => config,
            NetworkKind::Tap(name) => {
                host.plug_tap(handle, mac, name)?;
                continue;
            }
        };
        host.plug_card(handle, mac, |bell| {
            let (network, backend) = UserNet::start(config.clone(), Arc::new(move || bell.ring()))?;
            networks.push(network);
            Ok(Box::new(backend) as Network)
        })
        .map_err(|error| match error {
            PlugError::Network(error) => GuestError::Network(error),
            PlugError::Host(error) => GuestError::Host(error),
        })?;
    }
    virtio::plug_others(&host, &description.virtio)?;
    Ok((host, networks))
}

impl Guest {
    /// Makes a guest that is ready to run; its console goes to `console`.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn start(description: &Description, console: Vec<Endpoint>) -> Result<Self, GuestError> {
        static LAST: AtomicU16 = AtomicU16::new(0);
        // Disks first: whether they can be had does not depend on the guest.
        let disks: Result<Vec<_>, _> = description.disks.iter().map(image).collect();
        let kernel = read(&description.kernel)?;
        let module = description.module.as_deref().map(read).transpose()?;
        let pages = description.memory_mib * FRAMES_PER_MIB;
        let max_memory_mib = description.max_memory_mib.max(description.memory_mib);
        let max_pages = max_memory_mib * FRAMES_PER_MIB;
        let built = builder::build(&builder::Config {
            name: &description.kernel.display().to_string(),
            kernel: &kernel,
            module: module.as_deref(),
            command_line: &description.command_line,
            size: Size { pages, max_pages, vcpus: description.vcpus },
            store_port: Port(1),
            console_port: Port(2),
            hypercall_page: &Monitor::hypercall_page(),
        })
        .map_err(GuestError::Build)?;
        in_lower_half(built.registers.rip)
            .map_err(|cause| BuildError { file: description.kernel.display().to_string(), cause })
            .map_err(GuestError::Build)?;
        let memory = SharedMemory::new(built.memory);
        let setup = Setup {
            id: DomId(LAST.fetch_add(1, Ordering::Relaxed) % 0x7000 + 1),
            uuid: description.uuid.unwrap_or_else(uuid),
            vcpus: description.vcpus,
            ram: Arc::clone(memory.ram()),
            shared_info: built.shared_info,
            grant_frames: built.grant_frames,
            console: built.console,
            store: built.store,
        };
        let engines =
            Monitor::new(Arc::clone(&setup.ram), setup.vcpus).map_err(GuestError::Engine)?;
        let domain = Domain::new(&setup, memory.clone()).map_err(GuestError::Domain)?;
        let rings = (built.console.0, built.store.0);
        let (host, networks) = surround(&domain, description, rings, disks?, console)?;
        if description.paused {
            domain.pause();
        }
        let engines = engines.into_iter().map(|cpu| Box::new(cpu) as Box<dyn Vcpu>).collect();
        let first = domain.start_here(engines, built.registers).map_err(GuestError::Thread)?;
        let first = Mutex::new(Some(first));
        Ok(Self { domain, host, memory, networks, first })
    }

    /// Its networks.
    #[must_use]
    pub fn networks(&self) -> &[UserNet] {
        &self.networks
    }

    /// Runs it to its end, and takes what it printed last. The first CPU runs on the calling thread: one thread less to
    /// make, to wake and to end, for a guest that may live for less than a millisecond.
    pub fn run(&self) -> Arc<Ended> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(first) = first {
            first.run();
        }
        let ended = self.domain.wait();
        self.host.close_consoles();
        ended
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.domain.destroy();
        drop(self.first.lock().unwrap_or_else(PoisonError::into_inner).take());
        let _ = self.domain.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_the_upper_half_are_refused_by_name() {
        assert!(in_lower_half(0x20_1000).is_ok() && in_lower_half(LOWER_HALF - 1).is_ok());
        let linux = 0xffff_ffff_8304_c1c0;
        assert_eq!(in_lower_half(linux), Err(Cause::UpperHalf(linux)));
        assert!(Cause::UpperHalf(linux).to_string().contains("0xffffffff8304c1c0"));
    }

    #[test]
    fn disks_have_the_numbers_that_their_names_say() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvdb", 51728),
            ("hda", 768),
            ("hdb", 832),
            ("hdd", 5696),
            ("sdb", 2064),
            ("51760", 51760),
        ] {
            assert_eq!(disk_number(name), Some(number), "{name}");
        }
        for name in ["", "a", "xvd", "xvdA", "xvdz", "hde", "fda", "xvdaa", "-1"] {
            assert_eq!(disk_number(name), None, "{name}");
        }
    }
}
