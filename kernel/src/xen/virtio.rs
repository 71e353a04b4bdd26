//! virtio devices of a Xen PV guest: found in xenstore (`device/virtio`), registers in a machine frame, interrupts and
//! notifications by event channel. `docs/virtio-on-xen.md` says what is in the nodes.
// UNSAFETY: maps the registers that the host names.
#![expect(unsafe_code, reason = "the registers are found by the frame that xenstore names")]

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use janus_front::mmio::MmioRegion;
use janus_front::virtio::mmio::MmioTransport;
use janus_front::xen::nodes::{NodeError, NodeFault, Nodes};
use janus_proto::addr::{Mfn, PAGE_SHIFT, PAGE_SIZE, Port};

use super::device_frames::{Granted, Machine};
use super::xenstore::{XenStore, XenStoreError};
use crate::devices::Search;
use crate::irq::evtchn;
use crate::mm::paging::{Flags, pv};
use crate::{task, virtio};

/// Where registers are mapped, behind the grant table: above any RAM.
const REGISTERS: usize = (1 << 38) + (1 << 32);
/// Devices at most; each has a page there for good.
const MOST: usize = 256;

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Store(XenStoreError),
    Node(NodeError),
    Map(crate::mm::paging::MapError),
    TooMany,
    Start(virtio::StartError),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::Node(error) => error.fmt(f),
            Self::Map(error) => error.fmt(f),
            Self::TooMany => f.write_str("there are too many"),
            Self::Start(error) => error.fmt(f),
        }
    }
}

impl From<XenStoreError> for Refused {
    fn from(error: XenStoreError) -> Self {
        Self::Store(error)
    }
}
impl From<NodeError> for Refused {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

/// Starts the task that finds the devices that are there at boot.
pub(super) fn start(store: Arc<XenStore>) {
    let search = Search::start();
    drop(task::spawn("virtio", async move {
        if let Err(error) = find(&store).await {
            log::error!("no virtio devices: {error}");
        }
        drop(search);
    }));
}

async fn find(store: &XenStore) -> Result<(), XenStoreError> {
    let names = match store.list("device/virtio").await {
        Ok(names) => names,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in names {
        let place = format!("device/virtio/{name}");
        if let Err(error) = serve(store, &place).await {
            log::error!("{place}: {error}");
        }
    }
    Ok(())
}

const NODES: [&str; 5] =
    ["transport", "base", "grant_usage", "event-channel", "event-channel-config"];

async fn serve(store: &XenStore, place: &str) -> Result<(), Refused> {
    let nodes = store.read_nodes(place, &NODES).await?;
    if nodes.text("transport")?.is_some_and(|transport| transport != "mmio") {
        return Err(NodeError { node: "transport", fault: NodeFault::OutOfRange }.into());
    }
    let registers = map(base(&nodes)?)?;
    let ports =
        [nodes.required("event-channel")?, nodes.required("event-channel-config")?].map(Port);
    // SAFETY: `map` mapped a frame of device registers there, for good.
    let registers = unsafe { MmioRegion::new(registers, PAGE_SIZE) };
    let [queues, _] = ports;
    let transport = MmioTransport::new(registers).map_err(|e| Refused::Start(e.into()))?;
    let Some(transport) = transport else { return Ok(()) };
    let transport = transport.with_doorbell(Box::new(move || evtchn::notify(queues)));
    let place = String::from(place);
    if nodes.feature("grant_usage") {
        virtio::start_on_events::<Granted>(transport, place, ports);
    } else {
        virtio::start_on_events::<Machine>(transport, place, ports);
    }
    Ok(())
}

/// The frame of the registers: `0x` and hexadecimal, as `libxl` writes it.
fn base(nodes: &Nodes) -> Result<Mfn, NodeError> {
    let fault = |fault| NodeError { node: "base", fault };
    let text = nodes.text("base")?.ok_or(fault(NodeFault::Missing))?;
    let digits = text.strip_prefix("0x").ok_or(fault(NodeFault::Nonsense))?;
    let address = u64::from_str_radix(digits, 16).map_err(|_| fault(NodeFault::Nonsense))?;
    if !address.is_multiple_of(PAGE_SIZE as u64) || address == 0 {
        return Err(fault(NodeFault::OutOfRange));
    }
    Ok(Mfn(address >> PAGE_SHIFT))
}

fn map(frame: Mfn) -> Result<NonNull<u8>, Refused> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let slot = NEXT.fetch_add(1, Ordering::Relaxed);
    if slot >= MOST {
        return Err(Refused::TooMany);
    }
    let address = REGISTERS + slot * PAGE_SIZE;
    // SAFETY: nothing else is there; the frame is no memory of ours, as Xen lets us map what is not only where a
    // toolstack gave us a device.
    unsafe { pv::map_machine(address, frame, Flags::WRITE) }.map_err(Refused::Map)?;
    NonNull::new(core::ptr::with_exposed_provenance_mut(address)).ok_or(Refused::TooMany)
}
