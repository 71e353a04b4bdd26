//! The part of a virtual CPU that others touch: its `vcpu_info`, and how to wake it.
//!
//! A waker writes its event first and looks at the mode then; the CPU's thread writes its mode first and looks for
//! events then. So one of the two always sees the other, and nobody kicks or unparks a CPU that needs neither.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::trap::VcpuGuestContext;
use janus_proto::abi::xen::vcpu::RunstateInfo;
use janus_proto::addr::{Mfn, PAGE_SHIFT, PAGE_SIZE};
use zerocopy::FromZeros as _;

use super::hypercall::Counters;
use super::timers::Timers;

use crate::engine::Kicker;
use crate::machine::ram::Ram;

/// Bytes of `struct vcpu_info`.
pub(crate) const VCPU_INFO_SIZE: u64 = 64;
/// CPUs that have one in the shared info page (`XEN_LEGACY_MAX_VCPUS`).
pub(crate) const LEGACY_MAX_VCPUS: usize = 32;

/// What the thread of a CPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// Working for the guest; looks for events before it goes back.
    Host = 0,
    /// In the guest, or as good as.
    Guest = 1,
    /// Waits for an event of this CPU.
    Blocked = 2,
    /// Waits for certain ports, masked or not.
    Polling = 3,
    /// Down, or paused: nothing but a change of that wakes it.
    Offline = 4,
}

/// The shared side of a virtual CPU.
#[derive(Debug)]
pub(crate) struct VcpuShared {
    pub(crate) timers: Timers,
    pub(crate) counters: Counters,
    up: AtomicBool,
    initialised: AtomicBool,
    nmi: AtomicBool,
    /// Its `vcpu_info` is where the guest wants it.
    moved: AtomicBool,
    /// The first state of a CPU that has not run yet.
    context: Mutex<Option<Box<VcpuGuestContext>>>,
    /// As of its last change, for other CPUs.
    runstate: Mutex<RunstateInfo>,
    ram: Arc<Ram>,
    mode: AtomicU8,
    /// Machine address of its `vcpu_info`.
    info: AtomicU64,
    thread: OnceLock<Thread>,
    kicker: OnceLock<Arc<dyn Kicker>>,
    /// Where the processor delivers events: what interrupts it, whatever it does.
    upcall: OnceLock<Arc<dyn Kicker>>,
}

const PENDING: u64 = 0xff;
const MASK: u64 = 0xff << 8;
const MASK_ONE: u64 = 1 << 8;

impl VcpuShared {
    /// CPU `index`, whose `vcpu_info` is in the shared info page if there is room; down until it is started.
    pub(crate) fn new(ram: Arc<Ram>, shared_info: Mfn, index: usize) -> Self {
        let slot = index.min(LEGACY_MAX_VCPUS - 1) as u64;
        let info = AtomicU64::new((shared_info.0 << PAGE_SHIFT) + slot * VCPU_INFO_SIZE);
        let mode = AtomicU8::new(Mode::Offline as u8);
        Self {
            timers: Timers::new(),
            counters: Counters::new(),
            up: AtomicBool::new(false),
            initialised: AtomicBool::new(false),
            nmi: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            context: Mutex::new(None),
            runstate: Mutex::new(RunstateInfo::new_zeroed()),
            ram,
            mode,
            info,
            thread: OnceLock::new(),
            kicker: OnceLock::new(),
            upcall: OnceLock::new(),
        }
    }

    /// Whether it may run.
    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    /// Starts or stops it; its thread acts on it soon.
    pub(crate) fn set_up(&self, up: bool) {
        if self.up.swap(up, Ordering::SeqCst) != up {
            self.wake();
        }
    }

    /// Whether it has a state to start from.
    pub(crate) fn is_initialised(&self) -> bool {
        self.initialised.load(Ordering::SeqCst)
    }

    /// It has a state; the first CPU from the builder.
    pub(crate) fn set_initialised(&self) {
        self.initialised.store(true, Ordering::SeqCst);
    }

    /// Gives it its first state.
    pub(crate) fn set_context(&self, context: Box<VcpuGuestContext>) -> Result<u64, Errno> {
        let mut place = self.context.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_initialised() {
            return Err(Errno::EEXIST);
        }
        *place = Some(context);
        self.set_initialised();
        Ok(0)
    }

    pub(crate) fn take_context(&self) -> Option<Box<VcpuGuestContext>> {
        self.context.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn runstate(&self) -> RunstateInfo {
        *self.runstate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_runstate(&self, info: RunstateInfo) {
        *self.runstate.lock().unwrap_or_else(PoisonError::into_inner) = info;
    }

    /// Another CPU sends it an NMI.
    pub(crate) fn send_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn has_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst)
    }

    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::SeqCst)
    }

    /// Whether the guest has chosen where its `vcpu_info` is.
    pub(crate) fn has_moved(&self) -> bool {
        self.moved.load(Ordering::SeqCst)
    }

    /// Says who serves this CPU: the calling thread, and how to interrupt its guest.
    pub(crate) fn attach(&self, kicker: Arc<dyn Kicker>) {
        let _ = self.thread.set(std::thread::current());
        let _ = self.kicker.set(kicker);
    }

    /// Events interrupt it in this way.
    pub(crate) fn deliver_by(&self, upcall: Arc<dyn Kicker>) {
        let _ = self.upcall.set(upcall);
    }

    /// Where its `vcpu_info` is.
    pub(crate) fn info_address(&self) -> u64 {
        self.info.load(Ordering::Acquire)
    }

    /// Moves it; the caller has checked that it lies in one frame of the guest's, aligned to 8 bytes.
    pub(crate) fn set_info_address(&self, address: u64) {
        self.info.store(address, Ordering::SeqCst);
        self.moved.store(true, Ordering::SeqCst);
    }

    /// The words of its `vcpu_time_info`, as the clock writes them.
    pub(crate) fn time(&self) -> Option<&[std::sync::atomic::AtomicU32]> {
        let address = self.info_address();
        let word = usize::try_from(address % PAGE_SIZE as u64).ok()? / 4;
        self.ram.words(Mfn(address >> PAGE_SHIFT), 1)?.get(word + 8..word + 16)
    }

    /// The eight words of its `vcpu_info`.
    pub(crate) fn info(&self) -> Option<&[AtomicU64]> {
        let address = self.info_address();
        let word = usize::try_from(address % PAGE_SIZE as u64).ok()? / 8;
        self.ram.frame(Mfn(address >> PAGE_SHIFT))?.get(word..word + 8)
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.info()?.get(index)
    }

    /// The word with `evtchn_upcall_pending` and `evtchn_upcall_mask`, both bytes of it. The guest writes single
    /// bytes; our locked operations on the whole word leave its other bytes alone.
    fn flags(&self) -> Option<&AtomicU64> {
        self.word(0)
    }

    /// `evtchn_pending_sel`.
    pub(crate) fn selector(&self) -> Option<&AtomicU64> {
        self.word(1)
    }

    /// `arch.cr2`.
    pub(crate) fn set_cr2(&self, address: u64) {
        if let Some(word) = self.word(2) {
            word.store(address, Ordering::Relaxed);
        }
    }

    /// Whether events may not be delivered.
    pub(crate) fn is_masked(&self) -> bool {
        self.flags().is_none_or(|word| word.load(Ordering::SeqCst) & MASK != 0)
    }

    /// The whole byte `evtchn_upcall_mask`.
    pub(crate) fn mask_byte(&self) -> u8 {
        self.flags()
            .map_or(1, |word| u8::try_from((word.load(Ordering::SeqCst) & MASK) >> 8).unwrap_or(1))
    }

    /// Masks or unmasks events.
    pub(crate) fn set_masked(&self, masked: bool) {
        let Some(word) = self.flags() else { return };
        if masked {
            word.fetch_or(MASK_ONE, Ordering::SeqCst);
        } else {
            word.fetch_and(!MASK, Ordering::SeqCst);
        }
    }

    /// Whether an upcall is due, masked or not.
    pub(crate) fn is_pending(&self) -> bool {
        self.flags().is_some_and(|word| word.load(Ordering::SeqCst) & PENDING != 0)
    }

    /// Whether an upcall is due and may be made.
    pub(crate) fn is_deliverable(&self) -> bool {
        self.flags().is_some_and(|word| {
            let word = word.load(Ordering::SeqCst);
            word & PENDING != 0 && word & MASK == 0
        })
    }

    /// Sets `evtchn_upcall_pending`; `true`: it was clear, so wake the CPU.
    pub(crate) fn mark_pending(&self) -> bool {
        self.flags().is_some_and(|word| word.fetch_or(1, Ordering::SeqCst) & PENDING == 0)
    }

    /// What its thread is doing.
    pub(crate) fn mode(&self) -> Mode {
        match self.mode.load(Ordering::SeqCst) {
            0 => Mode::Host,
            1 => Mode::Guest,
            2 => Mode::Blocked,
            3 => Mode::Polling,
            _ => Mode::Offline,
        }
    }

    /// Its thread says what it is going to do; it looks for reasons not to after this.
    pub(crate) fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// An event was marked pending: makes the CPU see it, if it would not by itself.
    pub(crate) fn wake_for_event(&self) {
        if let Some(upcall) = self.upcall.get() {
            upcall.kick();
            if matches!(self.mode(), Mode::Blocked | Mode::Polling) {
                self.unpark();
            }
            return;
        }
        match self.mode() {
            Mode::Blocked | Mode::Polling => self.unpark(),
            // A guest that has events masked looks itself when it unmasks them.
            Mode::Guest if !self.is_masked() => self.kick(),
            Mode::Guest | Mode::Host | Mode::Offline => {}
        }
    }

    /// Wakes the CPU whatever it does: something other than an event wants its attention.
    pub(crate) fn wake(&self) {
        match self.mode() {
            Mode::Guest => self.kick(),
            Mode::Host => {}
            Mode::Blocked | Mode::Polling | Mode::Offline => self.unpark(),
        }
    }

    fn unpark(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn kick(&self) {
        if let Some(kicker) = self.kicker.get() {
            kicker.kick();
        }
    }

    /// Ends the guest's part of the engine.
    pub(crate) fn kill(&self) {
        if let Some(kicker) = self.kicker.get() {
            kicker.kill();
        }
        self.unpark();
    }
}
