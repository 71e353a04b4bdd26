//! Disks: the first one is 16 MiB of known noise (`xtask/src/disk.rs`); a test that writes puts back what was there.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;

use janus_front::class::BlockFeatures;
use janus_kernel::block::{Block, BlockError};
use janus_kernel::test::Test;
use janus_kernel::{devices, guest_test, task, time};

const BYTES: u64 = 16 << 20;

/// The noise on the disk: xorshift64*, eight bytes at a time from its start.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> [u8; 8] {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    }
}

fn disk(test: &mut Test) -> Option<Arc<Block>> {
    let settled = time::timeout(Duration::from_secs(10), devices::settled());
    if task::block_on(settled).is_err() {
        test.error("the devices did not settle within 10 s");
    }
    let first = devices::blocks().into_iter().next();
    if first.is_none() {
        test.error("there is no disk");
    }
    first
}

guest_test! {
    /// Every byte of the disk is the one the host put there.
    fn the_disk_holds_what_the_host_put_there(test) {
        let Some(disk) = disk(test) else { return };
        test.equal("capacity", disk.capacity(), BYTES);
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        for offset in (0..BYTES).step_by(256 * 1024) {
            let mut data = alloc::vec![0; 256 * 1024];
            let read = task::block_on(disk.read_into(offset, &mut data));
            if test.ok("read", read).is_none() {
                return;
            }
            for (index, bytes) in data.chunks_exact(8).enumerate() {
                if bytes != noise.next() {
                    test.check(false, format_args!("wrong bytes at {}", offset + index as u64 * 8));
                    return;
                }
            }
        }
    }

    /// What is written is read back, and its neighbours are left alone.
    fn writes_are_read_back(test) {
        let Some(disk) = disk(test) else { return };
        let mut before = alloc::vec![0; 4096 * 3];
        let data: Vec<u8> = (0..4096_u32).map(|i| u8::try_from(i * 7 % 256).unwrap_or(0)).collect();
        let offset = 1 << 20;
        let result = task::block_on(async {
            disk.read_into(offset, &mut before).await?;
            disk.write_from(offset + 4096, &data).await?;
            disk.flush().await?;
            let mut after = alloc::vec![0; 4096 * 3];
            disk.read_into(offset, &mut after).await?;
            // Other tests of the same disk expect what was there.
            disk.write_from(offset, &before).await?;
            Ok::<_, BlockError>(after)
        });
        let Some(after) = test.ok("write and read", result) else { return };
        test.check(after.get(4096..8192) == Some(&data[..]), "what was written is not there");
        test.check(after.get(..4096) == before.get(..4096), "the sectors before it changed");
        test.check(after.get(8192..) == before.get(8192..), "the sectors behind it changed");
    }

    /// A disk that can discard does so, and leaves the neighbours alone; one that cannot says so.
    fn discarding_ends_and_spares_the_neighbours(test) {
        const LEN: u64 = 1 << 20;
        let Some(disk) = disk(test) else { return };
        let can = disk.geometry().features.contains(BlockFeatures::DISCARD);
        let (start, mut before, mut after) = (4 << 20, alloc::vec![0; 8192], alloc::vec![0; 8192]);
        let done = task::block_on(async {
            let (left, right) = before.split_at_mut(4096);
            disk.read_into(start - 4096, left).await?;
            disk.read_into(start + LEN, right).await?;
            let mut there = alloc::vec![0; 1 << 20];
            disk.read_into(start, &mut there).await?;
            let discarded = disk.discard(start, LEN).await;
            let (left, right) = after.split_at_mut(4096);
            disk.read_into(start - 4096, left).await?;
            disk.read_into(start + LEN, right).await?;
            // Other tests of the same disk expect what was there.
            disk.write_from(start, &there).await?;
            Ok::<_, BlockError>(discarded)
        });
        let Some(discarded) = test.ok("read", done) else { return };
        test.equal("discard", discarded, if can { Ok(()) } else { Err(BlockError::Unsupported) });
        test.check(before == after, "a neighbour of what was discarded changed");
        test.note(format_args!("the disk {} discard", if can { "can" } else { "cannot" }));
    }

    /// A hundred requests at once all end, each with its own data.
    fn many_requests_are_in_flight_at_once(test) {
        let Some(disk) = disk(test) else { return };
        let reads: Vec<_> = (0..100_u64)
            .map(|index| {
                let disk = Arc::clone(&disk);
                task::spawn("reader", async move {
                    let mut data = alloc::vec![0; 4096];
                    disk.read_into(index * 77 % 4096 * 4096, &mut data).await.map(|()| data)
                })
            })
            .collect();
        let (all, most) = task::block_on(async {
            let mut all = Vec::new();
            task::yield_now().await;
            let most = disk.in_flight();
            for read in reads {
                all.push(read.await);
            }
            (all, most)
        });
        let mut noise = Vec::new();
        for (index, result) in all.into_iter().enumerate() {
            if let Some(data) = test.ok("read", result) {
                noise.push((index * 77 % 4096, data));
            }
        }
        noise.sort_unstable_by_key(|(page, _)| *page);
        let mut source = Noise(0x9e37_79b9_7f4a_7c15);
        let mut at = 0;
        for (page, data) in noise {
            while at < page * 512 {
                source.next();
                at += 1;
            }
            let same = data.chunks_exact(8).all(|bytes| bytes == source.next());
            at += 512;
            test.check(same, format_args!("page {page} has another's data"));
        }
        test.note(format_args!("{most} in flight"));
    }

    /// A read beyond the end is refused before it reaches the disk.
    fn reading_beyond_the_end_is_an_error(test) {
        let Some(disk) = disk(test) else { return };
        let mut data = alloc::vec![0; 4096];
        let read = task::block_on(disk.read_into(BYTES - 512, &mut data));
        test.equal("read beyond the end", read, Err(BlockError::OutOfRange));
        let read = task::block_on(disk.read_into(u64::MAX - 511, &mut data));
        test.equal("read at the end of numbers", read, Err(BlockError::OutOfRange));
    }
}
