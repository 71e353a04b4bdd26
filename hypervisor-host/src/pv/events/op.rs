//! The event channel calls: arguments in, ports out.

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::event_channel::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, Close, EventChannelOp, ExpandArray,
    InitControl, Reset, Send, SetPriority, Status, Unmask,
};
use janus_proto::addr::{DomId, Mfn};
use janus_proto::grant::Access;

use super::{Wake, fifo};
use crate::pv::cpu::Cpu;
use crate::pv::hypercall::{Answer, low32};

pub(crate) fn event_channel_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    Answer::from(operate(cpu, EventChannelOp(op), argument).map(|()| 0))
}

/// The call of before 3.2: a structure with operation and argument in one.
pub(crate) fn compat(cpu: &mut Cpu, [argument, ..]: [u64; 6]) -> Answer {
    match cpu.read::<u32>(argument) {
        Ok(op) => event_channel_op(cpu, [op.into(), argument.wrapping_add(4), 0, 0, 0, 0]),
        Err(error) => Answer::err(error),
    }
}

fn is_own(cpu: &Cpu, domain: DomId) -> bool {
    domain == DomId::SELF || domain == cpu.domain.id()
}

/// What is wrong with another domain: domain 0 is there, and others are not.
fn foreign(domain: DomId) -> Errno {
    if domain == DomId(0) { Errno::EPERM } else { Errno::ESRCH }
}

/// Physical interrupts that there could be.
const PIRQS: u32 = 1 << 16;
/// `EVTCHNOP_reset_cont`.
const RESET_CONT: EventChannelOp = EventChannelOp(14);

fn operate(cpu: &mut Cpu, op: EventChannelOp, argument: u64) -> Result<(), Errno> {
    let events = &cpu.domain.events;
    match op {
        EventChannelOp::SEND => {
            let send: Send = cpu.read(argument)?;
            if let Some(handler) = events.send(send.port)? {
                handler();
            }
            Ok(())
        }
        EventChannelOp::ALLOC_UNBOUND => {
            let mut alloc: AllocUnbound = cpu.read(argument)?;
            if !is_own(cpu, alloc.dom) {
                return Err(foreign(alloc.dom));
            }
            alloc.port = events.alloc_unbound(alloc.remote_dom)?;
            cpu.write(argument, &alloc)
        }
        EventChannelOp::BIND_INTERDOMAIN => {
            let mut bind: BindInterdomain = cpu.read(argument)?;
            if !is_own(cpu, bind.remote_dom) {
                // The host allocates no ports for guests to bind; others do not exist.
                let error = if bind.remote_dom == DomId(0) { Errno::EINVAL } else { Errno::ESRCH };
                return Err(error);
            }
            bind.local_port = events.bind_own(bind.remote_port)?;
            cpu.write(argument, &bind)
        }
        EventChannelOp::BIND_VIRQ => {
            let mut bind: BindVirq = cpu.read(argument)?;
            bind.port = events.bind_virq(bind.virq, bind.vcpu)?;
            cpu.write(argument, &bind)
        }
        EventChannelOp::BIND_IPI => {
            let mut bind: BindIpi = cpu.read(argument)?;
            bind.port = events.bind_ipi(bind.vcpu)?;
            cpu.write(argument, &bind)
        }
        // The domain has no interrupts of a machine.
        EventChannelOp::BIND_PIRQ => {
            let pirq: u32 = cpu.read(argument)?;
            Err(if pirq < PIRQS { Errno::EPERM } else { Errno::EINVAL })
        }
        EventChannelOp::CLOSE => {
            let close: Close = cpu.read(argument)?;
            events.close(close.port)
        }
        EventChannelOp::STATUS => {
            let mut status: Status = cpu.read(argument)?;
            if !is_own(cpu, status.dom) {
                return Err(foreign(status.dom));
            }
            let found = events.status(status.port)?;
            status.status = found.status;
            (status.vcpu, status.arg0) = (found.vcpu, found.remote);
            status.arg1 = found.remote_port;
            cpu.write(argument, &status)
        }
        EventChannelOp::BIND_VCPU => {
            let bind: BindVcpu = cpu.read(argument)?;
            events.bind_vcpu(bind.port, bind.vcpu)
        }
        EventChannelOp::UNMASK => {
            let unmask: Unmask = cpu.read(argument)?;
            events.unmask(unmask.port)
        }
        EventChannelOp::RESET | RESET_CONT => {
            let reset: Reset = cpu.read(argument)?;
            if !is_own(cpu, reset.dom) {
                return Err(foreign(reset.dom));
            }
            for frame in events.reset() {
                cpu.domain.space.put(frame, Access::ReadWrite);
            }
            Ok(())
        }
        EventChannelOp::INIT_CONTROL => {
            let mut init: InitControl = cpu.read(argument)?;
            init_control(cpu, &init)?;
            init.link_bits = fifo::LINK_BITS;
            cpu.write(argument, &init)
        }
        EventChannelOp::EXPAND_ARRAY => {
            let expand: ExpandArray = cpu.read(argument)?;
            expand_array(cpu, Mfn(expand.array_gfn))
        }
        EventChannelOp::SET_PRIORITY => {
            let set: SetPriority = cpu.read(argument)?;
            fifo::set_priority(&mut events.lock(), set.port, set.priority)
        }
        _ => Err(Errno::ENOSYS),
    }
}

fn init_control(cpu: &Cpu, init: &InitControl) -> Result<(), Errno> {
    let events = &cpu.domain.events;
    let vcpu = events.vcpu(init.vcpu)?;
    let frame = Mfn(init.control_gfn);
    // The page stays writable data for as long as it is in use: until the domain ends.
    if !cpu.domain.space.get(frame, Access::ReadWrite) {
        return Err(Errno::EINVAL);
    }
    let mut table = events.lock();
    let first = table.fifo.is_none();
    let pending = |port| events.bits().is_some_and(|bits| bits.is_pending(port));
    let count = events.vcpus.len();
    let result = fifo::init_control(&mut table, count, vcpu, frame, init.offset);
    match result {
        Ok(()) if first => fifo::adopt(&mut table, pending),
        Ok(()) => {}
        Err(_) => cpu.domain.space.put(frame, Access::ReadWrite),
    }
    result
}

fn expand_array(cpu: &Cpu, frame: Mfn) -> Result<(), Errno> {
    let events = &cpu.domain.events;
    if events.lock().fifo.is_none() {
        return Err(Errno::EOPNOTSUPP);
    }
    if !cpu.domain.space.get(frame, Access::ReadWrite) {
        return Err(Errno::EINVAL);
    }
    let mut table = events.lock();
    let result = fifo::expand_array(&mut table, &events.ram, &events.vcpus, frame);
    drop(table);
    match result {
        Ok(waiting) => {
            let wake = |wake: Wake| events.wake(wake);
            waiting.into_iter().for_each(wake);
            Ok(())
        }
        Err(error) => {
            cpu.domain.space.put(frame, Access::ReadWrite);
            Err(error)
        }
    }
}
