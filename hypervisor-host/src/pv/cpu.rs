//! A virtual CPU, as its own thread has it: everything of it that nobody else touches.

use std::sync::Arc;

use janus_proto::abi::xen::trap::{FLAT_RING3_CS64, FLAT_RING3_SS64};
use janus_proto::abi::xen::{Errno, Hypercall};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::domain::{Domain, EndReason};
use super::report::{Cause, CpuReport, CpuState, Deed};
use super::traps::Vectors;
use super::vcpu_info::VcpuShared;
use crate::engine::{Fault, Vcpu};

/// Things a CPU did that are kept for a report.
const DEEDS: usize = 32;
/// Words of the stack, and bytes of code, in a report.
const STACK_WORDS: usize = 64;
const CODE_BYTES: usize = 16;

/// `rflags`: interrupts. Always set natively; the guest's own is the upcall mask.
pub(crate) const RFLAGS_IF: u64 = 1 << 9;
/// `rflags`: I/O privilege level.
pub(crate) const RFLAGS_IOPL: u64 = 3 << 12;
/// `rflags`: trap flag.
pub(crate) const RFLAGS_TF: u64 = 1 << 8;
/// `rflags`: nested task.
pub(crate) const RFLAGS_NT: u64 = 1 << 14;
/// `rflags`: resume flag.
pub(crate) const RFLAGS_RF: u64 = 1 << 16;
/// `rflags`: virtual 8086 mode.
pub(crate) const RFLAGS_VM: u64 = 1 << 17;
/// `rflags`: alignment check.
pub(crate) const RFLAGS_AC: u64 = 1 << 18;
/// What a guest may have in `rflags` while it runs; bit 1 is always set.
pub(crate) const RFLAGS_GUEST: u64 =
    0x0020_0000 | RFLAGS_AC | RFLAGS_RF | RFLAGS_NT | 0xfd5 | RFLAGS_IF;

/// What ends a CPU's turn for good.
#[derive(Debug)]
pub(crate) struct Over(pub(crate) EndReason, pub(crate) Option<Fault>);

impl From<Cause> for Over {
    fn from(cause: Cause) -> Self {
        let fault = match cause {
            Cause::NoHandler(fault) => Some(fault),
            _ => None,
        };
        Self(EndReason::Crashed(cause), fault)
    }
}

/// The last things a CPU did.
#[derive(Debug)]
pub(crate) struct Deeds {
    ring: [Option<Deed>; DEEDS],
    next: usize,
}

impl Deeds {
    pub(crate) fn add(&mut self, deed: Deed) {
        if let Some(place) = self.ring.get_mut(self.next % DEEDS) {
            *place = Some(deed);
        }
        self.next = self.next.wrapping_add(1);
    }

    fn list(&self) -> Vec<Deed> {
        let (newer, older) = self.ring.split_at(self.next % DEEDS);
        older.iter().chain(newer).copied().flatten().collect()
    }
}

/// A virtual CPU.
pub(crate) struct Cpu {
    pub(crate) domain: Arc<Domain>,
    pub(crate) index: usize,
    pub(crate) engine: Box<dyn Vcpu>,
    pub(crate) state: CpuState,
    pub(crate) vectors: Vectors,
    /// `vcpu_op` and friends: I/O privilege level, 0 to 3.
    pub(crate) iopl: u8,
    /// Address and length of the I/O bitmap: a clear bit lets the guest's user mode use that port.
    pub(crate) io_bitmap: (u64, u32),
    /// The shadow of CR0.TS.
    pub(crate) task_switched: bool,
    /// The guest's CR4, as far as it may have one.
    pub(crate) cr4: u64,
    pub(crate) deeds: Deeds,
    pub(crate) runstate: super::runstate::Accounts,
    /// The deadline the engine knows.
    pub(crate) armed: Option<u64>,
    /// Where the engine was told that the `vcpu_info` is.
    pub(crate) shown_info: Option<u64>,
    /// The count of the clock's changes that this CPU's areas show.
    pub(crate) clock_changes: u64,
    /// It has run, or is about to: it has a state of its own.
    pub(crate) begun: bool,
    /// In a multicall: no second one.
    pub(crate) in_multicall: bool,
}

impl Cpu {
    pub(crate) fn new(domain: Arc<Domain>, index: usize, engine: Box<dyn Vcpu>) -> Self {
        Self {
            domain,
            index,
            engine,
            state: CpuState {
                kernel_mode: true,
                cs: FLAT_RING3_CS64,
                ss: FLAT_RING3_SS64,
                debug: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
                ..CpuState::default()
            },
            vectors: Vectors::default(),
            iopl: 0,
            io_bitmap: (0, 0),
            task_switched: false,
            cr4: 0,
            deeds: Deeds { ring: [None; DEEDS], next: 0 },
            runstate: super::runstate::Accounts::new(),
            armed: None,
            shown_info: None,
            clock_changes: 0,
            begun: false,
            in_multicall: false,
        }
    }

    pub(crate) fn shared(&self) -> &VcpuShared {
        // The domain has as many as it has CPUs, and at least one.
        self.domain.vcpu(self.index)
    }

    /// Copies a structure from the guest.
    pub(crate) fn read<T: FromBytes + IntoBytes>(&self, address: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.domain.space.read(self.index, address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies bytes from the guest.
    pub(crate) fn read_bytes(&self, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.domain.space.read(self.index, address, buf)
    }

    /// Copies a structure to the guest.
    pub(crate) fn write<T: IntoBytes + Immutable + ?Sized>(
        &self,
        address: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.domain.space.write(self.index, address, value.as_bytes())
    }

    /// Changes between kernel and user mode: page tables and GS base.
    pub(crate) fn toggle_mode(&mut self) -> Result<(), Cause> {
        let user = self.state.kernel_mode;
        if !self.domain.space.switch_mode(self.index, &mut *self.engine, user) {
            return Err(Cause::NoUserTable);
        }
        self.state.kernel_mode = !user;
        std::mem::swap(&mut self.state.registers.gs_base, &mut self.state.other_gs_base);
        Ok(())
    }

    /// Remembers a call for the report.
    pub(crate) fn note_call(&mut self, number: Hypercall, arguments: [u64; 2], answer: i64) {
        self.deeds.add(Deed::Hypercall(number, arguments, answer));
    }

    /// What this CPU was doing.
    pub(crate) fn report(&self, fault: Option<Fault>) -> CpuReport {
        let registers = self.state.registers;
        let subject =
            fault.filter(|fault| fault.vector == 14).map_or(registers.rip, |fault| fault.address);
        let mut state = self.state;
        (state.root, state.user_root) = self.domain.space.roots(self.index);
        let stack = (0..STACK_WORDS as u64)
            .map_while(|word| self.read::<u64>(registers.rsp.wrapping_add(word * 8)).ok());
        let code = (0..CODE_BYTES as u64)
            .map_while(|byte| self.read::<u8>(registers.rip.wrapping_add(byte)).ok());
        CpuReport {
            vcpu: self.index,
            state,
            fault,
            walk: self.domain.space.walk(self.index, subject),
            deeds: self.deeds.list(),
            code: code.collect(),
            stack: stack.collect(),
        }
    }
}
