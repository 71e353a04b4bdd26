//! How a virtual CPU spent its time (`xen/include/public/vcpu.h`, `struct vcpu_runstate_info`).

use janus_proto::abi::xen::vcpu::{Runstate, RunstateInfo};

use super::timers::now;

/// The accounts of one CPU.
#[derive(Debug)]
pub(crate) struct Accounts {
    info: RunstateInfo,
    /// The guest's virtual address that is kept up to date.
    pub(crate) area: Option<u64>,
    /// The same for a copy of `vcpu_time_info`.
    pub(crate) time_area: Option<u64>,
}

impl Accounts {
    pub(crate) fn new() -> Self {
        let info = RunstateInfo {
            state: Runstate::RUNNING,
            pad0: [0; 4],
            state_entry_time: now(),
            time: [0; 4],
        };
        Self { info, area: None, time_area: None }
    }

    /// Goes over to a state.
    pub(crate) fn change(&mut self, state: Runstate) {
        let now = now();
        let spent = now.saturating_sub(self.info.state_entry_time);
        if let Some(total) = self.info.time.get_mut(self.info.state.0 as usize) {
            *total = total.saturating_add(spent);
        }
        (self.info.state, self.info.state_entry_time) = (state, now);
    }

    /// What the guest is told, up to now.
    pub(crate) fn info(&mut self) -> RunstateInfo {
        self.change(self.info.state);
        self.info
    }
}
