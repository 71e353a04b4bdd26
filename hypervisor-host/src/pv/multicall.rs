//! Several calls in one (`xen/include/public/xen.h`, `struct multicall_entry`).

use janus_proto::abi::xen::{Errno, Hypercall, MulticallEntry};
use zerocopy::IntoBytes as _;

use super::cpu::Cpu;
use super::hypercall::{Answer, dispatch};

/// Where the result is in an entry.
const RESULT: u64 = 8;

/// Makes `count` calls in order. Those fail one by one, each in its own result.
pub(crate) fn multicall(cpu: &mut Cpu, [list, count, ..]: [u64; 6]) -> Answer {
    if cpu.in_multicall {
        return Answer::err(Errno::EINVAL);
    }
    let Ok(count) = u32::try_from(count) else { return Answer::err(Errno::EINVAL) };
    cpu.in_multicall = true;
    let answer = run(cpu, list, count);
    cpu.in_multicall = false;
    answer
}

fn run(cpu: &mut Cpu, list: u64, count: u32) -> Answer {
    let size = size_of::<MulticallEntry>() as u64;
    for index in 0..u64::from(count) {
        // Whoever wants to stop the guest does not wait for four thousand million calls: the rest of the list is left
        // undone, and nobody sees it because the domain is over.
        cpu.attend();
        if cpu.domain.is_ending() {
            break;
        }
        let address = list.wrapping_add(index.wrapping_mul(size));
        let entry: MulticallEntry = match cpu.read(address) {
            Ok(entry) => entry,
            Err(error) => return Answer::err(error),
        };
        let number = Hypercall(entry.op);
        // What changes registers instead of answering has no place in a list.
        let answer = if number == Hypercall::IRET {
            Answer::err(Errno::ENOSYS)
        } else {
            dispatch(cpu, number, entry.args)
        };
        let value = match answer {
            Answer::Value(value) => value,
            other => return other,
        };
        if let Err(error) =
            cpu.domain.space.write(cpu.index, address.wrapping_add(RESULT), value.as_bytes())
        {
            return Answer::err(error);
        }
    }
    Answer::ok(0)
}
