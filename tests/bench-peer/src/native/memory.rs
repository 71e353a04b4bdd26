//! Pages, copies, loops, and files in the page cache.
// UNSAFETY: maps memory and files.
#![expect(unsafe_code, reason = "mappings, and a loop in assembly")]

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;

use super::{batches, refused};

const PAGE: usize = 4096;
/// Bytes of a large read.
const LARGE: usize = 1 << 20;
/// What is copied at once to measure copying.
const COPY: usize = 16 << 20;
/// Turns of the loop.
const TURNS: u64 = 10_000_000;

/// A private or shared mapping, unmapped when dropped.
struct Mapping {
    start: *mut u8,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize, file: Option<&File>) -> Result<Self, String> {
        let (protection, flags, fd) = match file {
            Some(file) => (libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd()),
            None => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                (libc::PROT_READ | libc::PROT_WRITE, flags, -1)
            }
        };
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(refused("mmap"));
        }
        Ok(Self { start: start.cast(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, to which nobody has a reference.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

/// A page of new memory, written to.
pub(super) fn touch() -> Result<Vec<f64>, String> {
    let mut samples = Vec::new();
    for _ in 0..super::BATCHES {
        let count = 1024;
        let memory = Mapping::new(count * PAGE, None)?;
        // SAFETY: the mapping just made; small pages, as a guest's are.
        unsafe { libc::madvise(memory.start.cast(), memory.bytes, libc::MADV_NOHUGEPAGE) };
        let start = std::time::Instant::now();
        for page in 0..count {
            // SAFETY: inside the mapping.
            unsafe { memory.start.add(page * PAGE).write_volatile(1) };
        }
        samples.push(start.elapsed().as_secs_f64() * 1e9 / 1024.0);
    }
    Ok(samples)
}

/// One touched page of a mapping away, and back without a touch.
pub(super) fn unmap() -> Result<Vec<f64>, String> {
    let memory = Mapping::new(PAGE, None)?;
    Ok(batches(500, || {
        // SAFETY: the page is ours, and mapped.
        unsafe { memory.start.write_volatile(1) };
        // SAFETY: the same page, replaced by another.
        unsafe {
            libc::mmap(
                memory.start.cast(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
    }))
}

/// A loop of two instructions, nanoseconds a million turns: the same as the guest's `bench cpu`.
pub(super) fn spin() -> Vec<f64> {
    let samples = batches(1, || {
        // SAFETY: counts a register down.
        unsafe {
            std::arch::asm!("2: dec {0}", "jnz 2b", inout(reg) TURNS => _, options(nomem, nostack));
        }
    });
    samples.into_iter().map(|time| time / 10.0).collect()
}

/// Copying, nanoseconds a MiB.
pub(super) fn copy() -> Vec<f64> {
    let from = vec![1_u8; COPY];
    let mut to = vec![0_u8; COPY];
    let samples = batches(4, || {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
    });
    samples.into_iter().map(|time| time / 16.0).collect()
}

fn open(file: &str) -> Result<(File, usize), String> {
    let opened = File::open(file).map_err(|error| format!("{file}: {error}"))?;
    let bytes = opened.metadata().map_err(|error| format!("{file}: {error}"))?.len();
    let bytes = usize::try_from(bytes).unwrap_or(0);
    if bytes < LARGE {
        return Err(format!("{file}: needs at least {LARGE} bytes"));
    }
    Ok((opened, bytes))
}

/// SplitMix64, as in the guest's bench.
fn mix(count: u64) -> u64 {
    let mut z = count.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Offsets of pieces of a file: all over it, or one behind the other.
fn offsets(bytes: usize, piece: usize, random: bool) -> impl FnMut() -> usize {
    let slots = (bytes / piece) as u64;
    let mut next = 0;
    move || {
        let slot = if random { mix(next) } else { next } % slots;
        next += 1;
        usize::try_from(slot).unwrap_or(0) * piece
    }
}

fn reads(file: &str, piece: usize, random: bool, count: u32) -> Result<Vec<f64>, String> {
    let (file, bytes) = open(file)?;
    let mut offset = offsets(bytes, piece, random);
    let mut buf = vec![0; piece];
    Ok(batches(count, || {
        let read = file.read_exact_at(&mut buf, offset() as u64);
        std::hint::black_box(read.is_ok());
    }))
}

fn copies(file: &str, piece: usize, random: bool, count: u32) -> Result<Vec<f64>, String> {
    let (file, bytes) = open(file)?;
    let mapping = Mapping::new(bytes, Some(&file))?;
    // SAFETY: the whole of the mapping, which is readable and outlives the slice; nobody writes the file meanwhile.
    let contents = unsafe { std::slice::from_raw_parts(mapping.start, mapping.bytes) };
    // Every page once, so that what is measured is the copy.
    std::hint::black_box(contents.iter().step_by(PAGE).fold(0, |all, byte| all ^ *byte));
    let mut offset = offsets(bytes, piece, random);
    let mut buf = vec![0; piece];
    Ok(batches(count, || {
        let at = offset();
        buf.copy_from_slice(contents.get(at..at + piece).unwrap_or_default());
        std::hint::black_box(&mut buf);
    }))
}

/// `pread(2)` of 4 KiB all over the file.
pub(super) fn read(file: &str) -> Result<Vec<f64>, String> {
    reads(file, PAGE, true, 5000)
}

/// The same as copies from a mapping.
pub(super) fn read_mapped(file: &str) -> Result<Vec<f64>, String> {
    copies(file, PAGE, true, 5000)
}

/// `pread(2)` of 1 MiB in sequence.
pub(super) fn stream(file: &str) -> Result<Vec<f64>, String> {
    reads(file, LARGE, false, 32)
}

/// The same as copies from a mapping.
pub(super) fn stream_mapped(file: &str) -> Result<Vec<f64>, String> {
    copies(file, LARGE, false, 32)
}
