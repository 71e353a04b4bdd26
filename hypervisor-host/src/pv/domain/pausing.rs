//! Standing still: pauses, and what a debugger does with CPUs that stand.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{Domain, Life, attention};
use crate::engine::Fault;
use crate::pv::debug::{BREAKPOINT, DEBUG, Debugger};
use crate::pv::report::CpuState;

/// A CPU that stands still.
#[derive(Debug)]
pub(super) struct Standing {
    vcpu: usize,
    state: CpuState,
    /// Its FPU state in the XSAVE layout, if a debugger may ask for it.
    fpu: Vec<u8>,
}

/// The bit of a CPU, of which there are 32 at most.
pub(super) fn bit(vcpu: usize) -> u32 {
    u32::try_from(vcpu).ok().and_then(|vcpu| 1_u32.checked_shl(vcpu)).unwrap_or(0)
}

impl Domain {
    /// Stops all CPUs, and returns when they stand still. Each call wants its own [`Self::unpause`].
    /// Not to be called by a handler.
    pub fn pause(&self) {
        let mut life = self.life();
        life.pauses += 1;
        self.attention.fetch_or(attention::PAUSE, Ordering::SeqCst);
        for shared in self.vcpus.iter() {
            shared.wake();
        }
        while life.standing < life.threads && life.ended.is_none() {
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes one [`Self::pause`] back.
    pub fn unpause(&self) {
        let mut life = self.life();
        life.pauses = life.pauses.saturating_sub(1);
        if life.pauses == 0 {
            self.attention.fetch_and(!attention::PAUSE, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// A thread of a CPU stands still while the domain is paused or it is held. Others may change its registers
    /// meanwhile.
    pub(crate) fn stand(&self, vcpu: usize, state: &mut CpuState, fpu: Vec<u8>) {
        let mut life = self.life();
        let stands = |life: &Life| {
            life.end.is_none()
                && (life.pauses > 0 || self.held.load(Ordering::SeqCst) & bit(vcpu) != 0)
        };
        if !stands(&life) {
            return;
        }
        life.standing += 1;
        life.registers.push(Standing { vcpu, state: *state, fpu });
        self.changed.notify_all();
        while stands(&life) {
            life = self.changed.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
        life.standing -= 1;
        if let Some(place) = life.registers.iter().position(|standing| standing.vcpu == vcpu) {
            *state = life.registers.swap_remove(place).state;
        }
    }

    /// Looks at, or changes, the registers of a CPU that stands still; `None`: it does not.
    pub fn registers<R>(&self, vcpu: usize, with: impl FnOnce(&mut CpuState) -> R) -> Option<R> {
        let mut life = self.life();
        let standing = life.registers.iter_mut().find(|standing| standing.vcpu == vcpu);
        standing.map(|standing| with(&mut standing.state))
    }

    /// The FPU state of a CPU that stands still, in the XSAVE layout; empty: not known.
    #[must_use]
    pub fn fpu(&self, vcpu: usize) -> Vec<u8> {
        let life = self.life();
        let standing = life.registers.iter().find(|standing| standing.vcpu == vcpu);
        standing.map(|standing| standing.fpu.clone()).unwrap_or_default()
    }

    /// Keeps these CPUs (a bit each) standing when the domain, which is paused now, goes on.
    pub fn hold(&self, vcpus: u32) {
        let life = self.life();
        self.held.store(vcpus, Ordering::SeqCst);
        if vcpus == 0 {
            self.attention.fetch_and(!attention::HOLD, Ordering::SeqCst);
        } else {
            self.attention.fetch_or(attention::HOLD, Ordering::SeqCst);
        }
        drop(life);
        self.changed.notify_all();
    }

    /// Lets these CPUs (a bit each) run one instruction when the domain, which is paused now, goes on, without any
    /// events in between; each then stops the domain for its debugger as a debug exception does.
    pub fn step(&self, vcpus: u32) {
        self.stepping.store(vcpus, Ordering::SeqCst);
    }

    /// Whether a CPU is to run one instruction.
    pub(crate) fn steps(&self, vcpu: usize) -> bool {
        self.stepping.load(Ordering::Relaxed) & bit(vcpu) != 0
    }

    /// It has.
    pub(crate) fn stepped(&self, vcpu: usize) {
        self.stepping.fetch_and(!bit(vcpu), Ordering::SeqCst);
        let fault = Fault { vector: DEBUG, error: 0, address: 0 };
        // Without a debugger there is nobody to stop for.
        let _ = self.stop_for_debugger(vcpu, fault);
    }

    /// Whether a debugger is there.
    pub(crate) fn has_debugger(&self) -> bool {
        self.debugger.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Sends debug exceptions and breakpoints there from now on, not to the guest; `None`: to the guest again.
    pub fn set_debugger(&self, debugger: Option<Debugger>) {
        *self.debugger.lock().unwrap_or_else(PoisonError::into_inner) = debugger;
    }

    /// Stops the domain for its debugger; `false`: it has none, or that is none of its exceptions.
    pub(crate) fn stop_for_debugger(&self, vcpu: usize, fault: Fault) -> bool {
        if !matches!(fault.vector, DEBUG | BREAKPOINT) {
            return false;
        }
        let debugger = self.debugger.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(Debugger(hears)) = debugger else { return false };
        let mut life = self.life();
        life.pauses += 1;
        self.attention.fetch_or(attention::PAUSE, Ordering::SeqCst);
        drop(life);
        for (_, shared) in self.vcpus.iter().enumerate().filter(|(index, _)| *index != vcpu) {
            shared.wake();
        }
        hears(vcpu, fault);
        true
    }
}
