//! The way into traps under Xen PV: the trap table and the event callback.
