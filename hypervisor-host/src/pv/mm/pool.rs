//! Frames that nobody has, as ranges, so that contiguous ones can be given out.

use std::collections::BTreeMap;

use janus_proto::addr::Mfn;

/// First frame of each free range, and its length.
#[derive(Debug, Default)]
pub(crate) struct Pool(BTreeMap<u64, u64>);

impl Pool {
    pub(crate) fn new(first: u64, count: u64) -> Self {
        let mut ranges = BTreeMap::new();
        if count > 0 {
            ranges.insert(first, count);
        }
        Self(ranges)
    }

    /// Takes `1 << order` frames, contiguous and aligned to their number.
    pub(crate) fn take(&mut self, order: u32) -> Option<Mfn> {
        let count = 1u64.checked_shl(order)?;
        let (start, length, first) = self.0.iter().find_map(|(&start, &length)| {
            let first = start.checked_next_multiple_of(count)?;
            (first.checked_add(count)? <= start + length).then_some((start, length, first))
        })?;
        self.0.remove(&start);
        if first > start {
            self.0.insert(start, first - start);
        }
        let rest = start + length - first - count;
        if rest > 0 {
            self.0.insert(first + count, rest);
        }
        Some(Mfn(first))
    }

    /// Gives one frame back.
    pub(crate) fn give(&mut self, frame: Mfn) {
        let mut start = frame.0;
        let mut length = 1;
        if let Some(next) = self.0.remove(&(start + 1)) {
            length += next;
        }
        let before = self.0.range(..start).next_back().map(|(&first, &count)| (first, count));
        if let Some((first, count)) = before
            && first + count == start
        {
            (start, length) = (first, length + count);
        }
        self.0.insert(start, length);
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.0.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_aligned_and_ranges_grow_together_again() {
        let mut pool = Pool::new(0x101, 14);
        assert_eq!(pool.take(2), Some(Mfn(0x104)));
        assert_eq!(pool.take(3), None);
        assert_eq!(pool.take(0), Some(Mfn(0x101)));
        for frame in [0x106, 0x104, 0x101, 0x105, 0x107] {
            pool.give(Mfn(frame));
        }
        assert_eq!(pool.0.len(), 1);
        assert_eq!(pool.count(), 14);
        assert_eq!(pool.take(64), None);
    }
}
