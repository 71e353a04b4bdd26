//! What the daemons need of a domain.

use std::sync::Arc;

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{DomId, Port};

use crate::memory::GrantMapper;
use crate::pv::domain::{Domain, HostPort};
use crate::pv::events::Handler;
use crate::pv::grant::Grants;

/// The host's end of an event channel; dropping it lets go of the channel.
pub trait Notify: Send + Sync + 'static {
    /// Sends the guest an event.
    fn notify(&self);
    /// The guest's number for the port.
    fn guest_port(&self) -> Port;
}

/// A domain, as its daemons see it.
pub trait Guest: Clone + Send + Sync + 'static {
    /// Its grants to domain 0.
    type Grants: GrantMapper<Mapping: Send + Sync> + Clone + Send + Sync + 'static;
    /// An event channel.
    type Port: Notify;
    /// Its number.
    fn id(&self) -> DomId;
    /// Its grants to domain 0.
    fn grants(&self) -> Self::Grants;
    /// Makes a port of the guest's; `handler` runs on the thread that sends, and must not wait.
    ///
    /// # Errors
    /// No port left.
    fn bind(&self, handler: Handler) -> Result<Self::Port, Errno>;
    /// Takes the other end of a port that the guest has published.
    ///
    /// # Errors
    /// The guest has no such port for us.
    fn bind_interdomain(&self, port: Port, handler: Handler) -> Result<Self::Port, Errno>;
}

impl Notify for HostPort {
    fn notify(&self) {
        // A guest that has closed its port does not want to know.
        let _ = Self::notify(self);
    }
    fn guest_port(&self) -> Port {
        Self::guest_port(self)
    }
}

impl Guest for Arc<Domain> {
    type Grants = Grants;
    type Port = HostPort;
    fn id(&self) -> DomId {
        Domain::id(self)
    }
    fn grants(&self) -> Grants {
        Domain::grants(self)
    }
    fn bind(&self, handler: Handler) -> Result<HostPort, Errno> {
        Domain::bind(self, handler)
    }
    fn bind_interdomain(&self, port: Port, handler: Handler) -> Result<HostPort, Errno> {
        Domain::bind_interdomain(self, port, handler)
    }
}
