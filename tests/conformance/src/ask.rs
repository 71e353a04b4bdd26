//! One question: a hypercall, and the line with its answer.
// UNSAFETY: makes hypercalls with any arguments, and writes to pages of its own by address.
#![expect(unsafe_code, reason = "the questions are hypercalls with odd arguments")]

use core::fmt::Display;
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;

use janus_kernel::mm::{frames, paging};
use janus_kernel::test::Test;
use janus_kernel::{hypercall, println, task, time};
use janus_proto::abi::xen::Hypercall;
use janus_proto::addr::{Mfn, Pfn};

/// `DOMID_SELF`.
pub(crate) const SELF: u64 = 0x7ff0;
/// An address of the lower half where nothing is mapped.
pub(crate) const UNMAPPED: u64 = 0x7000_0000_0000;
/// An address of Xen's own.
pub(crate) const XENS: u64 = 0xffff_8300_0000_0000;
/// An address that the CPU does not take.
pub(crate) const NOT_CANONICAL: u64 = 0x0008_0000_0000_0000;
/// Pointers that no call can use, by name.
pub(crate) const BAD: [(&str, u64); 3] =
    [("unmapped", UNMAPPED), ("xens", XENS), ("not-canonical", NOT_CANONICAL)];

/// Present, writable, user, accessed, dirty.
pub(crate) const WRITABLE: u64 = 0x67;
/// The same without writable.
pub(crate) const READ_ONLY: u64 = 0x65;

/// Answers after which the console is given time: it takes no more than it has room for.
const BREATH: u32 = 16;
/// How long.
const PAUSE: Duration = Duration::from_millis(2);

/// Tells an answer.
pub(crate) fn tell(key: impl Display, value: impl Display) {
    static TOLD: AtomicU32 = AtomicU32::new(0);
    if TOLD.fetch_add(1, Ordering::Relaxed) % BREATH == BREATH - 1 {
        task::block_on(time::sleep(PAUSE));
    }
    println!("janus-report: {{\"answer\":\"{key}\",\"is\":\"{value}\"}}");
}

/// Makes a hypercall without telling of it.
pub(crate) fn call(number: Hypercall, args: &[u64]) -> i64 {
    let mut all = [0; 5];
    for (to, from) in all.iter_mut().zip(args) {
        *to = *from;
    }
    // SAFETY: the pages that answers are written to are this image's own, used for nothing else; what the calls change
    // of memory or the CPU is not used by anybody else either, or put back.
    match unsafe { hypercall::call(number, all) } {
        Ok(value) => value.cast_signed(),
        Err(error) => -i64::from(error.0),
    }
}

/// Makes a hypercall, and tells its answer.
pub(crate) fn ask(key: impl Display, number: Hypercall, args: &[u64]) -> i64 {
    let answer = call(number, args);
    tell(key, answer);
    answer
}

/// The frame, as Xen counts, of a page of ours at an address, which is its own.
pub(crate) fn frame_of(address: u64) -> u64 {
    paging::pv::mfn(Pfn(address >> 12)).map_or(0, |Mfn(frame)| frame)
}

/// A page of memory of our own, mapped at its own address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page(Pfn);

impl Page {
    /// A page of zeroes; without memory the test is in error.
    pub(crate) fn new(test: &mut Test) -> Option<Self> {
        let Some(frame) = frames::allocate(1) else {
            test.error("out of memory");
            return None;
        };
        let page = Self(frame);
        page.clear();
        Some(page)
    }

    pub(crate) fn address(self) -> u64 {
        self.0.start().0
    }

    /// Its frame as Xen counts.
    pub(crate) fn mfn(self) -> u64 {
        paging::pv::mfn(self.0).map_or(0, |Mfn(frame)| frame)
    }

    pub(crate) fn pfn(self) -> u64 {
        self.0.0
    }

    fn pointer(self, index: usize) -> *mut u64 {
        let address = usize::try_from(self.address()).unwrap_or(0) + index % 512 * 8;
        core::ptr::with_exposed_provenance_mut(address)
    }

    pub(crate) fn clear(self) {
        self.put(&[0; 512]);
    }

    /// Writes words from the page's start.
    pub(crate) fn put(self, words: &[u64]) {
        for (index, word) in words.iter().enumerate() {
            // SAFETY: inside the page, which is ours.
            unsafe { self.pointer(index).write_volatile(*word) };
        }
    }

    /// Writes half words from the page's start.
    pub(crate) fn put_halves(self, halves: &[u32]) {
        for (index, pair) in halves.chunks(2).enumerate() {
            let low = pair.first().copied().unwrap_or(0);
            let high = pair.get(1).copied().unwrap_or(0);
            // SAFETY: inside the page, which is ours.
            unsafe { self.pointer(index).write_volatile(u64::from(low) | u64::from(high) << 32) };
        }
    }

    pub(crate) fn word(self, index: usize) -> u64 {
        // SAFETY: inside the page, which is ours.
        unsafe { self.pointer(index).read_volatile() }
    }

    pub(crate) fn half(self, index: usize) -> u32 {
        let word = self.word(index / 2);
        let shifted = if index.is_multiple_of(2) { word } else { word >> 32 };
        (shifted & 0xffff_ffff) as u32
    }

    pub(crate) fn byte(self, index: usize) -> u8 {
        let [byte, ..] = (self.word(index / 8) >> (index % 8 * 8)).to_le_bytes();
        byte
    }

    /// The text at its start, up to the first zero byte.
    pub(crate) fn text(self, most: usize) -> alloc::string::String {
        (0..most).map(|index| char::from(self.byte(index))).take_while(|c| *c != '\0').collect()
    }

    /// Maps it so at its own address.
    pub(crate) fn remap(self, bits: u64) -> i64 {
        // `UVMF_INVLPG | UVMF_ALL`
        call(Hypercall::UPDATE_VA_MAPPING, &[self.address(), self.mfn() << 12 | bits, 2])
    }
}
