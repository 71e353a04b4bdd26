//! Entry points of a PV guest (`xen/include/public/callback.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// First argument of `Hypercall::CALLBACK_OP` (`CALLBACKOP_*`).
    pub enum CallbackOp: u32 {
        /// [`CallbackRegister`].
        REGISTER = 0,
        /// [`CallbackUnregister`].
        UNREGISTER = 1,
    }
}

open_enum! {
    /// Which entry (`CALLBACKTYPE_*`).
    pub enum CallbackType: u16 {
        /// Event upcall.
        EVENT = 0,
        /// A selector could not be loaded on the way back to the guest.
        FAILSAFE = 1,
        /// `syscall` from user mode.
        SYSCALL = 2,
        /// NMI.
        NMI = 4,
        /// `sysenter` from user mode.
        SYSENTER = 5,
        /// 32-bit `syscall` from user mode.
        SYSCALL32 = 7,
    }
}

open_flags! {
    /// Flags (`CALLBACKF_*`).
    pub struct CallbackFlags: u16 {
        /// Enter with events masked (always so for EVENT).
        const MASK_EVENTS = 1;
    }
}

/// Sets an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CallbackRegister {
    /// Which.
    pub kind: CallbackType,
    /// How.
    pub flags: CallbackFlags,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Where.
    pub address: u64,
}
assert_layout!(CallbackRegister, size = 16, kind = 0, flags = 2, address = 8);

/// Removes an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CallbackUnregister {
    /// Which.
    pub kind: CallbackType,
    /// Zero.
    pub unused: u16,
}
assert_layout!(CallbackUnregister, size = 4, kind = 0, unused = 2);
