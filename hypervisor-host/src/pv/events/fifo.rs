//! FIFO delivery (`xen/include/public/event_channel.h`, "FIFO-based event channel ABI"): a word for each port, and for
//! each CPU sixteen queues of ports linked through those words.
//!
//! The guest owns the heads and unlinks; Xen keeps the tails, which are here. Everything the guest can write is taken
//! as it comes: a link that makes no sense loses the guest its own events and nothing else.

use std::sync::atomic::{AtomicU32, Ordering};

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::event_channel::EVTCHN_FIFO_NR_CHANNELS;
use janus_proto::addr::{Mfn, PAGE_SIZE, Port};

use super::{Binding, PRIORITY_DEFAULT, Table, Wake};
use crate::machine::ram::Ram;
use crate::pv::vcpu_info::VcpuShared;

const PENDING: u32 = 1 << 31;
const MASKED: u32 = 1 << 30;
const LINKED: u32 = 1 << 29;
const BUSY: u32 = 1 << 28;
/// Bits of a link (`EVTCHN_FIFO_LINK_BITS`).
pub(super) const LINK_BITS: u8 = 17;
const LINK_MASK: u32 = (1 << LINK_BITS) - 1;
/// Queues of a CPU (`EVTCHN_FIFO_MAX_QUEUES`).
const QUEUES: usize = 16;
/// Event words in a page.
const WORDS_IN_PAGE: u32 = 1024;
/// Bytes of `struct evtchn_fifo_control_block`.
const CONTROL_BLOCK: u32 = 72;
/// How often a link is tried against a guest that keeps changing it.
const TRIES: u32 = 4;

/// Where a port is queued.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    priority: u8,
    /// The queue that it is, or was last, in.
    last: (usize, u8),
    /// An event came while there was no word for it.
    pending: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self { priority: PRIORITY_DEFAULT, last: (0, PRIORITY_DEFAULT), pending: false }
    }
}

impl Place {
    /// What a port has when it is given out again; where it may still be linked stays.
    pub(super) fn reset(&mut self) {
        (self.priority, self.pending) = (PRIORITY_DEFAULT, false);
    }
}

#[derive(Clone, Debug, Default)]
struct Queues {
    /// Frame and offset of the control block.
    control: Option<(Mfn, u32)>,
    tails: [u32; QUEUES],
}

/// The queues of a domain.
#[derive(Clone, Debug)]
pub(super) struct Fifo {
    array: Vec<Mfn>,
    vcpus: Vec<Queues>,
}

impl Fifo {
    /// All frames it uses.
    pub(super) fn into_frames(self) -> Vec<Mfn> {
        let controls = self.vcpus.into_iter().filter_map(|queues| queues.control);
        self.array.into_iter().chain(controls.map(|(frame, _)| frame)).collect()
    }

    fn word<'a>(&self, ram: &'a Ram, port: Port) -> Option<&'a AtomicU32> {
        let frame = self.array.get((port.0 / WORDS_IN_PAGE) as usize)?;
        ram.words(*frame, 1)?.get((port.0 % WORDS_IN_PAGE) as usize)
    }

    pub(super) fn is_pending(&self, ram: &Ram, port: Port) -> bool {
        self.word(ram, port).is_some_and(|word| word.load(Ordering::SeqCst) & PENDING != 0)
    }

    pub(super) fn clear_pending(&self, ram: &Ram, port: Port) {
        if let Some(word) = self.word(ram, port) {
            word.fetch_and(!PENDING, Ordering::SeqCst);
        }
    }
}

/// Gives a CPU its control block, and changes the domain to FIFO delivery at the first.
pub(super) fn init_control(
    table: &mut Table,
    vcpus: usize,
    vcpu: usize,
    frame: Mfn,
    offset: u32,
) -> Result<(), Errno> {
    let room = u32::try_from(PAGE_SIZE).unwrap_or(0) - CONTROL_BLOCK;
    if offset > room || !offset.is_multiple_of(8) {
        return Err(Errno::EINVAL);
    }
    let fifo = table
        .fifo
        .get_or_insert_with(|| Fifo { array: Vec::new(), vcpus: vec![Queues::default(); vcpus] });
    let queues = fifo.vcpus.get_mut(vcpu).ok_or(Errno::ENOENT)?;
    if queues.control.is_some() {
        return Err(Errno::EINVAL);
    }
    queues.control = Some((frame, offset));
    Ok(())
}

/// One more page of event words; answers whom to wake for events that had waited for it.
pub(super) fn expand_array(
    table: &mut Table,
    ram: &Ram,
    vcpus: &[VcpuShared],
    frame: Mfn,
) -> Result<Vec<Wake>, Errno> {
    let fifo = table.fifo.as_mut().ok_or(Errno::EOPNOTSUPP)?;
    let first = u32::try_from(fifo.array.len()).unwrap_or(u32::MAX).saturating_mul(WORDS_IN_PAGE);
    if first >= EVTCHN_FIFO_NR_CHANNELS {
        return Err(Errno::ENOSPC);
    }
    fifo.array.push(frame);
    let mut waiting = Vec::new();
    for port in first..first + WORDS_IN_PAGE {
        let Some(channel) = table.channels.get_mut(port as usize) else { break };
        if std::mem::take(&mut channel.queue.pending) {
            waiting.push(Port(port));
        }
    }
    Ok(waiting.into_iter().map(|port| set_pending(table, ram, vcpus, port)).collect())
}

/// Remembers what was pending in the two-level bits, for when the words are there.
pub(super) fn adopt(table: &mut Table, is_pending: impl Fn(Port) -> bool) {
    for (index, channel) in table.channels.iter_mut().enumerate() {
        let Ok(port) = u32::try_from(index) else { return };
        channel.queue.pending |=
            !matches!(channel.binding, Binding::Free) && is_pending(Port(port));
    }
}

pub(super) fn set_priority(table: &mut Table, port: Port, priority: u32) -> Result<(), Errno> {
    let priority = u8::try_from(priority).map_err(|_| Errno::EINVAL)?;
    if usize::from(priority) >= QUEUES {
        return Err(Errno::EINVAL);
    }
    let channel = table.channels.get_mut(port.0 as usize).ok_or(Errno::EINVAL)?;
    if table.fifo.is_none() {
        return Err(Errno::ENOSYS);
    }
    channel.queue.priority = priority;
    Ok(())
}

/// Marks an event and links it (`evtchn_fifo_set_pending`).
pub(super) fn set_pending(table: &mut Table, ram: &Ram, vcpus: &[VcpuShared], port: Port) -> Wake {
    let nobody = Wake { vcpu: None, pollers: false };
    let (Some(fifo), Some(channel)) =
        (table.fifo.as_mut(), table.channels.get_mut(port.0 as usize))
    else {
        return nobody;
    };
    let Some(word) = fifo.word(ram, port) else {
        channel.queue.pending = true;
        return nobody;
    };
    let seen = word.fetch_or(PENDING, Ordering::SeqCst);
    let pollers = seen & PENDING == 0;
    let vcpu = channel.vcpu;
    let due = word.load(Ordering::SeqCst) & (MASKED | LINKED) == 0
        && link(fifo, ram, word, port, vcpu, &mut channel.queue)
        && vcpus.get(vcpu).is_some_and(VcpuShared::mark_pending);
    Wake { vcpu: due.then_some(vcpu), pollers }
}

/// Unmasks, and links what is pending.
pub(super) fn unmask(
    table: &mut Table,
    ram: &Ram,
    vcpus: &[VcpuShared],
    port: Port,
) -> Option<usize> {
    let word = table.fifo.as_ref()?.word(ram, port)?;
    let seen = word.fetch_and(!MASKED, Ordering::SeqCst);
    if seen & PENDING == 0 {
        return None;
    }
    set_pending(table, ram, vcpus, port).vcpu
}

/// Puts a port at the end of its queue; `true`: the queue was empty and its CPU has not been told.
fn link(
    fifo: &mut Fifo,
    ram: &Ram,
    word: &AtomicU32,
    port: Port,
    vcpu: usize,
    place: &mut Place,
) -> bool {
    let queue = (vcpu, place.priority);
    let Some((frame, offset)) = fifo.vcpus.get(vcpu).and_then(|queues| queues.control) else {
        return false;
    };
    if word.fetch_or(LINKED, Ordering::SeqCst) & LINKED != 0 {
        return false;
    }
    let old = std::mem::replace(&mut place.last, queue);
    // The tail of its former queue: that queue is empty now, and must not be extended from here.
    if let Some(tail) = tail(fifo, old)
        && *tail == port.0
    {
        *tail = 0;
    }
    let before = tail(fifo, queue).map_or(0, |tail| std::mem::replace(tail, port.0));
    let linked =
        before != 0 && fifo.word(ram, Port(before)).is_some_and(|word| set_link(word, port.0));
    if linked {
        return false;
    }
    let start = (offset / 4) as usize;
    let Some(control) = ram.words(frame, 1).and_then(|words| words.get(start..start + 18)) else {
        return false;
    };
    // ready, reserved, then the heads.
    if let Some(head) = control.get(2 + usize::from(queue.1)) {
        head.store(port.0, Ordering::SeqCst);
    }
    let bit = 1 << queue.1;
    control.first().is_some_and(|ready| ready.fetch_or(bit, Ordering::SeqCst) & bit == 0)
}

fn tail(fifo: &mut Fifo, (vcpu, priority): (usize, u8)) -> Option<&mut u32> {
    fifo.vcpus.get_mut(vcpu)?.tails.get_mut(usize::from(priority))
}

/// Links `port` behind the port of `word`, unless the guest has taken that from its queue.
fn set_link(word: &AtomicU32, port: u32) -> bool {
    let mut seen = word.load(Ordering::SeqCst);
    for attempt in 0..=TRIES {
        if seen & LINKED == 0 {
            word.fetch_and(!BUSY, Ordering::SeqCst);
            return false;
        }
        let new = (seen & !(BUSY | LINK_MASK)) | port;
        match word.compare_exchange(seen, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return true,
            // From the second attempt on the guest is told to keep off.
            Err(_) if attempt == 0 => seen = word.fetch_or(BUSY, Ordering::SeqCst) | BUSY,
            Err(now) => seen = now,
        }
    }
    // A guest that does not keep off loses this event.
    word.fetch_and(!BUSY, Ordering::SeqCst);
    true
}
