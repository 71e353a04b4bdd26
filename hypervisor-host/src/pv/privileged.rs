//! Calls for toolstacks, other kinds of guests, and what this Xen is built without: what a PV guest is told of them.
//!
//! The answers are those of a release build of Xen 4.17 (`tests/conformance/xen-4.17.toml`): most look at their argument
//! before they look at who asks.

use janus_proto::abi::xen::Errno;

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};

/// Versions of the toolstacks' interfaces in Xen 4.17 (`XEN_DOMCTL_INTERFACE_VERSION`, also that of `sysctl`;
/// `XENPF_INTERFACE_VERSION`): whoever knows them is told that it has not the rights, others that they ask wrongly.
const VERSIONS: [u32; 2] = [0x15, 0x0300_0000];

fn toolstack(cpu: &Cpu, argument: u64) -> Answer {
    Answer::err(match cpu.read::<[u32; 2]>(argument) {
        Ok([_, version]) if VERSIONS.contains(&version) => Errno::EPERM,
        Ok(_) => Errno::EACCES,
        Err(error) => error,
    })
}

/// `platform_op`, `sysctl`, `domctl`: one structure, which begins with command and version.
pub(crate) fn interface(cpu: &mut Cpu, [argument, ..]: [u64; 6]) -> Answer {
    toolstack(cpu, argument)
}

/// `xenoprof_op`, whose second argument is the structure.
pub(crate) fn profile(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    /// The last operation.
    const LAST: u32 = 16;
    if low32(op) > LAST {
        return Answer::err(Errno::EINVAL);
    }
    Answer::err(cpu.read::<u64>(argument).map_or_else(|error| error, |_| Errno::EPERM))
}

/// `kexec_op`, `hypfs_op`, machine checks: not for guests.
pub(crate) fn refused(_cpu: &mut Cpu, _arguments: [u64; 6]) -> Answer {
    Answer::err(Errno::EPERM)
}

/// `xenpmu_op`: performance counters are not virtualised.
pub(crate) fn counters(_cpu: &mut Cpu, _arguments: [u64; 6]) -> Answer {
    Answer::err(Errno::EOPNOTSUPP)
}

/// `dm_op`: for the device models of other domains.
pub(crate) fn device_model(_cpu: &mut Cpu, _arguments: [u64; 6]) -> Answer {
    Answer::err(Errno::EINVAL)
}

/// The continuation of a domain's paging operations (number 49).
pub(crate) fn paging(cpu: &mut Cpu, [argument, ..]: [u64; 6]) -> Answer {
    toolstack(cpu, argument)
}

/// `hvm_op`: parameters and the like of guests that are not PV.
pub(crate) fn hvm_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    Answer::err(match low32(op) {
        // set_param, get_param, get_time, xentrace, get_mem_type: the argument first.
        0 | 1 | 9 | 10 | 11 | 15 => {
            cpu.read::<u64>(argument).map_or_else(|error| error, |_| Errno::EINVAL)
        }
        // flush_tlbs, and what asks for a device model or upcalls.
        5 | 23 | 24 => Errno::EINVAL,
        // altp2m
        25 => Errno::EOPNOTSUPP,
        _ => Errno::ENOSYS,
    })
}
