//! A guest made of a script, for tests: an engine that hands out exits, and memory that is flat.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use janus_proto::abi::xen::grant_table::{GrantStatus, MapFlags};
use janus_proto::abi::xen::{Errno, Hypercall};
use janus_proto::addr::{DomId, Mfn};
use janus_proto::grant::Access;

use super::cpu::Cpu;
use super::domain::{Domain, Setup};
use super::grant::{FrameTypes, MAX_GRANT_FRAMES, MAX_STATUS_FRAMES};
use super::report::WalkStep;
use super::space::{Resolution, Space, TableWrite};
use crate::engine::{EngineError, Exit, Fault, Kicker, Mapping, Registers, Vcpu};
use crate::machine::ram::{FIRST_FRAME, Ram};
use crate::memory::{copy_in, copy_out};

/// Frames of the guest's own; behind them shared info and the grant table.
pub(crate) const FRAMES: u64 = 64;

/// A frame by its number in the guest.
pub(crate) fn frame(index: u64) -> Mfn {
    Mfn(FIRST_FRAME.0 + index)
}

/// Address `n` is byte `n` of the guest's memory; page 0 is not there.
#[derive(Debug)]
pub(crate) struct Flat {
    ram: Arc<Ram>,
    pub(crate) references: AtomicI64,
}

impl Flat {
    fn words(&self) -> &[std::sync::atomic::AtomicU32] {
        self.ram.words(FIRST_FRAME, FRAMES).unwrap_or_default()
    }
    fn offset(address: u64) -> Result<usize, Errno> {
        if address < 4096 {
            return Err(Errno::EFAULT);
        }
        usize::try_from(address).map_err(|_| Errno::EFAULT)
    }
}

impl FrameTypes for Flat {
    fn get(&self, frame: Mfn, _access: Access) -> bool {
        let own = (FIRST_FRAME.0..FIRST_FRAME.0 + FRAMES).contains(&frame.0);
        self.references.fetch_add(own.into(), Ordering::SeqCst);
        own
    }
    fn put(&self, _frame: Mfn, _access: Access) {
        self.references.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Space for Flat {
    fn read(&self, _vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let offset = Self::offset(address)?;
        if copy_out(self.words(), offset, buf) { Ok(()) } else { Err(Errno::EFAULT) }
    }
    fn write(&self, _vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let offset = Self::offset(address)?;
        if copy_in(self.words(), offset, bytes) { Ok(()) } else { Err(Errno::EFAULT) }
    }
    fn fault(&self, _vcpu: usize, _engine: &mut dyn Vcpu, fault: &Fault) -> Resolution {
        Resolution::Guest(fault.error)
    }
    fn write_table(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _old: Option<u64>,
        _new: u64,
        _size: usize,
    ) -> Option<TableWrite> {
        None
    }
    fn hypercall(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _number: Hypercall,
        _arguments: [u64; 6],
    ) -> Option<Result<u64, Errno>> {
        None
    }
    fn switch_mode(&self, _vcpu: usize, _engine: &mut dyn Vcpu, _user: bool) -> bool {
        true
    }
    fn initialise(&self, _vcpu: usize, _root: Mfn, _user: Option<Mfn>) -> Result<(), Errno> {
        Ok(())
    }
    fn load(&self, _vcpu: usize, _engine: &mut dyn Vcpu) {}
    fn map_grant(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _flags: MapFlags,
        _frame: Mfn,
    ) -> Result<(), GrantStatus> {
        Ok(())
    }
    fn unmap_grant(
        &self,
        _vcpu: usize,
        _engine: &mut dyn Vcpu,
        _address: u64,
        _replace: Option<u64>,
        _flags: MapFlags,
        _frame: Mfn,
    ) -> Result<(), GrantStatus> {
        Ok(())
    }
    fn is_mapped(&self, _frame: Mfn) -> bool {
        false
    }
    fn roots(&self, _vcpu: usize) -> (Option<Mfn>, Option<Mfn>) {
        (Some(frame(1)), None)
    }
    fn walk(&self, _vcpu: usize, _address: u64) -> Vec<WalkStep> {
        Vec::new()
    }
}

/// One stretch of guest code: what it does to the registers, and what it stops for.
pub(crate) type Stretch = Box<dyn FnMut(&mut Registers) -> Exit + Send>;

/// An engine that runs a script; at its end the guest computes for ever, until it is kicked.
pub(crate) struct Script {
    stretches: VecDeque<Stretch>,
    kicks: Receiver<bool>,
    kicker: Arc<Kick>,
    deadline: Option<u64>,
}

#[derive(Debug)]
struct Kick(Mutex<Sender<bool>>);

impl Kicker for Kick {
    fn kick(&self) {
        let _ = self.0.lock().map(|sender| sender.send(false));
    }
    fn kill(&self) {
        let _ = self.0.lock().map(|sender| sender.send(true));
    }
}

impl Script {
    pub(crate) fn new(stretches: Vec<Stretch>) -> Box<Self> {
        let (sender, kicks) = channel();
        let kicker = Arc::new(Kick(Mutex::new(sender)));
        Box::new(Self { stretches: stretches.into(), kicks, kicker, deadline: None })
    }
}

impl Vcpu for Script {
    fn run(&mut self, registers: &mut Registers) -> Result<Exit, EngineError> {
        if let Some(mut stretch) = self.stretches.pop_front() {
            return Ok(stretch(registers));
        }
        let killed = match self.deadline {
            None => self.kicks.recv().unwrap_or(true),
            Some(at) => {
                let left = at.saturating_sub(super::timers::now());
                self.kicks.recv_timeout(std::time::Duration::from_nanos(left)).unwrap_or(false)
            }
        };
        if killed { Err(EngineError::Ended(9)) } else { Ok(Exit::Kicked) }
    }
    fn map(&mut self, _mapping: Mapping) {}
    fn unmap(&mut self, _address: u64, _pages: usize) {}
    fn unmap_all(&mut self) {}
    fn switch(&mut self, _root: Mfn) {}
    fn set_deadline(&mut self, nanoseconds: Option<u64>) {
        self.deadline = nanoseconds;
    }
    fn kicker(&self) -> Arc<dyn Kicker> {
        self.kicker.clone()
    }
    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }
}

/// A domain of so many CPUs, and its memory.
pub(crate) fn domain(vcpus: usize) -> (Arc<Domain>, Arc<Flat>) {
    let frames = FRAMES + 1 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES;
    let ram = Arc::new(Ram::new(frames).unwrap());
    let setup = Setup {
        id: DomId(7),
        uuid: [7; 16],
        vcpus,
        ram: ram.clone(),
        shared_info: frame(FRAMES),
        grant_frames: frame(FRAMES + 1),
        console: frame(3),
        store: frame(2),
    };
    let space = Arc::new(Flat { ram, references: AtomicI64::new(0) });
    (Domain::new(&setup, space.clone()).unwrap(), space)
}

/// A CPU that no thread serves, to call handlers with.
pub(crate) fn cpu() -> (Cpu, Arc<Flat>) {
    let (domain, space) = domain(2);
    (Cpu::new(domain, 0, Script::new(Vec::new())), space)
}

/// Puts bytes into guest memory.
pub(crate) fn put(cpu: &Cpu, address: u64, bytes: &[u8]) {
    cpu.domain.space.write(0, address, bytes).unwrap();
}

/// A hypercall of the script: registers as the guest sets them.
pub(crate) fn call(number: Hypercall, arguments: [u64; 3]) -> Stretch {
    Box::new(move |registers| {
        registers.rax = number.0;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        Exit::Hypercall
    })
}
