//! A guest's memory: one sealed file in memory, whose pages are its machine frames.
//!
//! The file is mapped here once and whole, and in the guest's processes page by page. To us it is always atomics: the
//! guest may write any of it at any time. Machine frame numbers start at [`FIRST_FRAME`], so that one mistaken for a
//! pseudo-physical frame is noticed; frames beyond the guest's own (shared info, grant table) come behind them.
//!
//! The list of frames that a domain is given is large, and a guest may never look at most of it: see
//! [`Ram::list_later`].
// UNSAFETY: maps memory and makes slices of it.
#![expect(unsafe_code, reason = "the guest's memory is a mapping")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::list::List;

/// The first machine frame of every guest: 4 GiB.
pub const FIRST_FRAME: Mfn = Mfn(0x10_0000);

/// What numbers the frames of a guest have: one run of them, or two with a hole between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbering {
    /// The first frame.
    pub first: Mfn,
    /// How many follow it without a gap.
    pub below: u64,
    /// The number of the first frame behind the hole, if there are more.
    pub above: Mfn,
}

impl Numbering {
    /// All frames follow each other from [`FIRST_FRAME`] on.
    pub const MACHINE: Self = Self { first: FIRST_FRAME, below: u64::MAX, above: Mfn(u64::MAX) };
}

/// The memory of one guest.
#[derive(Debug)]
pub struct Ram {
    file: File,
    base: NonNull<u8>,
    frames: u64,
    numbering: Numbering,
    list: List,
}

// SAFETY: the memory is only handed out as atomics and lives as long as `Ram`.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Makes memory of so many frames, all zero; none is used on the host until it is touched.
    ///
    /// # Errors
    /// The host has no memory, or no `memfd_create`.
    pub fn new(frames: u64) -> io::Result<Self> {
        Self::with_numbering(frames, Numbering::MACHINE, 0)
    }

    /// As [`Self::new`], with frames numbered otherwise, and with further flags of `memfd_create(2)`, such as those
    /// for huge pages.
    ///
    /// # Errors
    /// The host has no memory, or none of that kind, or no `memfd_create`.
    pub fn with_numbering(frames: u64, numbering: Numbering, flags: u32) -> io::Result<Self> {
        let too_much =
            || io::Error::new(io::ErrorKind::InvalidInput, "that much memory has no address");
        let bytes = frames.checked_mul(PAGE_SIZE as u64).ok_or_else(too_much)?;
        let length = usize::try_from(bytes).map_err(|_| too_much())?;
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let fd = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
            libc::memfd_create(c"guest".as_ptr(), flags)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes)?;
        // SAFETY: `fd` is a file that we own; nobody can change its size from here on.
        let sealed = unsafe {
            libc::fcntl(
                file.as_raw_fd(),
                libc::F_ADD_SEALS,
                libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
            )
        };
        if sealed != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length.max(PAGE_SIZE),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { file, base, frames, numbering, list: List::default() })
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The file itself, to map it elsewhere.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.file)
    }

    /// Where a frame is in the file, in bytes; `None`: this guest has no such frame.
    #[must_use]
    pub fn offset(&self, frame: Mfn) -> Option<u64> {
        let Numbering { first, below, above } = self.numbering;
        let index = frame.0.checked_sub(first.0)?;
        let index = if index < below { index } else { frame.0.checked_sub(above.0)? + below };
        (index < self.frames).then(|| index * PAGE_SIZE as u64)
    }

    /// A frame as 512 words, each read or written in one piece; `None`: this guest has no such frame.
    #[must_use]
    pub fn frame(&self, frame: Mfn) -> Option<&[AtomicU64; 512]> {
        if self.list.is_near(frame, 1) {
            self.list.write(frame, 1, |page| self.written_frame(page));
        }
        self.written_frame(frame)
    }

    /// As [`Ram::frame`], whether or not it has been written.
    fn written_frame(&self, frame: Mfn) -> Option<&[AtomicU64; 512]> {
        let offset = usize::try_from(self.offset(frame)?).ok()?;
        // SAFETY: `offset` is inside the mapping, a multiple of the page size; the file cannot shrink; the mapping
        // lives as long as `self`; atomics may be changed by others.
        Some(unsafe { self.base.add(offset).cast().as_ref() })
    }

    /// Shows another frame's memory in the place of this one, to us and to whoever uses our mapping; with the frame
    /// itself it is as it was before.
    ///
    /// # Errors
    /// This guest has no such frames, or the host refuses.
    pub fn alias(&self, at: Mfn, frame: Mfn) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let place = self.offset(at).and_then(|at| usize::try_from(at).ok()).ok_or_else(invalid)?;
        let from = self.offset(frame).and_then(|at| libc::off_t::try_from(at).ok());
        let from = from.ok_or_else(invalid)?;
        // SAFETY: inside the mapping, as `offset` says.
        let to = unsafe { self.base.add(place) };
        // SAFETY: replaces a page of our own mapping by another page of the same file, which cannot shrink; all that
        // was handed out of it are atomics, which may change at any time.
        let mapped = unsafe {
            libc::mmap(
                to.as_ptr().cast(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.file.as_raw_fd(),
                from,
            )
        };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Makes the frames from `first` on the list of a domain's first `entries` frames, as the domain builder gives it
    /// to a guest: of numbers, as 64-bit words. They are written when they are first looked at. For the owner of a new
    /// memory, once; before that, nothing may be in these frames.
    pub fn list_later(&self, first: Mfn, entries: u64) {
        self.list.set(first, entries);
    }

    /// Whether a frame has what it is to have: otherwise it must not be shown to the guest before [`Ram::frame`] was
    /// called for it.
    #[must_use]
    pub fn is_written(&self, frame: Mfn) -> bool {
        !self.list.is_near(frame, 1) || self.list.is_written(frame)
    }

    /// Has the host find memory for frames that are about to be written: all at once is cheaper than one by one.
    pub fn populate(&self, first: Mfn, count: u64) {
        let Some(offset) = self.offset(first).and_then(|offset| usize::try_from(offset).ok())
        else {
            return;
        };
        let bytes = usize::try_from(self.frames).unwrap_or(0) * PAGE_SIZE;
        let length =
            usize::try_from(count).unwrap_or(0).saturating_mul(PAGE_SIZE).min(bytes - offset);
        // SAFETY: `offset` is inside the mapping.
        let start = unsafe { self.base.add(offset) };
        // SAFETY: a part of our mapping, whose contents stay as they are. A host that cannot do it loses nothing.
        unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_POPULATE_WRITE) };
    }

    /// Gives a frame's memory back to the host; it reads as zero from here on. `false`: the host cannot do that, and
    /// nothing has changed.
    #[must_use]
    pub fn discard(&self, frame: Mfn) -> bool {
        let Some(offset) = self.offset(frame).and_then(|offset| i64::try_from(offset).ok()) else {
            return false;
        };
        if self.list.is_near(frame, 1) {
            // What was to be written there must not come back.
            self.list.write(frame, 1, |page| self.written_frame(page));
        }
        // SAFETY: `file` is ours; what it maps here is only handed out as atomics, which may change at any time.
        let result = unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                4096,
            )
        };
        result == 0
    }

    /// `count` frames, one behind the other, as words of 32 bits; `None`: this guest does not have them all.
    #[must_use]
    pub fn words(&self, frame: Mfn, count: u64) -> Option<&[AtomicU32]> {
        let offset = self.offset(frame)?;
        let bytes = count.checked_mul(PAGE_SIZE as u64)?;
        // They do not follow each other across a hole.
        let last = frame.0.checked_add(count.max(1) - 1)?;
        if self.offset(Mfn(last))?
            != offset.checked_add(bytes.max(PAGE_SIZE as u64))? - PAGE_SIZE as u64
        {
            return None;
        }
        if self.list.is_near(frame, count) {
            self.list.write(frame, count, |page| self.written_frame(page));
        }
        let (offset, words) = (usize::try_from(offset).ok()?, usize::try_from(bytes / 4).ok()?);
        // SAFETY: as in `frame`, and the whole range was checked.
        Some(unsafe { std::slice::from_raw_parts(self.base.add(offset).cast().as_ptr(), words) })
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        let length = usize::try_from(self.frames).map_or(0, |frames| frames * PAGE_SIZE);
        // SAFETY: the mapping of `new`; all that was handed out borrowed `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), length.max(PAGE_SIZE)) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn frames_are_where_the_file_has_them() {
        let ram = Ram::new(4).unwrap();
        let second = Mfn(FIRST_FRAME.0 + 1);
        ram.frame(second).unwrap()[0].store(0x0807_0605_0403_0201, Relaxed);
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(
            &ram.file,
            &mut bytes,
            ram.offset(second).unwrap(),
        )
        .unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(ram.words(second, 3).unwrap()[0].load(Relaxed), 0x0403_0201);
    }

    #[test]
    fn the_list_is_written_when_it_is_looked_at_and_not_again() {
        let ram = Ram::new(64).unwrap();
        let (list, entries) = (Mfn(FIRST_FRAME.0 + 8), 20 * 512 + 1);
        ram.list_later(list, entries);
        let page = |index| Mfn(list.0 + index);
        assert!(ram.is_written(FIRST_FRAME) && ram.is_written(page(21)));
        assert!((0..21).all(|index| !ram.is_written(page(index))));
        let last = ram.frame(page(20)).unwrap();
        assert_eq!(last[0].load(Relaxed), FIRST_FRAME.0 + 20 * 512);
        assert_eq!(last[1].load(Relaxed), 0);
        assert!(ram.is_written(page(20)) && !ram.is_written(page(19)));
        last[0].store(7, Relaxed);
        assert_eq!(ram.frame(page(20)).unwrap()[0].load(Relaxed), 7);
        let words = ram.words(FIRST_FRAME, 10).unwrap();
        assert_eq!(u64::from(words[9 * 1024 + 2].load(Relaxed)), FIRST_FRAME.0 + 513);
        assert!(ram.discard(page(10)));
        assert_eq!(ram.frame(page(10)).unwrap()[0].load(Relaxed), 0);
    }

    #[test]
    fn what_is_not_there_is_not_given() {
        let ram = Ram::new(4).unwrap();
        for frame in [0, FIRST_FRAME.0 - 1, FIRST_FRAME.0 + 4, u64::MAX] {
            assert!(ram.frame(Mfn(frame)).is_none());
        }
        assert!(ram.words(FIRST_FRAME, 5).is_none() && ram.words(FIRST_FRAME, u64::MAX).is_none());
    }

    #[test]
    fn frames_on_both_sides_of_a_hole_are_had_and_none_inside() {
        let numbering = Numbering { first: Mfn(0), below: 3, above: Mfn(100) };
        let ram = Ram::with_numbering(5, numbering, 0).unwrap();
        let page = PAGE_SIZE as u64;
        let offsets = [0, 2, 3, 99, 100, 101, 102].map(|frame| ram.offset(Mfn(frame)));
        let [low, mid] = [Some(0), Some(2 * page)];
        let expected = [low, mid, None, None, Some(3 * page), Some(4 * page), None];
        assert_eq!(offsets, expected);
        assert!(ram.words(Mfn(0), 3).is_some() && ram.words(Mfn(100), 2).is_some());
        assert!(ram.words(Mfn(2), 2).is_none() && ram.words(Mfn(2), 99).is_none());
    }

    #[test]
    fn a_frame_shows_another_until_it_shows_itself_again() {
        let ram = Ram::new(3).unwrap();
        let frame = |index| Mfn(FIRST_FRAME.0 + index);
        for index in 0..3 {
            ram.frame(frame(index)).unwrap()[0].store(10 + index, Relaxed);
        }
        let seen = || [0, 1, 2].map(|index| ram.frame(frame(index)).unwrap()[0].load(Relaxed));
        ram.alias(frame(0), frame(2)).unwrap();
        assert_eq!(seen(), [12, 11, 12]);
        ram.frame(frame(0)).unwrap()[0].store(7, Relaxed);
        assert_eq!(seen(), [7, 11, 7]);
        ram.alias(frame(0), frame(0)).unwrap();
        assert_eq!(seen(), [10, 11, 7]);
        assert!(ram.alias(frame(3), frame(0)).is_err() && ram.alias(frame(0), Mfn(0)).is_err());
    }

    #[test]
    fn the_file_is_sealed() {
        let ram = Ram::new(1).unwrap();
        assert!(ram.file.set_len(0).is_err() && ram.file.set_len(1 << 20).is_err());
    }
}
