//! What Xen this is (`xen/include/public/version.h`): to a guest, 4.17.

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::version::{CompileInfo, FeatureInfo, XenFeatures, XenVersionOp};

use super::cpu::Cpu;
use super::hypercall::{Answer, low32};

/// Major and minor number.
pub(crate) const VERSION: u32 = 4 << 16 | 17;
/// Where Xen's part of the address space begins.
const VIRT_START: u64 = 0xffff_8000_0000_0000;
/// `XENVER_build_id`.
const BUILD_ID: XenVersionOp = XenVersionOp(10);
/// Twenty bytes, as a linker makes them: the name of this implementation.
const BUILD_ID_BYTES: &[u8; 20] = b"janus user-mode xen\0";

/// What a 64-bit PV guest may rely on.
fn features() -> XenFeatures {
    XenFeatures::MMU_PT_UPDATE_PRESERVE_AD
        | XenFeatures::HIGHMEM_ASSIST
        | XenFeatures::GNTTAB_MAP_AVAIL_BITS
        | XenFeatures::MEMORY_OP_VNODE_SUPPORTED
        | XenFeatures::DIRECT_MAPPED
}

/// What a guest may rely on whose memory the processor translates.
fn translated_features() -> XenFeatures {
    XenFeatures::WRITABLE_PAGE_TABLES
        | XenFeatures::AUTO_TRANSLATED_PHYSMAP
        | XenFeatures::HVM_CALLBACK_VECTOR
        | XenFeatures::HVM_SAFE_PVCLOCK
        | XenFeatures::MEMORY_OP_VNODE_SUPPORTED
}

/// A text in a field of `N` bytes, ended by a zero.
fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().take(N.saturating_sub(1)).zip(text.bytes()) {
        *to = from;
    }
    field
}

pub(crate) fn xen_version(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    Answer::from(match XenVersionOp(op) {
        XenVersionOp::VERSION => Ok(VERSION.into()),
        XenVersionOp::EXTRAVERSION => cpu.write(argument, &text::<16>(".0-janus")).map(|()| 0),
        XenVersionOp::COMPILE_INFO => {
            let info = CompileInfo {
                compiler: text("rustc"),
                compile_by: text("janus"),
                compile_domain: text("janus"),
                compile_date: text(""),
            };
            cpu.write(argument, &info).map(|()| 0)
        }
        XenVersionOp::CAPABILITIES => {
            let capabilities = if cpu.domain.space.is_translated() {
                "hvm-3.0-x86_64 "
            } else {
                "xen-3.0-x86_64 "
            };
            cpu.write(argument, &text::<1024>(capabilities)).map(|()| 0)
        }
        XenVersionOp::CHANGESET => {
            cpu.write(argument, &text::<64>(env!("CARGO_PKG_VERSION"))).map(|()| 0)
        }
        XenVersionOp::PLATFORM_PARAMETERS => cpu.write(argument, &VIRT_START).map(|()| 0),
        XenVersionOp::GET_FEATURES => cpu.read(argument).and_then(|mut info: FeatureInfo| {
            info.submap = match info.submap_idx {
                0 if cpu.domain.space.is_translated() => translated_features().bits(),
                0 => features().bits(),
                _ => return Err(Errno::EINVAL),
            };
            cpu.write(argument, &info).map(|()| 0)
        }),
        XenVersionOp::PAGESIZE if argument != 0 => Err(Errno::EINVAL),
        XenVersionOp::PAGESIZE => Ok(4096),
        XenVersionOp::GUEST_HANDLE => cpu.write(argument, &cpu.domain.uuid()).map(|()| 0),
        // Hypervisor's own, which is nobody's business and empty here.
        XenVersionOp::COMMANDLINE => cpu.write(argument, &text::<1024>("")).map(|()| 0),
        BUILD_ID => build_id(cpu, argument),
        _ => Err(Errno::ENOSYS),
    })
}

/// A length, then so many bytes; without a buffer only the length is answered.
fn build_id(cpu: &Cpu, argument: u64) -> Result<u64, Errno> {
    let length = BUILD_ID_BYTES.len() as u64;
    if argument == 0 {
        return Ok(length);
    }
    let room: u32 = cpu.read(argument)?;
    if room == 0 {
        return Err(Errno::EINVAL);
    }
    if u64::from(room) < length {
        return Err(Errno::ENOBUFS);
    }
    cpu.write(argument.wrapping_add(4), BUILD_ID_BYTES)?;
    Ok(length)
}
