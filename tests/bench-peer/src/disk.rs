//! Reading a disk past the page cache, with one request or many in flight.
// UNSAFETY: Linux's asynchronous I/O has no safe interface, and O_DIRECT wants aligned memory.
#![expect(unsafe_code, reason = "io_submit(2) and aligned buffers")]

use std::alloc::Layout;
use std::fs::{File, OpenOptions};
use std::io::{Error, Result, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::{Duration, Instant};

const ALIGNMENT: usize = 4096;
/// `IOCB_CMD_PREAD` of `linux/aio_abi.h`.
const PREAD: u16 = 0;

/// `struct iocb` of `linux/aio_abi.h`, little-endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_descriptor: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// Offsets as Janus's own `bench` chooses them (`kernel/src/shell/commands/bench.rs`).
struct Pattern {
    next: u64,
    random: bool,
    slots: u64,
    size: u64,
}

impl Pattern {
    fn offset(&mut self) -> u64 {
        let count = self.next;
        self.next += 1;
        let slot = if self.random { mix(count) } else { count } % self.slots;
        slot * self.size
    }
}

/// SplitMix64.
fn mix(count: u64) -> u64 {
    let mut z = count.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Reads `/dev/DEVICE` for some seconds; answers how many requests were done, and the microseconds it took.
pub(crate) fn bench(
    device: &str,
    random: bool,
    size: usize,
    depth: usize,
    seconds: u64,
) -> Result<(u64, u128)> {
    let path = format!("/dev/{device}");
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    let mut pattern =
        Pattern { next: 0, random, slots: (bytes / size as u64).max(1), size: size as u64 };
    let mut memory = Memory::new(size * depth)?;
    let start = Instant::now();
    let deadline = start + Duration::from_secs(seconds);
    let done = if depth == 1 {
        one_by_one(&file, &mut memory, &mut pattern, deadline)?
    } else {
        many(&file, &memory, size, depth, &mut pattern, deadline)?
    };
    Ok((done, start.elapsed().as_micros()))
}

/// Aligned memory for O_DIRECT.
struct Memory {
    start: *mut u8,
    layout: Layout,
}

impl Memory {
    fn new(bytes: usize) -> Result<Self> {
        let layout =
            Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(Error::other)?;
        // SAFETY: the size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        if start.is_null() {
            Err(Error::other("out of memory"))
        } else {
            Ok(Self { start, layout })
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: this much was allocated, zeroed, and is borrowed through `self` alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

fn one_by_one(
    file: &File,
    memory: &mut Memory,
    pattern: &mut Pattern,
    deadline: Instant,
) -> Result<u64> {
    let mut done = 0;
    while Instant::now() < deadline {
        file.read_exact_at(memory.bytes(), pattern.offset())?;
        done += 1;
    }
    Ok(done)
}

fn check(result: libc::c_long) -> Result<usize> {
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

fn many(
    file: &File,
    memory: &Memory,
    size: usize,
    depth: usize,
    pattern: &mut Pattern,
    deadline: Instant,
) -> Result<u64> {
    let descriptor = u32::try_from(file.as_raw_fd()).map_err(Error::other)?;
    let mut context: libc::c_ulong = 0;
    // SAFETY: `context` is zero and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
    let mut requests = vec![Iocb::default(); depth];
    for (slot, request) in requests.iter_mut().enumerate() {
        *request = Iocb {
            data: slot as u64,
            opcode: PREAD,
            descriptor,
            buffer: memory.start as u64 + (slot * size) as u64,
            bytes: size as u64,
            ..Iocb::default()
        };
    }
    let mut events = vec![IoEvent::default(); depth];
    let mut free: Vec<usize> = (0..depth).collect();
    let (mut done, mut flying) = (0, 0_usize);
    loop {
        if Instant::now() < deadline {
            let mut batch: Vec<*mut Iocb> = Vec::with_capacity(free.len());
            for slot in free.drain(..) {
                let Some(request) = requests.get_mut(slot) else { continue };
                request.offset = i64::try_from(pattern.offset()).map_err(Error::other)?;
                batch.push(&raw mut *request);
            }
            // SAFETY: the requests and the memory they point into live until the last event below.
            let sent = check(unsafe {
                libc::syscall(libc::SYS_io_submit, context, batch.len(), batch.as_mut_ptr())
            })?;
            if sent != batch.len() {
                return Err(Error::other("io_submit took only a part"));
            }
            flying += sent;
        } else if flying == 0 {
            break;
        }
        let none = std::ptr::null_mut::<libc::timespec>();
        // SAFETY: room for `depth` events, and no time limit.
        let ended = check(unsafe {
            libc::syscall(libc::SYS_io_getevents, context, 1, depth, events.as_mut_ptr(), none)
        })?;
        for event in events.iter().take(ended) {
            if event.result != i64::try_from(size).unwrap_or(i64::MAX) {
                return Err(Error::other(format!("a read ended with {}", event.result)));
            }
            free.push(usize::try_from(event.data).map_err(Error::other)?);
            done += 1;
        }
        flying -= ended;
    }
    // SAFETY: nothing is in flight any more.
    check(unsafe { libc::syscall(libc::SYS_io_destroy, context) })?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_their_sizes() {
        assert_eq!(size_of::<Iocb>(), 64);
        assert_eq!(size_of::<IoEvent>(), 32);
    }

    #[test]
    fn both_ways_read_a_file_at_the_same_places() {
        let path = std::env::temp_dir().join(format!("janus-peer-{}", std::process::id()));
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        let mut memory = Memory::new(4096 * 8).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let mut pattern = Pattern { next: 0, random: true, slots: 32, size: 4096 };
        assert!(one_by_one(&file, &mut memory, &mut pattern, deadline).unwrap() > 0);
        let deadline = Instant::now() + Duration::from_millis(20);
        assert!(many(&file, &memory, 4096, 8, &mut pattern, deadline).unwrap() >= 8);
        assert!(memory.bytes().iter().all(|byte| *byte == 7));
        std::fs::remove_file(path).unwrap();
    }
}
