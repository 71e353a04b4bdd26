//! The book of free page frames: one bit a frame, and a summary bit for each word with a free frame.
//!
//! Runs of any length are found by word-wise search from a cursor, below which nothing was freed
//! lately; single frames through the summary, from the low end. Pure arithmetic over borrowed words:
//! [`super::frames`] puts it over real memory.

/// Bits in a word.
const WORD: usize = 64;

/// Words that the map itself and its summary need for `frames` frames.
#[must_use]
pub const fn words_needed(frames: usize) -> usize {
    let map = frames.div_ceil(WORD);
    map + map.div_ceil(WORD)
}

/// Free frames by index, 0 being the first frame of the map. A set bit is a free frame.
#[derive(Debug)]
pub struct FrameBitmap<'a> {
    map: &'a mut [u64],
    summary: &'a mut [u64],
    frames: usize,
    free: usize,
    /// Where the search for the next run starts.
    cursor: usize,
}

impl<'a> FrameBitmap<'a> {
    /// A map of `frames` frames, none of them free, in `words` (see [`words_needed`]), which it clears.
    ///
    /// `None`: `words` is too short.
    #[must_use]
    pub fn new(words: &'a mut [u64], frames: usize) -> Option<Self> {
        let map_words = frames.div_ceil(WORD);
        let words = words.get_mut(..words_needed(frames))?;
        words.fill(0);
        let (map, summary) = words.split_at_mut(map_words);
        Some(Self { map, summary, frames, free: 0, cursor: 0 })
    }

    /// Frames free now.
    #[must_use]
    pub fn free_frames(&self) -> usize {
        self.free
    }

    /// Frames in the map.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Frees `count` frames from `start`; answers how many of them were free already (0, unless the caller is wrong).
    pub fn free_run(&mut self, start: usize, count: usize) -> usize {
        let end = start.saturating_add(count).min(self.frames);
        // Memory that was used a moment ago is still in caches and TLBs: it goes out first.
        self.cursor = self.cursor.min(start);
        let mut already = 0;
        for (index, mask) in masks(start, end) {
            if let Some(word) = self.map.get_mut(index) {
                already += ones(*word & mask);
                self.free += ones(!*word & mask);
                *word |= mask;
                self.summarise(index);
            }
        }
        already
    }

    /// Takes `count` frames from `start` out of the free ones, whether they are free or not.
    pub fn reserve_run(&mut self, start: usize, count: usize) {
        let end = start.saturating_add(count).min(self.frames);
        for (index, mask) in masks(start, end) {
            if let Some(word) = self.map.get_mut(index) {
                self.free -= ones(*word & mask);
                *word &= !mask;
                self.summarise(index);
            }
        }
    }

    /// Takes one frame, the lowest.
    pub fn take_one(&mut self) -> Option<usize> {
        let (high, summary) = self.summary.iter().enumerate().find(|(_, word)| **word != 0)?;
        let index = high * WORD + lowest(*summary);
        let frame = index * WORD + lowest(*self.map.get(index)?);
        self.reserve_run(frame, 1);
        Some(frame)
    }

    /// Takes `count` adjacent frames whose first index, counted from `origin` frames below the map's
    /// first, is a multiple of `align` (a power of two).
    pub fn take_run(&mut self, count: usize, align: usize, origin: usize) -> Option<usize> {
        if count == 0 || count > self.free {
            return None;
        }
        if count == 1 && align == 1 {
            return self.take_one();
        }
        let cursor = self.cursor;
        let start = self
            .find_run(cursor, self.frames, count, align, origin)
            // The second try overlaps the first, for a run that lies across the cursor.
            .or_else(|| {
                self.find_run(0, self.frames.min(cursor + count + align), count, align, origin)
            })?;
        self.reserve_run(start, count);
        self.cursor = start + count;
        Some(start)
    }

    fn find_run(
        &self,
        from: usize,
        to: usize,
        count: usize,
        align: usize,
        origin: usize,
    ) -> Option<usize> {
        let mut position = from;
        while position < to {
            let free = self.next_free(position)?;
            let start = (free + origin).next_multiple_of(align) - origin;
            let end = start.checked_add(count)?;
            if end > self.frames {
                return None;
            }
            let used = self.next_used(start, end);
            if start >= free && used == end {
                return Some(start);
            }
            position = used.max(start) + 1;
        }
        None
    }

    /// The first free frame from `from` on.
    fn next_free(&self, from: usize) -> Option<usize> {
        let index = from / WORD;
        let rest = self.map.get(index)? & (u64::MAX << (from % WORD));
        if rest != 0 {
            return Some(index * WORD + lowest(rest));
        }
        let mut next = index + 1;
        loop {
            let word = self.summary.get(next / WORD)? & (u64::MAX << (next % WORD));
            if word != 0 {
                let index = next / WORD * WORD + lowest(word);
                return Some(index * WORD + lowest(*self.map.get(index)?));
            }
            next = (next / WORD + 1) * WORD;
        }
    }

    /// The first used frame in `from..to`, or `to`.
    fn next_used(&self, from: usize, to: usize) -> usize {
        for (index, mask) in masks(from, to) {
            let used = self.map.get(index).map_or(mask, |word| !word & mask);
            if used != 0 {
                return index * WORD + lowest(used);
            }
        }
        to
    }

    fn summarise(&mut self, index: usize) {
        let has_free = self.map.get(index).is_some_and(|word| *word != 0);
        if let Some(summary) = self.summary.get_mut(index / WORD) {
            let bit = 1 << (index % WORD);
            if has_free {
                *summary |= bit;
            } else {
                *summary &= !bit;
            }
        }
    }
}

/// The words that frames `start..end` touch, each with its bits of them.
fn masks(start: usize, end: usize) -> impl Iterator<Item = (usize, u64)> {
    let words = if start < end { start / WORD..end.div_ceil(WORD) } else { 0..0 };
    words.map(move |index| {
        let first = start.saturating_sub(index * WORD).min(WORD);
        let last = (end - index * WORD).min(WORD);
        (index, (u64::MAX << first) & (u64::MAX >> (WORD - last)))
    })
}

fn ones(word: u64) -> usize {
    word.count_ones() as usize
}

fn lowest(word: u64) -> usize {
    word.trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn check(frames: usize, work: impl FnOnce(&mut FrameBitmap<'_>)) {
        let mut words = vec![u64::MAX; words_needed(frames)];
        work(&mut FrameBitmap::new(&mut words, frames).expect("enough words"));
    }

    #[test]
    fn a_new_map_has_nothing_to_give() {
        check(1000, |map| {
            assert_eq!(map.free_frames(), 0);
            assert_eq!(map.take_one(), None);
            assert_eq!(map.take_run(2, 1, 0), None);
        });
    }

    #[test]
    fn every_frame_is_given_once() {
        check(5000, |map| {
            map.free_run(3, 4990);
            let mut seen: Vec<usize> = std::iter::from_fn(|| map.take_one()).collect();
            assert_eq!(seen.len(), 4990);
            seen.dedup();
            assert_eq!((seen.len(), seen[0], seen[4989]), (4990, 3, 4992));
        });
    }

    #[test]
    fn runs_lie_across_words_and_keep_their_alignment() {
        check(4096, |map| {
            map.free_run(0, 4096);
            map.reserve_run(0, 1);
            assert_eq!(map.take_run(100, 1, 0), Some(1));
            assert_eq!(map.take_run(4, 4, 0), Some(104));
            // Aligned with respect to an origin: 108 + 3 is no multiple of 8, 109 + 3 is.
            assert_eq!(map.take_run(8, 8, 3), Some(109));
            assert_eq!(map.take_run(4096, 1, 0), None);
        });
    }

    #[test]
    fn a_run_across_the_cursor_is_found_on_the_second_try() {
        check(256, |map| {
            map.free_run(0, 256);
            assert_eq!(map.take_run(200, 1, 0), Some(0));
            assert_eq!(map.free_run(0, 200), 0);
            assert_eq!(map.take_run(250, 1, 0), Some(0));
        });
    }

    #[test]
    fn freeing_twice_is_noticed() {
        check(128, |map| {
            map.free_run(0, 128);
            assert_eq!(map.take_run(64, 1, 0), Some(0));
            assert_eq!(map.free_run(10, 4), 0);
            assert_eq!(map.free_run(8, 8), 4);
            assert_eq!(map.free_frames(), 64 + 8);
        });
    }

    #[test]
    fn random_work_agrees_with_a_plain_model() {
        const FRAMES: usize = 700;
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        check(FRAMES, |map| {
            let mut free = vec![true; FRAMES];
            let mut held: Vec<(usize, usize)> = Vec::new();
            map.free_run(0, FRAMES);
            for _ in 0..20_000 {
                if random(2) == 0 {
                    let (count, align) = (1 + random(20), 1 << random(4));
                    let run = map.take_run(count, align, 0);
                    let possible = (0..FRAMES).step_by(align).any(|start| {
                        free.get(start..start + count).is_some_and(|run| run.iter().all(|f| *f))
                    });
                    assert_eq!(run.is_some(), possible);
                    if let Some(start) = run {
                        assert!(
                            free[start..start + count].iter().all(|f| *f) && start % align == 0
                        );
                        free[start..start + count].fill(false);
                        held.push((start, count));
                    }
                } else if !held.is_empty() {
                    let (start, count) = held.swap_remove(random(held.len()));
                    assert_eq!(map.free_run(start, count), 0);
                    free[start..start + count].fill(true);
                }
                assert_eq!(map.free_frames(), free.iter().filter(|f| **f).count());
            }
        });
    }
}
