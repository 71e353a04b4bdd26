//! One driver for each kind of device, and the task or registry entry that it belongs to.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use janus_front::virtio::blk::VirtioBlk;
use janus_front::virtio::net::VirtioNet;
use janus_front::virtio::{InitError, Transport};
use janus_proto::abi::virtio::DeviceId;

use super::wake::Wake;
use crate::block::Block;
use crate::devices;
use crate::mm::frames::FRAMES;
use crate::net::Net;

static BLOCKS: AtomicU32 = AtomicU32::new(0);
static NETS: AtomicU32 = AtomicU32::new(0);

/// Whether there is a driver for this kind of device.
pub(super) fn known(id: DeviceId) -> bool {
    matches!(id, DeviceId::BLOCK | DeviceId::NET)
}

/// Starts a device; answers its name, `None` if there is no driver for it.
pub(super) fn start(
    transport: Box<dyn Transport>,
    wake: &Wake,
) -> Result<Option<String>, InitError> {
    match transport.device_id() {
        DeviceId::BLOCK => {
            let device = VirtioBlk::new(transport, &FRAMES)?;
            let name = format!("vd{}", letter(BLOCKS.fetch_add(1, Ordering::Relaxed)));
            let block = Block::start(name.clone(), Box::new(device), &FRAMES);
            let woken = Arc::clone(&block);
            wake.set(Box::new(move || woken.interrupt()));
            devices::add_block(block);
            Ok(Some(name))
        }
        DeviceId::NET => {
            let device = VirtioNet::new(transport, &FRAMES)?;
            let name = format!("eth{}", NETS.fetch_add(1, Ordering::Relaxed));
            let net = Net::start(name.clone(), Box::new(device), &FRAMES, crate::cpu::rdtsc());
            let woken = Arc::clone(&net);
            wake.set(Box::new(move || woken.interrupt()));
            devices::add_net(net);
            Ok(Some(name))
        }
        _ => Ok(None),
    }
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
