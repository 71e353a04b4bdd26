//! Xen's interface for paravirtualised guests, on any [engine](crate::engine): what makes a process a domain.
//!
//! [`domain::Domain`] is the domain as everybody around it sees it: backends bind event channels and map grants, a
//! toolstack starts it and waits for its end. `run` gives each virtual CPU a thread that goes from exit to exit;
//! `hypercall` is the one table of calls. Layouts and numbers are in `janus_proto::abi::xen`; the order of checks and
//! the answers are those of Xen 4.17.

mod access;
pub mod bare;
pub mod builder;
mod console_io;
pub(crate) mod cpu;
mod cpuid;
pub mod debug;
pub mod domain;
mod emulate;
pub mod events;
#[cfg(test)]
mod fake;
pub mod grant;
pub(crate) mod hvm;
pub mod hypercall;
pub mod io;
pub mod mm;
mod msr;
mod multicall;
mod operand;
mod physdev;
mod privileged;
pub mod report;
mod run;
mod runstate;
mod sched;
mod segments;
pub mod space;
pub mod stats;
pub mod timers;
mod traps;
mod vcpu;
pub(crate) mod vcpu_info;
pub(crate) mod version;
