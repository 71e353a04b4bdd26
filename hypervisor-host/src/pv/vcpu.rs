//! Operations on virtual CPUs (`xen/include/public/vcpu.h`).

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::trap::VcpuGuestContext;
use janus_proto::abi::xen::vcpu::{
    RegisterMemoryArea, RegisterVcpuInfo, RunstateInfo, SetSingleshotTimer, VcpuOp,
};
use janus_proto::addr::{Mfn, PAGE_SHIFT, PAGE_SIZE};
use janus_proto::grant::Access;

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};
use super::timers::NEVER;
use super::traps::is_guests;
use super::vcpu_info::VCPU_INFO_SIZE;

/// The shortest period of a timer.
const SHORTEST_PERIOD: u64 = 1_000_000;
/// The longest (`STIME_DELTA_MAX`).
const LONGEST_PERIOD: u64 = (i64::MAX as u64) >> 2;

pub(crate) fn vcpu_op(cpu: &mut Cpu, [op, vcpu, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    let vcpu = match low32(vcpu) as usize {
        vcpu if vcpu < cpu.domain.vcpu_count() => vcpu,
        _ => return Answer::err(Errno::ENOENT),
    };
    Answer::from(operate(cpu, VcpuOp(op), vcpu, argument))
}

fn operate(cpu: &mut Cpu, op: VcpuOp, vcpu: usize, argument: u64) -> Result<u64, Errno> {
    match op {
        VcpuOp::INITIALISE => initialise(cpu, vcpu, argument),
        VcpuOp::UP => {
            let shared = cpu.domain.vcpu(vcpu);
            if !shared.is_initialised() {
                return Err(Errno::EINVAL);
            }
            shared.set_up(true);
            Ok(0)
        }
        VcpuOp::DOWN => {
            cpu.domain.vcpu(vcpu).set_up(false);
            Ok(0)
        }
        VcpuOp::IS_UP => Ok(cpu.domain.vcpu(vcpu).is_up().into()),
        VcpuOp::GET_RUNSTATE_INFO if vcpu == cpu.index => {
            let info = cpu.runstate.info();
            cpu.write(argument, &info).map(|()| 0)
        }
        VcpuOp::GET_RUNSTATE_INFO => {
            let info: RunstateInfo = cpu.domain.vcpu(vcpu).runstate();
            cpu.write(argument, &info).map(|()| 0)
        }
        VcpuOp::REGISTER_RUNSTATE_MEMORY_AREA => {
            let area: RegisterMemoryArea = cpu.read(argument)?;
            own(cpu, vcpu)?;
            if !is_guests(area.addr) {
                return Err(Errno::EFAULT);
            }
            cpu.runstate.area = (area.addr != 0).then_some(area.addr);
            cpu.publish_runstate();
            Ok(0)
        }
        VcpuOp::REGISTER_VCPU_TIME_MEMORY_AREA => {
            let area: RegisterMemoryArea = cpu.read(argument)?;
            own(cpu, vcpu)?;
            cpu.runstate.time_area = (area.addr != 0).then_some(area.addr);
            cpu.publish_time();
            Ok(0)
        }
        VcpuOp::SET_PERIODIC_TIMER => {
            let period: u64 = cpu.read(argument)?;
            if !(SHORTEST_PERIOD..=LONGEST_PERIOD).contains(&period) {
                return Err(Errno::EINVAL);
            }
            set_timer(cpu, vcpu, |timers| timers.set_period(period));
            Ok(0)
        }
        VcpuOp::STOP_PERIODIC_TIMER => {
            set_timer(cpu, vcpu, |timers| timers.set_period(0));
            Ok(0)
        }
        VcpuOp::SET_SINGLESHOT_TIMER => {
            own(cpu, vcpu)?;
            let timer: SetSingleshotTimer = cpu.read(argument)?;
            cpu.shared().timers.set_singleshot(timer.timeout_abs_ns.min(NEVER - 1));
            Ok(0)
        }
        VcpuOp::STOP_SINGLESHOT_TIMER => {
            own(cpu, vcpu)?;
            cpu.shared().timers.set_singleshot(NEVER);
            Ok(0)
        }
        VcpuOp::REGISTER_VCPU_INFO => register_vcpu_info(cpu, vcpu, argument),
        VcpuOp::SEND_NMI => {
            cpu.domain.vcpu(vcpu).send_nmi();
            Ok(0)
        }
        // Only for a hardware domain, whose CPUs are pinned.
        VcpuOp::GET_PHYSID => Err(Errno::EINVAL),
        _ => Err(Errno::ENOSYS),
    }
}

/// These are for the calling CPU only; as in Xen, except that areas of others are refused too.
fn own(cpu: &Cpu, vcpu: usize) -> Result<(), Errno> {
    if vcpu == cpu.index { Ok(()) } else { Err(Errno::EINVAL) }
}

fn set_timer(cpu: &Cpu, vcpu: usize, set: impl FnOnce(&super::timers::Timers)) {
    let shared = cpu.domain.vcpu(vcpu);
    set(&shared.timers);
    if vcpu != cpu.index {
        shared.wake();
    }
}

/// Gives a CPU that is down its first state.
fn initialise(cpu: &Cpu, vcpu: usize, argument: u64) -> Result<u64, Errno> {
    let shared = cpu.domain.vcpu(vcpu);
    let context = Box::new(cpu.read::<VcpuGuestContext>(argument)?);
    if vcpu == cpu.index || shared.is_initialised() {
        return Err(Errno::EEXIST);
    }
    let table = |control: u64| {
        let frame = control >> PAGE_SHIFT;
        (frame != 0).then_some(Mfn(frame))
    };
    let [_, user, _, kernel, ..] = context.ctrlreg;
    let root = table(kernel).ok_or(Errno::EINVAL)?;
    cpu.domain.space.initialise(vcpu, root, table(user))?;
    shared.set_context(context)
}

/// Moves a CPU's `vcpu_info` into the guest's own memory.
fn register_vcpu_info(cpu: &Cpu, vcpu: usize, argument: u64) -> Result<u64, Errno> {
    let info: RegisterVcpuInfo = cpu.read(argument)?;
    let room = PAGE_SIZE as u64 - VCPU_INFO_SIZE;
    if u64::from(info.offset) > room || !info.offset.is_multiple_of(8) {
        return Err(Errno::ENXIO);
    }
    let shared = cpu.domain.vcpu(vcpu);
    if shared.has_moved() || (vcpu != cpu.index && shared.is_up()) {
        return Err(Errno::EINVAL);
    }
    let frame = Mfn(info.mfn);
    // Kept for the rest of the domain's life: the page stays writable data.
    if !cpu.domain.space.get(frame, Access::ReadWrite) {
        return Err(Errno::EINVAL);
    }
    let start = info.offset as usize / 8;
    let new = cpu.domain.ram().frame(frame).and_then(|words| words.get(start..start + 8));
    let (Some(old), Some(new)) = (shared.info(), new) else { return Err(Errno::EINVAL) };
    for (to, from) in new.iter().zip(old) {
        to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
    }
    shared.set_info_address((frame.0 << PAGE_SHIFT) + u64::from(info.offset));
    // What was marked in the old place meanwhile is found again.
    cpu.domain.events.reselect(vcpu);
    Ok(0)
}
