//! A disk on the xenbus: [`janus_front::xen::blkfront`] between xenstore and the block layer.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use janus_front::xen::blkfront_queues::QueuesSetup;
use janus_front::xen::blkfront_xs::{DETAIL_NODES, Details, OFFER_NODES, Offer};
use janus_front::xen::grants::Grave;
use janus_proto::xenbus::Handshake;

use super::bus::{BusError, Place};
use crate::block::Block;
use crate::devices;
use crate::irq::evtchn::{self, EventChannel};

/// A disk in any state.
#[derive(Default)]
pub(super) struct Vbd {
    setup: Option<QueuesSetup>,
    served: Option<(Arc<Block>, Vec<EventChannel>)>,
    grave: Grave,
}

impl Vbd {
    pub(super) const HANDSHAKE: Handshake = Handshake::Initialised;

    /// Makes a ring and tells the backend of it.
    pub(super) async fn publish(&mut self, place: &Place) -> Result<(), BusError> {
        let backend = place.store.read_nodes(&place.back, OFFER_NODES).await?;
        let offer = Offer::read(&backend)?;
        let setup = QueuesSetup::new(place.hal, place.peer, offer, super::wanted_queues())?;
        let nodes = setup.publication();
        self.setup = Some(setup);
        Ok(place.store.write_each(&place.front, &nodes).await?)
    }

    /// Registers the disk; answers its name.
    pub(super) async fn connect(&mut self, place: &Place) -> Result<String, BusError> {
        let backend = place.store.read_nodes(&place.back, DETAIL_NODES).await?;
        let details = Details::read(&backend)?;
        let Some(setup) = self.setup.take() else { return Err(BusError::NoBackend) };
        let ports = setup.ports();
        let handle = u16::try_from(place.number & 0xffff).unwrap_or(0);
        let device = setup.connect(details, handle, &self.grave);
        let name = disk_name(place.number);
        let frames = place.hal.frames();
        let block = Block::start(name.clone(), Box::new(device), frames);
        let attach = |port| {
            let woken = Arc::clone(&block);
            evtchn::attach(port, "vbd", Box::new(move || woken.interrupt()))
        };
        let channels: Result<Vec<_>, _> = ports.into_iter().map(attach).collect();
        let channels = match channels {
            Ok(channels) => channels,
            Err(error) => {
                block.detach();
                return Err(error.into());
            }
        };
        devices::add_block(Arc::clone(&block));
        self.served = Some((block, channels));
        Ok(name)
    }

    /// Takes the disk out; what waits for it fails.
    pub(super) fn stop(&mut self) {
        if let Some((block, channels)) = self.served.take() {
            devices::remove_block(&block);
            drop(channels);
        }
        if let Some(setup) = self.setup.take() {
            setup.bury(&self.grave);
        }
    }

    /// Frees what the backend has let go of.
    pub(super) fn release(&mut self) {
        self.grave.empty();
    }
}

/// The name that Linux gives the disk of a virtual device number (`docs/man/xen-vbd-interface.7`).
fn disk_name(number: u32) -> String {
    let (kind, disk, partition) = if number & (1 << 28) != 0 {
        ("xvd", (number & !(1 << 28)) >> 8, number & 0xff)
    } else {
        match number >> 8 {
            202 => ("xvd", (number & 0xff) >> 4, number & 0xf),
            8 => ("sd", (number & 0xff) >> 4, number & 0xf),
            3 => ("hd", (number & 0xff) >> 6, number & 0x3f),
            22 => ("hd", 2 + ((number & 0xff) >> 6), number & 0x3f),
            _ => return format!("vbd{number}"),
        }
    };
    let mut letters = String::new();
    let mut rest = disk + 1;
    while rest > 0 {
        rest -= 1;
        let letter = u8::try_from(rest % 26).unwrap_or(0) + b'a';
        letters.insert(0, char::from(letter));
        rest /= 26;
    }
    if partition == 0 { format!("{kind}{letters}") } else { format!("{kind}{letters}{partition}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_as_linux_names_them() {
        for (number, name) in [
            (51712, "xvda"),
            (51713, "xvda1"),
            (51728, "xvdb"),
            (51952, "xvdp"),
            ((1 << 28) | (16 << 8), "xvdq"),
            ((1 << 28) | (26 << 8) | 3, "xvdaa3"),
            (768, "hda"),
            (832, "hdb"),
            (5632, "hdc"),
            (2048, "sda"),
            (2065, "sdb1"),
            (77, "vbd77"),
        ] {
            assert_eq!(disk_name(number), name, "{number}");
        }
    }
}
