//! Memory: page frames, the kernel heap, page tables, stacks.
//!
//! The address space is "identity style": RAM is mapped at its guest physical address, and so is MMIO
//! when asked for. Page 0 is never mapped.

pub mod bitmap;
pub mod frames;
pub mod heap;
pub mod paging;
pub(crate) mod reclaim;
pub mod reservation;
pub mod slab;
pub mod stack;
