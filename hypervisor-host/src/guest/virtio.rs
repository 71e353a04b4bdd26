//! The virtio devices of a guest: what they are made of, and how the monitor plugs them in.

use std::path::PathBuf;

use super::{DiskFile, GuestError, NetConfig, NetworkKind};
use crate::host::{Doorbell, Endpoint, Host, Image, Network, Reach, tap::Tap};
use crate::usernet::UserNet;
use crate::virtio::Model;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;

/// The protocol of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bus {
    /// Xen's own, which every Xen guest knows.
    #[default]
    Xen,
    /// virtio, over MMIO.
    Virtio,
}

impl std::str::FromStr for Bus {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "xen" => Ok(Self::Xen),
            "virtio" => Ok(Self::Virtio),
            _ => Err(format!("`{text}` is not a bus: xen, virtio")),
        }
    }
}

/// virtio devices beside disks and cards, and what all of them may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioDevices {
    /// What they may use of the guest's memory.
    pub reach: Reach,
    /// An entropy source.
    pub rng: bool,
    /// A balloon.
    pub balloon: bool,
    /// Consoles, beside the one that every guest has.
    pub consoles: Vec<VirtioConsolePlace>,
}

/// Where a virtio console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VirtioConsolePlace {
    /// A file, for output only.
    File(PathBuf),
    /// A new pseudo terminal.
    Pty,
    /// A socket.
    Socket(PathBuf),
}

impl std::str::FromStr for VirtioConsolePlace {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "pty" => Ok(Self::Pty),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(format!("`{text}` is no place for a console: file:PATH, socket:PATH, pty")),
        }
    }
}

/// A disk's device.
pub(crate) fn disk_model(disk: &DiskFile, image: Image, queues: usize) -> Box<dyn Model> {
    let name = disk.file.file_name().unwrap_or_default().to_string_lossy();
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    let model = Blk::new(image, queues, &name);
    // Direct I/O waits for the device, and the guest's CPU shall not.
    Box::new(if disk.direct { model.on_threads() } else { model })
}

/// A card's device on a network that needs no rights, and the network.
pub(crate) fn card_model(
    mac: [u8; 6],
    config: &NetConfig,
) -> Result<(Box<dyn Model>, UserNet), GuestError> {
    let mut ours = None;
    let model = Net::new(mac, 1, |bell| {
        let (network, backend) = UserNet::start(config.clone(), bell)?;
        ours = Some(network);
        Ok::<_, GuestError>(Box::new(backend) as Network)
    })?;
    let ours = ours.expect("the network was started to make the device");
    Ok((Box::new(model), ours))
}

/// Plugs in a disk.
pub(super) fn plug_disk(
    host: &Host,
    reach: Reach,
    disk: &DiskFile,
    image: Image,
    queues: usize,
) -> Result<(), GuestError> {
    Ok(host.plug_virtio(disk_model(disk, image, queues), reach)?)
}

/// Plugs in a card; answers its network, if that is one of ours.
pub(super) fn plug_card(
    host: &Host,
    reach: Reach,
    mac: [u8; 6],
    network: &NetworkKind,
) -> Result<Option<UserNet>, GuestError> {
    let name = match network {
        NetworkKind::User(config) => {
            let (model, ours) = card_model(mac, config)?;
            host.plug_virtio(model, reach)?;
            return Ok(Some(ours));
        }
        NetworkKind::Tap(name) => name,
    };
    let model = Net::new(mac, 1, |bell| {
        let tap = Tap::open(name, host.events(), Doorbell::new(move || bell()));
        let tap = tap.map_err(|error| GuestError::File(name.into(), error))?;
        Ok::<_, GuestError>(Box::new(tap) as Network)
    })?;
    host.plug_virtio(Box::new(model), reach)?;
    Ok(None)
}

/// Plugs in the others.
pub(super) fn plug_others(host: &Host, devices: &VirtioDevices) -> Result<(), GuestError> {
    if devices.rng {
        let rng = Rng::new();
        let rng = rng.map_err(|error| GuestError::File("/dev/urandom".into(), error))?;
        host.plug_virtio(Box::new(rng), devices.reach)?;
    }
    if devices.balloon {
        let (balloon, _) = Balloon::new();
        host.plug_virtio(Box::new(balloon), devices.reach)?;
    }
    for place in &devices.consoles {
        let endpoint = match place {
            VirtioConsolePlace::File(path) => Endpoint::File(path.clone()),
            VirtioConsolePlace::Pty => Endpoint::Pty,
            VirtioConsolePlace::Socket(path) => Endpoint::Socket(path.clone()),
        };
        host.plug_virtio_console(vec![endpoint], devices.reach)?;
    }
    Ok(())
}
