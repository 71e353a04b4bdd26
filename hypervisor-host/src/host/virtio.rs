//! virtio devices of a PV guest: registers in a frame that it may map, event channels for its interrupts and its
//! notifications, and nodes in xenstore that say where they are (`docs/virtio-on-xen.md`).

use std::sync::{Arc, OnceLock};

use janus_proto::abi::virtio::InterruptStatus;
use janus_proto::addr::{Mfn, PAGE_SIZE};
use janus_proto::xenstore::Request;

use super::console::{self, Endpoint};
use super::devices::{Host, HostError};
use super::home::Writer;
use crate::pv::domain::{Domain, HostPort};
use crate::virtio::Model;
use crate::virtio::memory::GuestMemory;
use crate::virtio::mmio::{Line, Mmio, WINDOW};
use crate::virtio::pv::{GrantedMemory, MachineMemory};
use crate::xenstored::{home, owned_by};

/// What a guest's virtio devices may use of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All of it, by machine address.
    #[default]
    Machine,
    /// What is granted to domain 0.
    Grants,
}

/// The guest's interrupts of one device.
#[derive(Debug, Default)]
struct Ports {
    queues: OnceLock<HostPort>,
    config: OnceLock<HostPort>,
}

impl Line for Ports {
    fn raise(&self, reason: InterruptStatus) {
        let port =
            if reason.contains(InterruptStatus::CONFIG) { &self.config } else { &self.queues };
        if let Some(port) = port.get() {
            // A guest that has closed its port does not want to know.
            let _ = port.notify();
        }
    }
}

/// A device that is plugged in; dropping it takes the registers away.
#[derive(Debug)]
pub(super) struct Plugged {
    domain: Arc<Domain>,
    frame: Mfn,
    mmio: Arc<Mmio>,
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.domain.remove_registers(self.frame);
    }
}

impl Plugged {
    fn new(
        domain: &Arc<Domain>,
        model: Box<dyn Model>,
        reach: Reach,
    ) -> Result<(Self, [u32; 2]), HostError> {
        let memory: Arc<dyn GuestMemory> = match reach {
            Reach::Machine => Arc::new(MachineMemory::new(domain)),
            Reach::Grants => Arc::new(GrantedMemory::new(domain.grants())),
        };
        let ports = Arc::new(Ports::default());
        let mmio = Mmio::new(model, memory, ports.clone());
        let device = Arc::downgrade(mmio.device());
        let notified = move || {
            if let Some(device) = device.upgrade() {
                device.notify_all();
            }
        };
        let queues = domain.bind(Arc::new(notified)).map_err(HostError::Port)?;
        let config = domain.bind(Arc::new(|| ())).map_err(HostError::Port)?;
        let numbers = [&queues, &config].map(|port| port.guest_port().0);
        // Nobody else sets them.
        let _ = (ports.queues.set(queues), ports.config.set(config));
        let frame = domain.add_registers(mmio.clone()).ok_or(HostError::Full("virtio device"))?;
        Ok((Self { domain: Arc::clone(domain), frame, mmio }, numbers))
    }
}

impl Host {
    /// Plugs in a virtio device; it has the next number of `device/virtio`. To be called before the guest runs: PV
    /// guests look for such devices once.
    ///
    /// # Errors
    /// There are as many devices, or event channels, as can be.
    pub fn plug_virtio(&self, model: Box<dyn Model>, reach: Reach) -> Result<(), HostError> {
        let domain = self.guest();
        let id = domain.id();
        let (device, [queues, config]) = Plugged::new(domain, model, reach)?;
        let kind = format!("virtio,device{:x}", device.mmio.device().id().0);
        let base = format!("{:#x}", device.frame.0 * PAGE_SIZE as u64);
        let grant_usage = if reach == Reach::Grants { "1" } else { "0" };
        self.with_virtio(|writer, devices| {
            let number = devices.len();
            let front = format!("{}/device/virtio/{number}", home(id));
            let back =
                format!("{}/backend/virtio/{id}/{number}", home(janus_proto::addr::DomId(0)));
            let common = [
                ("type", kind.as_str()),
                ("transport", "mmio"),
                ("base", &base),
                ("grant_usage", grant_usage),
            ];
            let host = janus_proto::addr::DomId(0);
            for path in [&front, &back] {
                writer.ask(&Request::MakeDirectory(path))?;
                let permissions = owned_by(host, id);
                writer.ask(&Request::SetPermissions { path, permissions })?;
                for (name, value) in common {
                    writer.write(&format!("{path}/{name}"), value)?;
                }
            }
            for (path, name, value) in [
                (&front, "backend", back.as_str()),
                (&front, "backend-id", "0"),
                (&front, "size", &WINDOW.to_string()),
                (&front, "event-channel", &queues.to_string()),
                (&front, "event-channel-config", &config.to_string()),
                (&back, "frontend", &front),
                (&back, "frontend-id", &id.to_string()),
                (&back, "online", "1"),
            ] {
                writer.write(&format!("{path}/{name}"), value)?;
            }
            devices.push(device);
            Ok(())
        })
    }

    /// Plugs in a virtio console that goes to these places, beside the one that every guest has.
    ///
    /// # Errors
    /// As [`Self::plug_virtio`]; and the places cannot be had.
    pub fn plug_virtio_console(
        &self,
        endpoints: Vec<Endpoint>,
        reach: Reach,
    ) -> Result<(), HostError> {
        let (device, daemon) = console::virtio(endpoints, self.events())?;
        self.plug_virtio(Box::new(device), reach)?;
        self.keep_console(daemon);
        Ok(())
    }

    fn with_virtio<R>(&self, action: impl FnOnce(&mut Writer<'_>, &mut Vec<Plugged>) -> R) -> R {
        self.with_writer(|writer| {
            let mut devices = self.virtio_devices();
            action(writer, &mut devices)
        })
    }
}
