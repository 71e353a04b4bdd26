//! Partition tables: MBR (four primary entries) and GPT (UEFI 2.10, 5.3).

use alloc::vec::Vec;

/// One partition, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1 on.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Bytes of the disk's start that [`parse`] wants: both tables of the common layouts lie within.
pub const HEAD_LEN: usize = 34 * 512;

const SECTOR: u64 = 512;
const MBR_SIGNATURE: usize = 510;
const MBR_ENTRIES: usize = 446;
const GPT_PROTECTIVE: u8 = 0xee;

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The partitions named at the start of a disk of `disk_len` bytes; empty if there is no sound table.
///
/// Entries that reach past the end of the disk are left out: the table is as trusted as any other input.
#[must_use]
pub fn parse(head: &[u8], disk_len: u64) -> Vec<Partition> {
    let mut found = mbr_or_gpt(head).unwrap_or_default();
    found.retain(|p| p.len > 0 && p.start.checked_add(p.len).is_some_and(|end| end <= disk_len));
    found
}

fn mbr_or_gpt(head: &[u8]) -> Option<Vec<Partition>> {
    if head.get(MBR_SIGNATURE..MBR_SIGNATURE + 2)? != [0x55, 0xaa] {
        return None;
    }
    let mut found = Vec::new();
    for number in 0..4u32 {
        let at = MBR_ENTRIES + 16 * number as usize;
        let status = *head.get(at)?;
        let kind = *head.get(at + 4)?;
        if kind == GPT_PROTECTIVE {
            return gpt(head);
        }
        // A boot sector of a file system ends in the same two bytes: only 0x00 and 0x80 are statuses of a partition.
        if status & 0x7f != 0 {
            return None;
        }
        if kind != 0 {
            found.push(Partition {
                number: number + 1,
                start: u64::from(le_u32(head, at + 8)?) * SECTOR,
                len: u64::from(le_u32(head, at + 12)?) * SECTOR,
            });
        }
    }
    Some(found)
}

fn gpt(head: &[u8]) -> Option<Vec<Partition>> {
    let header = head.get(512..1024)?;
    if header.get(..8)? != b"EFI PART" {
        return None;
    }
    let table = usize::try_from(le_u64(header, 72)?.checked_mul(SECTOR)?).ok()?;
    let entries = le_u32(header, 80)?.min(128);
    let size = le_u32(header, 84)? as usize;
    if !(128..=4096).contains(&size) {
        return None;
    }
    let mut found = Vec::new();
    for number in 0..entries {
        let Some(entry) = table
            .checked_add(number as usize * size)
            .and_then(|at| head.get(at..at.checked_add(size)?))
        else {
            break;
        };
        if entry.get(..16)?.iter().all(|&byte| byte == 0) {
            continue;
        }
        let (first, last) = (le_u64(entry, 32)?, le_u64(entry, 40)?);
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let (Some(start), Some(len)) =
            (first.checked_mul(SECTOR), sectors.and_then(|n| n.checked_mul(SECTOR)))
        else {
            continue;
        };
        found.push(Partition { number: number + 1, start, len });
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mbr(kind: u8, start: u32, sectors: u32) -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        head[450] = kind;
        head[454..458].copy_from_slice(&start.to_le_bytes());
        head[458..462].copy_from_slice(&sectors.to_le_bytes());
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head
    }

    fn with_gpt(first: u64, last: u64) -> Vec<u8> {
        let mut head = mbr(GPT_PROTECTIVE, 1, u32::MAX);
        head[512..520].copy_from_slice(b"EFI PART");
        head[512 + 72..512 + 80].copy_from_slice(&2u64.to_le_bytes());
        head[512 + 80..512 + 84].copy_from_slice(&128u32.to_le_bytes());
        head[512 + 84..512 + 88].copy_from_slice(&128u32.to_le_bytes());
        head[1024..1040].copy_from_slice(&[7; 16]);
        head[1024 + 32..1024 + 40].copy_from_slice(&first.to_le_bytes());
        head[1024 + 40..1024 + 48].copy_from_slice(&last.to_le_bytes());
        head
    }

    const DISK: u64 = 1 << 24;

    #[test]
    fn an_mbr_and_a_gpt_entry_are_found() {
        let expected = [Partition { number: 1, start: 1 << 20, len: 512 * 100 }];
        assert_eq!(parse(&mbr(0x83, 2048, 100), DISK), expected);
        assert_eq!(parse(&with_gpt(2048, 2147), DISK), expected);
    }

    #[test]
    fn entries_that_lie_are_left_out() {
        assert_eq!(parse(&mbr(0x83, u32::MAX, u32::MAX), DISK), []);
        assert_eq!(parse(&with_gpt(u64::MAX, u64::MAX), DISK), []);
        assert_eq!(parse(&with_gpt(100, 50), DISK), []);
        assert_eq!(parse(&with_gpt(0, u64::MAX), DISK), []);
        let mut far = with_gpt(2048, 2147);
        far[512 + 72..512 + 80].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(parse(&far, DISK), []);
    }

    #[test]
    fn every_truncation_is_an_empty_answer_or_a_sound_one() {
        let head = with_gpt(2048, 2147);
        for len in 0..head.len() {
            assert!(parse(&head[..len], DISK).len() <= 1);
        }
    }

    #[test]
    fn a_boot_sector_of_a_file_system_is_no_partition_table() {
        let mut head = mbr(0x83, 2048, 100);
        head[446] = b'x';
        assert_eq!(parse(&head, DISK), []);
    }
}
