//! Physical devices: the little that a domain without any may ask for (`xen/include/public/physdev.h`).

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::physdev::{PhysdevOp, SetIobitmap, SetIopl};

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};
use super::traps::is_guests;

/// Ports that a bitmap can cover.
const PORTS: u32 = 65_536;
/// Operations by number: `PHYSDEVOP_irq_unmask_notify` and `irq_status_query`; `free_irq_vector`, and the two of PCI
/// devices' restore that are gone; the two ways to register an end-of-interrupt map; `get_free_pirq`.
const IRQ_UNMASK_NOTIFY: u32 = 4;
const IRQ_STATUS_QUERY: u32 = 5;
const PIRQ_EOI_GMFN_V1: u32 = 17;
const GET_FREE_PIRQ: u32 = 23;
const PIRQ_EOI_GMFN_V2: u32 = 28;

pub(crate) fn physdev_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    let looked = |cpu: &Cpu| cpu.read::<u32>(argument);
    Answer::from(match PhysdevOp(op) {
        PhysdevOp::SET_IOPL => cpu.read::<SetIopl>(argument).and_then(|set| {
            let iopl = u8::try_from(set.iopl).ok().filter(|iopl| *iopl <= 3);
            cpu.iopl = iopl.ok_or(Errno::EINVAL)?;
            Ok(0)
        }),
        // Nothing is behind any port, whatever the bitmap says: but who may look is the guest's to decide.
        PhysdevOp::SET_IOBITMAP => cpu.read::<SetIobitmap>(argument).and_then(|set| {
            if set.nr_ports > PORTS || set.nr_ports > 0 && !is_guests(set.bitmap) {
                return Err(Errno::EINVAL);
            }
            cpu.io_bitmap = (set.bitmap, set.nr_ports);
            Ok(0)
        }),
        PhysdevOp(IRQ_UNMASK_NOTIFY) => Ok(0),
        // The domain has no interrupts.
        PhysdevOp(IRQ_STATUS_QUERY) => {
            looked(cpu).and_then(|irq| if irq == 0 { Ok(0) } else { Err(Errno::EINVAL) })
        }
        PhysdevOp::EOI | PhysdevOp(PIRQ_EOI_GMFN_V1 | PIRQ_EOI_GMFN_V2) => {
            looked(cpu).and(Err(Errno::EINVAL))
        }
        PhysdevOp(GET_FREE_PIRQ) => looked(cpu).map(|_| 0),
        PhysdevOp(24 | 29) => Err(Errno::EPERM),
        // Everything else configures a machine, and looks at its argument first.
        PhysdevOp(8..=10 | 13..=16 | 19..=21 | 25..=27 | 30 | 31) => {
            looked(cpu).and(Err(Errno::EPERM))
        }
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
