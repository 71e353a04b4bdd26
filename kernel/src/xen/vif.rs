//! A network card on the xenbus: [`janus_front::xen::netfront`] between xenstore and the network stack.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use janus_front::class::NetOffloads;
use janus_front::xen::grants::Grave;
use janus_front::xen::netfront_queues::NetfrontQueues;
use janus_front::xen::netfront_xs::{OFFER_NODES, OWN_NODES, Offer};
use janus_proto::addr::Port;
use janus_proto::xenbus::Handshake;

use super::bus::{BusError, Place};
use crate::devices;
use crate::irq::evtchn::{self, EventChannel, EventError};
use crate::net::Net;
use crate::task;

/// A card in any state.
#[derive(Default)]
pub(super) struct Vif {
    published: Option<NetfrontQueues>,
    served: Option<(Arc<Net>, Vec<EventChannel>)>,
    grave: Grave,
}

impl Vif {
    pub(super) const HANDSHAKE: Handshake = Handshake::Connected;

    /// Makes the rings and tells the backend of them.
    pub(super) async fn publish(&mut self, place: &Place) -> Result<(), BusError> {
        let backend = place.store.read_nodes(&place.back, OFFER_NODES);
        let own = place.store.read_nodes(&place.front, OWN_NODES);
        let (backend, own) = task::join(backend, own).await;
        let offer = Offer::read(&backend?, &own?, NetOffloads::all())?;
        let queues = super::wanted_queues();
        let mut device = NetfrontQueues::new(place.hal, place.peer, offer, queues, &self.grave)?;
        janus_front::class::NetDevice::kick(&mut device);
        let nodes = device.publication();
        self.published = Some(device);
        Ok(place.store.write_each(&place.front, &nodes).await?)
    }

    /// Registers the card; answers its name.
    pub(super) fn connect(&mut self, place: &Place) -> Result<String, BusError> {
        let Some(device) = self.published.take() else { return Err(BusError::NoBackend) };
        let ports = device.ports();
        let name = format!("eth{}", place.number);
        let net =
            Net::start(name.clone(), Box::new(device), place.hal.frames(), crate::cpu::rdtsc());
        let attach = |port: Port| -> Result<EventChannel, EventError> {
            let woken = Arc::clone(&net);
            evtchn::attach(port, "vif", Box::new(move || woken.interrupt()))
        };
        let channels: Result<Vec<_>, EventError> = ports.into_iter().map(attach).collect();
        let channels = match channels {
            Ok(channels) => channels,
            Err(error) => {
                net.detach();
                return Err(error.into());
            }
        };
        devices::add_net(Arc::clone(&net));
        self.served = Some((net, channels));
        Ok(name)
    }

    /// Takes the card out; its sockets end.
    pub(super) fn stop(&mut self) {
        if let Some((net, channels)) = self.served.take() {
            devices::remove_net(&net);
            drop(channels);
        }
        // It puts itself into the grave.
        drop(self.published.take());
    }

    /// Frees what the backend has let go of.
    pub(super) fn release(&mut self) {
        self.grave.empty();
    }
}
