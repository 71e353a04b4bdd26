//! Grant table calls (`grant_table.h`).
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::grant_table::{GrantStatus, GrantTableOp, QuerySize, SetupTable};
use janus_proto::abi::xen::{Errno, Hypercall};
use janus_proto::addr::DomId;

use super::{Result, address_mut, call};

fn operate<T>(op: GrantTableOp, argument: &mut T) -> Result<()> {
    // SAFETY: each caller below passes the structure of its operation, which Xen reads and writes in place.
    unsafe { call(Hypercall::GRANT_TABLE_OP, [op.0.into(), address_mut(argument), 1, 0, 0]) }
        .map(drop)
}

/// Sizes the table to `frames.len()` frames and fills in their frame numbers, machine frames under PV.
///
/// # Errors
/// More frames than the domain may have, or no memory.
pub fn setup_table(frames: &mut [u64]) -> Result<()> {
    let mut argument = SetupTable {
        dom: DomId::SELF,
        pad0: [0; 2],
        nr_frames: u32::try_from(frames.len()).map_err(|_| Errno::EINVAL)?,
        status: GrantStatus::OKAY,
        pad1: [0; 6],
        frame_list: address_mut(frames),
    };
    operate(GrantTableOp::SETUP_TABLE, &mut argument)?;
    check(argument.status)
}

/// The sizes of the grant table, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSize {
    /// Now.
    pub now: u32,
    /// At most.
    pub max: u32,
}

/// How large the table is and may become.
///
/// # Errors
/// There is no Xen.
pub fn query_size() -> Result<TableSize> {
    let mut argument = QuerySize {
        dom: DomId::SELF,
        pad0: [0; 2],
        nr_frames: 0,
        max_nr_frames: 0,
        status: GrantStatus::OKAY,
        pad1: [0; 2],
    };
    operate(GrantTableOp::QUERY_SIZE, &mut argument)?;
    check(argument.status)?;
    Ok(TableSize { now: argument.nr_frames, max: argument.max_nr_frames })
}

fn check(status: GrantStatus) -> Result<()> {
    match status {
        GrantStatus::OKAY => Ok(()),
        GrantStatus::BAD_DOMAIN => Err(Errno::ESRCH),
        GrantStatus::PERMISSION_DENIED => Err(Errno::EPERM),
        GrantStatus::NO_SPACE => Err(Errno::ENOSPC),
        _ => Err(Errno::EINVAL),
    }
}
