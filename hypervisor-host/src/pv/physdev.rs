//! Physical devices: the little that a domain without any may ask for (`xen/include/public/physdev.h`).

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::physdev::{PhysdevOp, SetIobitmap, SetIopl};

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};

/// Ports that a bitmap can cover.
const PORTS: u32 = 65_536;
/// `PHYSDEVOP_eoi`'s neighbours that say whether an interrupt needs one: `PHYSDEVOP_irq_status_query`, and the two
/// ways to register an end-of-interrupt map.
const IRQ_STATUS_QUERY: u32 = 5;
const PIRQ_EOI_GMFN_V1: u32 = 17;
const PIRQ_EOI_GMFN_V2: u32 = 28;

pub(crate) fn physdev_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    Answer::from(match PhysdevOp(op) {
        PhysdevOp::SET_IOPL => cpu.read::<SetIopl>(argument).and_then(|set| {
            let iopl = u8::try_from(set.iopl).ok().filter(|iopl| *iopl <= 3);
            cpu.iopl = iopl.ok_or(Errno::EINVAL)?;
            Ok(0)
        }),
        // Nothing is behind any port, whatever the bitmap says: but who may look is the guest's to decide.
        PhysdevOp::SET_IOBITMAP => cpu.read::<SetIobitmap>(argument).and_then(|set| {
            if set.nr_ports > PORTS {
                return Err(Errno::EINVAL);
            }
            cpu.io_bitmap = (set.bitmap, set.nr_ports);
            Ok(0)
        }),
        // The domain has no interrupts.
        PhysdevOp::EOI | PhysdevOp(IRQ_STATUS_QUERY) => Err(Errno::EINVAL),
        PhysdevOp(PIRQ_EOI_GMFN_V1 | PIRQ_EOI_GMFN_V2) => Err(Errno::ENOSYS),
        // Everything else configures a machine.
        PhysdevOp(4..=31) => Err(Errno::EPERM),
        _ => Err(Errno::ENOSYS),
    })
}

/// The call of before 3.2: a structure with operation and argument in one.
pub(crate) fn compat(cpu: &mut Cpu, [argument, ..]: [u64; 6]) -> Answer {
    match cpu.read::<u32>(argument) {
        Ok(op) => physdev_op(cpu, [op.into(), argument.wrapping_add(8), 0, 0, 0, 0]),
        Err(error) => Answer::err(error),
    }
}
