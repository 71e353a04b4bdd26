//! A virtual CPU without a thread: hypercalls are made by whoever holds it. For fuzzing.

use std::fmt;
use std::sync::Arc;

use janus_proto::abi::xen::Hypercall;

use super::cpu::Cpu;
use super::domain::Domain;
use super::hypercall::{Answer, dispatch};
use super::report::CpuState;
use crate::engine::Vcpu;

/// A CPU that never runs.
pub struct BareCpu(Cpu);

impl fmt::Debug for BareCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BareCpu({:?})", self.0.state)
    }
}

impl BareCpu {
    /// CPU 0 of a domain that is not started.
    #[must_use]
    pub fn new(domain: Arc<Domain>, engine: Box<dyn Vcpu>) -> Self {
        Self(Cpu::new(domain, 0, engine))
    }

    /// Its registers.
    pub fn state(&mut self) -> &mut CpuState {
        &mut self.0.state
    }

    /// Makes one hypercall; `None`: it did not answer, because it returned elsewhere or ended the domain. Calls that
    /// wait do not.
    pub fn call(&mut self, number: u64, arguments: [u64; 6]) -> Option<i64> {
        // An NMI that is due ends every wait.
        self.0.shared().send_nmi();
        match dispatch(&mut self.0, Hypercall(number), arguments) {
            Answer::Value(value) => Some(value),
            Answer::Done | Answer::Crash(_) | Answer::End(_) => None,
        }
    }
}
