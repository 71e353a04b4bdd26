//! Event channel calls (`event_channel.h`). All are safe: they name ports, not memory.
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::event_channel::{
    AllocUnbound, BindInterdomain, BindIpi, BindVirq, Close, EventChannelOp, Send, Unmask,
};
use janus_proto::abi::xen::{Hypercall, Virq};
use janus_proto::addr::{DomId, Port};

use super::{Result, address_mut, call};

/// Passes the structure that belongs to `op`.
fn operate<T>(op: EventChannelOp, argument: &mut T) -> Result<()> {
    // SAFETY: each caller below passes the structure of its operation, which Xen reads and writes in place.
    unsafe { call(Hypercall::EVENT_CHANNEL_OP, [op.0.into(), address_mut(argument), 0, 0, 0]) }
        .map(drop)
}

/// A port that `remote` may bind to.
///
/// # Errors
/// No port left, or no such domain.
pub fn alloc_unbound(remote: DomId) -> Result<Port> {
    let mut argument = AllocUnbound { dom: DomId::SELF, remote_dom: remote, port: Port(0) };
    operate(EventChannelOp::ALLOC_UNBOUND, &mut argument)?;
    Ok(argument.port)
}

/// A port connected to one that `remote` allocated for us.
///
/// # Errors
/// No such domain or port.
pub fn bind_interdomain(remote: DomId, port: Port) -> Result<Port> {
    let mut argument = BindInterdomain {
        remote_dom: remote,
        pad0: [0; 2],
        remote_port: port,
        local_port: Port(0),
    };
    operate(EventChannelOp::BIND_INTERDOMAIN, &mut argument)?;
    Ok(argument.local_port)
}

/// A port for a virtual interrupt of a CPU.
///
/// # Errors
/// Bound already, not for this domain, or no port left.
pub fn bind_virq(virq: Virq, vcpu: u32) -> Result<Port> {
    let mut argument = BindVirq { virq, vcpu, port: Port(0) };
    operate(EventChannelOp::BIND_VIRQ, &mut argument)?;
    Ok(argument.port)
}

/// A port by which this domain's CPUs interrupt `vcpu`.
///
/// # Errors
/// No such CPU, or no port left.
pub fn bind_ipi(vcpu: u32) -> Result<Port> {
    let mut argument = BindIpi { vcpu, port: Port(0) };
    operate(EventChannelOp::BIND_IPI, &mut argument)?;
    Ok(argument.port)
}

/// Gives a port back.
///
/// # Errors
/// Not an open port.
pub fn close(port: Port) -> Result<()> {
    operate(EventChannelOp::CLOSE, &mut Close { port })
}

/// Notifies the other side.
///
/// # Errors
/// Not a port that can be notified.
pub fn send(port: Port) -> Result<()> {
    operate(EventChannelOp::SEND, &mut Send { port })
}

/// Unmasks, and delivers what came while it was masked.
///
/// # Errors
/// Not a port.
pub fn unmask(port: Port) -> Result<()> {
    operate(EventChannelOp::UNMASK, &mut Unmask { port })
}
