//! One driver for each kind of device, and the task or registry entry that it belongs to.
// UNSAFETY: vouches that every pointer of this kernel is its own guest physical address.
#![expect(unsafe_code, reason = "the crate's queues share memory by pointer")]

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;

use janus_front::class::{BalloonDevice, BlockDevice, NetDevice};
use janus_front::dma::FrameSource;
use janus_front::virtio::balloon::VirtioBalloon;
use janus_front::virtio::baseline::DeviceFrames;
use janus_front::virtio::baseline_blk::BaselineBlk;
use janus_front::virtio::baseline_net::BaselineNet;
use janus_front::virtio::blk::VirtioBlk;
use janus_front::virtio::low_rate::{VirtioConsole, VirtioRng};
use janus_front::virtio::net::{ReceiveBuffers, VirtioNet};
use janus_front::virtio::{InitError, Transport};
use janus_proto::abi::virtio::DeviceId;

use super::wake::Wake;
use crate::block::Block;
use crate::mm::frames::{self, FRAMES};
use crate::mm::reclaim;
use crate::net::Net;
use crate::sync::Notify;
use crate::{console, devices, entropy, task, time};

static BLOCKS: AtomicU32 = AtomicU32::new(0);
static CONSOLES: AtomicU32 = AtomicU32::new(0);
static ENTROPIES: AtomicU32 = AtomicU32::new(0);
static BALLOONS: AtomicU32 = AtomicU32::new(0);
static NETS: AtomicU32 = AtomicU32::new(0);

/// The kernel's frames for the `virtio-drivers` crate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity;

// SAFETY: natively, where virtio is, all RAM is mapped at its guest physical address (`mm::paging`).
unsafe impl DeviceFrames for Identity {
    const ANY_MEMORY: bool = true;
    fn frames() -> &'static dyn FrameSource {
        &FRAMES
    }
}

/// Whether there is a driver for this kind of device.
pub(super) fn known(id: DeviceId) -> bool {
    matches!(
        id,
        DeviceId::BLOCK | DeviceId::NET | DeviceId::CONSOLE | DeviceId::ENTROPY | DeviceId::BALLOON
    )
}

/// Starts a device, which finds memory as `S` says; answers its name, `None` if there is no driver for it.
pub(super) fn start<S: DeviceFrames>(
    transport: Box<dyn Transport>,
    wake: &Wake,
) -> Result<Option<String>, InitError> {
    match transport.device_id() {
        DeviceId::BLOCK => {
            let baseline = S::ANY_MEMORY && baseline_wanted("virtio.disk=baseline");
            let device: Box<dyn BlockDevice> = if baseline {
                Box::new(BaselineBlk::<S>::new(transport)?)
            } else {
                Box::new(VirtioBlk::new(transport, S::frames())?)
            };
            let name = format!("vd{}", letter(BLOCKS.fetch_add(1, Ordering::Relaxed)));
            let block = Block::start(name.clone(), device, S::frames());
            let woken = Arc::clone(&block);
            wake.set(Box::new(move || woken.interrupt()));
            devices::add_block(block);
            Ok(Some(name))
        }
        DeviceId::NET => {
            let baseline = S::ANY_MEMORY && baseline_wanted("virtio.net=baseline");
            let device: Box<dyn NetDevice> = if baseline {
                Box::new(BaselineNet::<S>::new(transport)?)
            } else {
                Box::new(VirtioNet::with_buffers(transport, S::frames(), receive_buffers())?)
            };
            let name = format!("eth{}", NETS.fetch_add(1, Ordering::Relaxed));
            let net = Net::start(name.clone(), device, S::frames(), entropy::random_u64());
            let woken = Arc::clone(&net);
            wake.set(Box::new(move || woken.interrupt()));
            devices::add_net(net);
            Ok(Some(name))
        }
        DeviceId::CONSOLE => {
            let device = VirtioConsole::<S>::new(transport)?;
            let id = console::attach(Box::new(device));
            wake.set(Box::new(move || console::service(id)));
            Ok(Some(format!("hvc{}", CONSOLES.fetch_add(1, Ordering::Relaxed))))
        }
        DeviceId::ENTROPY => {
            entropy::attach(Box::new(VirtioRng::<S>::new(transport)?));
            wake.set(Box::new(entropy::service));
            Ok(Some(format!("rng{}", ENTROPIES.fetch_add(1, Ordering::Relaxed))))
        }
        DeviceId::BALLOON => {
            let device = VirtioBalloon::new(transport, S::frames())?;
            let name = format!("balloon{}", BALLOONS.fetch_add(1, Ordering::Relaxed));
            let work = Arc::new(Notify::new());
            let woken = Arc::clone(&work);
            wake.set(Box::new(move || woken.notify()));
            drop(task::spawn("balloon", inflate(name.clone(), device, work)));
            Ok(Some(name))
        }
        _ => Ok(None),
    }
}

/// A thirty-second of the memory for long receive buffers, if that is enough for some.
fn receive_buffers() -> ReceiveBuffers {
    match frames::statistics().total / 32 / 16 {
        ..16 => ReceiveBuffers::Pages,
        count => ReceiveBuffers::Long(u16::try_from(count).unwrap_or(u16::MAX).min(64)),
    }
}

/// Pages that the balloon leaves to the kernel, whatever the host asks for.
const RESERVE_PAGES: usize = 2048;
/// Pages moved in one request.
const STEP_PAGES: usize = 1024;
/// How long to wait for memory that the host asks for and nobody has free.
const RETRY: Duration = Duration::from_secs(1);

/// Follows the host's wishes for good.
async fn inflate(name: String, mut device: VirtioBalloon, work: Arc<Notify>) {
    let mut reported = 0;
    loop {
        let (target, held) = (device.target_pages(), device.held_pages());
        let mut spare = frames::statistics().free.saturating_sub(RESERVE_PAGES);
        while target > held && spare == 0 && reclaim::free_some() {
            spare = frames::statistics().free.saturating_sub(RESERVE_PAGES);
        }
        let limit = if target > held { spare.min(STEP_PAGES) } else { STEP_PAGES };
        match device.step(limit) {
            Ok(0) if device.busy() || target == held => work.notified().await,
            Ok(0) => _ = time::timeout(RETRY, work.notified()).await,
            Ok(_) => {}
            Err(error) => return log::warn!("{name}: {error}"),
        }
        let held = device.held_pages();
        if held != reported && !device.busy() {
            reported = held;
            log::info!("{name}: {held} of {} pages given up", device.target_pages());
        }
    }
}

/// Whether the command line asks for a driver of the `virtio-drivers` crate, which the bench compares ours with.
fn baseline_wanted(wanted: &str) -> bool {
    crate::command_line().split_ascii_whitespace().any(|word| word == wanted)
}

/// `a` to `z`, then `aa` and so on, as Linux names disks.
fn letter(index: u32) -> String {
    let mut name = String::new();
    let mut rest = index;
    loop {
        let digit = u8::try_from(rest % 26).unwrap_or(0);
        name.insert(0, char::from(b'a' + digit));
        if rest < 26 {
            return name;
        }
        rest = rest / 26 - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::letter;

    #[test]
    fn disks_are_named_as_linux_names_them() {
        for (index, name) in
            [(0, "a"), (25, "z"), (26, "aa"), (27, "ab"), (701, "zz"), (702, "aaa")]
        {
            assert_eq!(letter(index), name);
        }
    }
}
