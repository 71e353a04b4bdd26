//! Guests of KVM: the engine for machines whose processor, and permissions, allow it.
//!
//! A machine here is the least that Linux and our own kernel want: memory, interrupt controllers and timer in the
//! host's kernel, a serial port, ACPI tables, and virtio devices in windows of memory. [`guest`] makes it, `boot` puts
//! a kernel into it, `vcpu` serves its exits, [`probe`] says whether KVM is worth using at all.

mod acpi;
pub mod boot;
mod cpuid;
mod devices;
pub mod guest;
mod layout;
pub mod machine;
mod ports;
pub mod probe;
mod registers;
pub mod stats;
mod vcpu;
mod xen;

pub use boot::Door;
pub use guest::{Config, KvmError, KvmGuest};
pub use machine::{DomainEnd, End};
