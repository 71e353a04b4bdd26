//! The memory balloon (virtio 1.2, 5.5): pages that the guest gives up, or reports as free, go back to the host.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use janus_proto::abi::virtio::DeviceId;
use janus_proto::abi::virtio::balloon::{
    Config, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, F_PAGE_REPORTING, F_STATS_VQ, PFN_SHIFT,
};
use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::virtqueue::QueueError;
use zerocopy::IntoBytes as _;

use super::Model;
use super::device::Waker;
use super::queue::{Chain, Queue};

/// Entries of a queue.
const SIZES: [u16; 4] = [128; 4];
/// Page numbers read at once.
const STEP: usize = 256;
/// Bytes of a figure: a tag of 16 bits, and 64 bits.
const FIGURE: usize = 10;
/// The same, as lengths on the wire are.
const FIGURE_LEN: u32 = 10;
/// Figures of which we take note.
const MOST_FIGURES: usize = 32;

/// What a queue is for. Those that were not agreed on are left out, and the later ones have lower numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// A figure of the guest's: what it is (virtio 1.2, 5.5.6.3), and its value.
pub type Figure = (u16, u64);

#[derive(Debug, Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    /// Pages given back to the host so far.
    reclaimed: AtomicU64,
    figures: Mutex<Vec<Figure>>,
    /// The driver's buffer for figures: giving it back asks for new ones.
    asking: Mutex<Option<Chain>>,
    wanted: AtomicU8,
    roles: AtomicU8,
    waker: OnceLock<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const HAS_STATISTICS: u8 = 1;
const HAS_REPORTING: u8 = 2;

impl Shared {
    fn role(&self, index: u16) -> Option<Role> {
        let roles = self.roles.load(Ordering::Relaxed);
        let statistics = (roles & HAS_STATISTICS != 0).then_some(Role::Statistics);
        let reporting = (roles & HAS_REPORTING != 0).then_some(Role::Reporting);
        let all = [Some(Role::Inflate), Some(Role::Deflate), statistics, reporting];
        all.into_iter().flatten().nth(index.into())
    }
}

/// The host's hand on a balloon.
#[derive(Clone, Debug)]
pub struct Control(Arc<Shared>);

impl Control {
    /// Asks the guest to give up so many pages in all.
    pub fn set_target(&self, pages: u32) {
        self.0.target.store(pages, Ordering::SeqCst);
        if let Some(waker) = self.0.waker.get() {
            waker.config_changed();
        }
    }
    /// Pages that the guest says it has given up.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }
    /// Pages that went back to the host so far.
    #[must_use]
    pub fn reclaimed(&self) -> u64 {
        self.0.reclaimed.load(Ordering::SeqCst)
    }
    /// What the guest last said of itself.
    #[must_use]
    pub fn figures(&self) -> Vec<Figure> {
        lock(&self.0.figures).clone()
    }
    /// Asks it again; the answer comes later, if the guest has such figures.
    pub fn ask(&self) {
        self.0.wanted.store(1, Ordering::SeqCst);
        if self.0.roles.load(Ordering::Relaxed) & HAS_STATISTICS != 0
            && let Some(waker) = self.0.waker.get()
        {
            waker.wake(2);
        }
    }
}

/// The balloon.
#[derive(Debug, Default)]
pub struct Balloon(Arc<Shared>);

impl Balloon {
    /// A balloon that nobody asks to grow yet, and the host's hand on it.
    #[must_use]
    pub fn new() -> (Self, Control) {
        let shared = Arc::new(Shared::default());
        (Self(Arc::clone(&shared)), Control(shared))
    }

    /// Pages given up, by number.
    fn inflate(&self, chain: &Chain) {
        let mut at = 0;
        while let Some(left) = chain.readable().checked_sub(at).filter(|left| *left >= 4) {
            let mut numbers = [0; STEP * 4];
            let len = usize::try_from(left / 4).unwrap_or(STEP).min(STEP) * 4;
            let Some(bytes) = numbers.get_mut(..len) else { return };
            if chain.read(at, bytes).is_err() {
                return;
            }
            for number in bytes.as_chunks::<4>().0 {
                let page = Gpa(u64::from(u32::from_le_bytes(*number)) << PFN_SHIFT);
                self.count(chain.discard(page, PAGE_SIZE));
            }
            at += u32::try_from(len).unwrap_or(left);
        }
    }

    fn count(&self, pages: Option<u64>) {
        self.0.reclaimed.fetch_add(pages.unwrap_or(0), Ordering::SeqCst);
    }

    fn take_figures(&self, chain: &Chain) {
        let mut figures = Vec::new();
        let mut at = 0;
        while figures.len() < MOST_FIGURES {
            let mut bytes = [0; FIGURE];
            if chain.read(at, &mut bytes).is_err() {
                break;
            }
            let [a, b, value @ ..] = bytes;
            figures.push((u16::from_le_bytes([a, b]), u64::from_le_bytes(value)));
            at += FIGURE_LEN;
        }
        *lock(&self.0.figures) = figures;
    }

    fn statistics(&self, queue: &mut Queue) -> Result<(), QueueError> {
        loop {
            if self.0.wanted.swap(0, Ordering::SeqCst) != 0
                && let Some(chain) = lock(&self.0.asking).take()
            {
                queue.push(chain, 0)?;
            }
            while let Some(chain) = queue.pop()? {
                self.take_figures(&chain);
                // A driver has one; whoever has more gets the older ones back.
                if let Some(older) = lock(&self.0.asking).replace(chain) {
                    queue.push(older, 0)?;
                }
            }
            queue.publish()?;
            if !queue.arm()? {
                return Ok(());
            }
        }
    }
}

impl Model for Balloon {
    fn id(&self) -> DeviceId {
        DeviceId::BALLOON
    }
    fn features(&self) -> u64 {
        F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }
    fn queues(&self) -> &[u16] {
        &SIZES
    }
    fn config(&self) -> Vec<u8> {
        let num_pages = self.0.target.load(Ordering::SeqCst);
        let actual = self.0.actual.load(Ordering::SeqCst);
        Config { num_pages, actual }.as_bytes().to_vec()
    }
    fn write_config(&self, offset: usize, bytes: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(bytes)) {
            self.0.actual.store(u32::from_le_bytes(actual), Ordering::SeqCst);
        }
    }
    fn attach(&self, waker: Waker) {
        // Called once.
        let _ = self.0.waker.set(waker);
    }
    fn start(&self, features: u64) {
        let has = |feature: u64, role: u8| if features & feature != 0 { role } else { 0 };
        let roles = has(F_STATS_VQ, HAS_STATISTICS) | has(F_PAGE_REPORTING, HAS_REPORTING);
        self.0.roles.store(roles, Ordering::Relaxed);
    }
    fn stop(&self) {
        *lock(&self.0.asking) = None;
        self.0.actual.store(0, Ordering::SeqCst);
        self.0.roles.store(0, Ordering::Relaxed);
    }
    fn serve(&self, index: u16, queue: &mut Queue) -> Result<(), QueueError> {
        match self.0.role(index) {
            Some(Role::Inflate) => queue.each(|chain| {
                self.inflate(chain);
                0
            }),
            // The pages come back by being touched.
            Some(Role::Deflate) => queue.each(|_| 0),
            Some(Role::Statistics) => self.statistics(queue),
            // The buffers are the free pages themselves.
            Some(Role::Reporting) => queue.each(|chain| {
                self.count(chain.discard_writable());
                0
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, Driver};

    fn balloon(wanted: u64) -> (Driver, Control) {
        let (balloon, control) = Balloon::new();
        (Driver::new(Box::new(balloon), wanted), control)
    }

    fn page(index: u64) -> u32 {
        u32::try_from((BUFFERS >> 12) + index).unwrap()
    }

    #[test]
    fn pages_given_up_are_gone_and_come_back_empty() {
        let (mut driver, control) = balloon(0);
        driver.put(0x2000, &[7; 0x3000]);
        let numbers = [page(2), page(4), u32::MAX, 1 << 20];
        driver.put(0, &numbers.map(u32::to_le_bytes).concat());
        driver.send(0, &[(0, 16, false)]);
        assert!(driver.used(0).is_some());
        assert_eq!(control.reclaimed(), 2, "the others are none of its");
        let first = |driver: &Driver| [2, 3, 4].map(|page| driver.peek(page << 12, 1)[0]);
        assert_eq!(first(&driver), [0, 7, 0]);
        driver.send(1, &[(0, 16, false)]);
        assert!(driver.used(1).is_some());
    }

    #[test]
    fn the_target_is_told_and_the_size_comes_back() {
        let (driver, control) = balloon(0);
        let before = driver.get(0xfc);
        control.set_target(300);
        assert!(driver.get(0xfc) != before && driver.get(0x60) & 2 != 0);
        assert_eq!(driver.get(0x100), 300);
        driver.set(0x104, 200);
        assert_eq!(control.actual(), 200);
        driver.mmio.write(0x104, &[1]);
        driver.mmio.write(0x100, &[1, 1, 1, 1]);
        assert_eq!((control.actual(), driver.get(0x100)), (200, 300));
    }

    #[test]
    fn free_pages_that_are_reported_go_back_to_the_host() {
        // Without statistics the queue for it is the third, else the fourth.
        for (wanted, queue) in [(F_PAGE_REPORTING, 2), (F_PAGE_REPORTING | F_STATS_VQ, 3)] {
            let (mut driver, control) = balloon(wanted);
            driver.put(0x2000, &[7; 0x3000]);
            driver.send(queue, &[(0x2000, 0x2000, true), (0x4800, 0x900, true)]);
            assert!(driver.used(queue).is_some());
            assert_eq!(control.reclaimed(), 2, "whole pages only");
            let first = [2, 3, 4].map(|page| driver.peek(page << 12, 1)[0]);
            assert_eq!(first, [0, 0, 7]);
        }
    }

    #[test]
    fn figures_are_kept_and_asked_for_again() {
        let (mut driver, control) = balloon(F_STATS_VQ);
        let figure = |tag: u16, value: u64| {
            let mut bytes = tag.to_le_bytes().to_vec();
            bytes.extend(value.to_le_bytes());
            bytes
        };
        driver.put(0, &[figure(4, 1000), figure(5, 2000)].concat());
        driver.send(2, &[(0, 20, false)]);
        assert_eq!(control.figures(), [(4, 1000), (5, 2000)]);
        assert!(driver.used(2).is_none(), "it waits to be asked");
        control.ask();
        assert!(driver.used(2).is_some());
        driver.put(0, &figure(4, 1));
        driver.send(2, &[(0, 15, false)]);
        assert_eq!(control.figures(), [(4, 1)]);
    }
}
