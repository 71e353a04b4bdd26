//! Calls of a guest in a hardware container (`hvm/hvm_op.h`, `hvm/params.h`).
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::Hypercall;
use janus_proto::abi::xen::hvm::{HvmOp, HvmParam, HvmParamValue, callback_vector};
use janus_proto::addr::DomId;

use super::{Result, address_mut, call};

/// The value of a parameter.
///
/// # Errors
/// No such parameter.
pub fn param(index: HvmParam) -> Result {
    let mut argument = HvmParamValue { domid: DomId::SELF, pad: 0, index, value: 0 };
    // SAFETY: Xen reads the structure and writes `value`.
    unsafe {
        call(Hypercall::HVM_OP, [HvmOp::GET_PARAM.0.into(), address_mut(&mut argument), 0, 0, 0])
    }?;
    Ok(argument.value)
}

/// Has events delivered through interrupt vector `vector` of every CPU, without end-of-interrupt.
///
/// # Errors
/// Xen does not allow it.
///
/// # Safety
/// The interrupt table handles this vector.
pub unsafe fn set_callback_vector(vector: u8) -> Result<()> {
    let mut argument = HvmParamValue {
        domid: DomId::SELF,
        pad: 0,
        index: HvmParam::CALLBACK_IRQ,
        value: callback_vector(vector),
    };
    // SAFETY: Xen reads the structure; the caller answers for the interrupts.
    unsafe {
        call(Hypercall::HVM_OP, [HvmOp::SET_PARAM.0.into(), address_mut(&mut argument), 0, 0, 0])
    }
    .map(drop)
}

/// Has all CPUs forget all cached translations.
///
/// # Errors
/// There is no Xen.
pub fn flush_tlbs() -> Result<()> {
    // SAFETY: no structure, for all CPUs; a flush changes no mapping.
    unsafe { call(Hypercall::HVM_OP, [HvmOp::FLUSH_TLBS.0.into(), 0, 0, 0, 0]) }.map(drop)
}
