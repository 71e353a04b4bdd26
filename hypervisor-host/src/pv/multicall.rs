//! Several calls in one (`xen/include/public/xen.h`, `struct multicall_entry`).

use janus_proto::abi::xen::{Errno, Hypercall, MulticallEntry};
use zerocopy::IntoBytes as _;

use super::cpu::Cpu;
use super::hypercall::{Answer, dispatch, low32};

/// Where the result is in an entry.
const RESULT: u64 = 8;

/// Makes `count` calls in order. Those fail one by one, each in its own result.
pub(crate) fn multicall(cpu: &mut Cpu, [list, count, ..]: [u64; 6]) -> Answer {
    if cpu.in_multicall {
        return Answer::err(Errno::EINVAL);
    }
    let count = low32(count);
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
        let value = match dispatch(cpu, number, entry.args) {
            Answer::Value(value) => value,
            // A return ends the list: what comes behind it is no business of where it went (XSA-213).
            Answer::Done => return Answer::Done,
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
