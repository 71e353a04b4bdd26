//! Where xenstore's ring is, and the one connection to it.
// UNSAFETY: makes a slice of the page that Xen names as the ring.
#![expect(unsafe_code, reason = "the ring page is found by address")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::time::Duration;

use janus_boot::{BootInfo, Protocol};
use janus_proto::abi::xen::hvm::HvmParam;
use janus_proto::addr::{PAGE_SIZE, Pfn, Port};
use janus_proto::sync::AtomicU32;
use spin::Once;

use super::xenstore::XenStore;
use super::{balloon, bus, control, hal, virtio};
use crate::irq::evtchn;
use crate::mm::paging::pv;
use crate::platform::{self, Platform};
use crate::{devices, hypercall, task, time};

static STORE: Once<Arc<XenStore>> = Once::new();

/// The connection to xenstore, if this guest has one.
#[must_use]
pub fn store() -> Option<&'static Arc<XenStore>> {
    STORE.get()
}

/// The ring's frame and port; a first domain has none.
fn find(info: &BootInfo) -> Option<(Pfn, Port)> {
    if platform::current() == Platform::XenPv {
        let Protocol::XenPv(start) = &info.protocol else { return None };
        let shared = start.store?;
        return Some((pv::pfn(shared.mfn)?, shared.port));
    }
    let frame = hypercall::hvm::param(HvmParam::STORE_PFN).ok()?;
    let port = u32::try_from(hypercall::hvm::param(HvmParam::STORE_EVTCHN).ok()?).ok()?;
    (frame != 0 && port != 0).then_some((Pfn(frame), Port(port)))
}

/// What the toolstack may ask for has time until the devices are there: the daemon does one thing after the other.
const DEVICES_FIRST: Duration = Duration::from_secs(1);

async fn serve_toolstack(store: &Arc<XenStore>, info: &'static BootInfo) {
    // Whether or not they came in time.
    let _ = time::timeout(DEVICES_FIRST, devices::settled()).await;
    control::start(Arc::clone(store));
    if platform::current() == Platform::XenPv {
        balloon::start(Arc::clone(store), info);
    }
}

/// Connects to xenstore and starts the bus. Nothing happens where there is no xenstore.
pub(crate) fn init(info: &'static BootInfo) {
    let Some((frame, port)) = find(info) else {
        log::info!("no xenstore: no devices from the toolstack");
        return;
    };
    let Ok(address) = usize::try_from(frame.start().0) else { return };
    // SAFETY: 1. the domain builder made this page the ring; it is mapped at its address like all memory, for
    // good, and the memory map does not list it as usable; 2. page-aligned, and seen as atomics only.
    let memory: &'static [AtomicU32] = unsafe {
        core::slice::from_raw_parts(
            core::ptr::with_exposed_provenance(address),
            PAGE_SIZE / size_of::<AtomicU32>(),
        )
    };
    let store = match XenStore::start(memory, Box::new(move || evtchn::notify(port))) {
        Ok(store) => STORE.call_once(|| store),
        Err(error) => {
            log::error!("xenstore: {error}");
            return;
        }
    };
    match evtchn::attach(port, "xenstore", Box::new(|| store.interrupt())) {
        Ok(channel) => {
            let _ = channel.keep();
            bus::start(Arc::clone(store), &hal::HAL);
            if platform::current() == Platform::XenPv {
                virtio::start(Arc::clone(store));
            }
            if platform::current() == Platform::XenPvh {
                // Memory beyond the target may not be there: the sooner it is known the better.
                balloon::start(Arc::clone(store), info);
            }
            drop(task::spawn("toolstack", serve_toolstack(store, info)));
        }
        Err(error) => log::error!("xenstore: {error}"),
    }
}
