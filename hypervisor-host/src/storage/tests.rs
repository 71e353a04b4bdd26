//! All kinds of images answer alike, and fail alike.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use janus_proto::sync::{AtomicU32, Ordering};

use super::*;

fn words(bytes: usize) -> Vec<AtomicU32> {
    (0..bytes / 4).map(|_| AtomicU32::new(0)).collect()
}

/// What `disk` reads into the guest's memory from `sector` on.
fn read_pieces(disk: &mut dyn BlockBackend, sector: u64, len: usize) -> io::Result<Vec<u8>> {
    // Two pages in pieces that are not in order.
    let words = words(2 * 4096);
    let half = len / SECTOR / 2 * SECTOR;
    let (low, high) = (Piece::new(&words, 4096, half), Piece::new(&words, 512, len - half));
    let (low, high) = (low.unwrap(), high.unwrap());
    disk.read_pieces(sector, &[low, high])?;
    let mut bytes = vec![0; len];
    low.copy_out(&mut bytes[..half]);
    high.copy_out(&mut bytes[half..]);
    Ok(bytes)
}

fn check(disk: &mut dyn BlockBackend) {
    assert_eq!(disk.sectors(), 100);
    disk.write(3, &[7; 3 * SECTOR]).unwrap();
    disk.discard(4, 1).unwrap();
    disk.flush().unwrap();
    let mut buf = [1; 4 * SECTOR];
    disk.read(2, &mut buf).unwrap();
    let ends =
        |bytes: &[u8]| -> Vec<_> { bytes.chunks(SECTOR).map(|s| (s[0], s[SECTOR - 1])).collect() };
    assert_eq!(ends(&buf), [(0, 0), (7, 7), (0, 0), (7, 7)]);
    assert_eq!(read_pieces(disk, 2, 4 * SECTOR).unwrap(), buf);
    let words = words(4096);
    for (index, word) in words.iter().enumerate() {
        word.store(u32::try_from(index / 128).unwrap() * 0x0101_0101, Ordering::Relaxed);
    }
    let pieces = [(6, 1), (1, 2)]
        .map(|(at, count)| Piece::new(&words, at * SECTOR, count * SECTOR).unwrap());
    disk.write_pieces(97, &pieces).unwrap();
    assert_eq!(ends(&read_pieces(disk, 96, 4 * SECTOR).unwrap()), [(0, 0), (6, 6), (1, 1), (2, 2)]);
    disk.discard(0, 100).unwrap();
    disk.read(3, &mut buf).unwrap();
    assert!(buf.iter().all(|&byte| byte == 0));
    assert!(read_pieces(disk, 96, 4 * SECTOR).unwrap().iter().all(|&byte| byte == 0));
    assert!(disk.read(98, &mut buf).is_err(), "the end is checked again here");
    assert!(read_pieces(disk, 98, 4 * SECTOR).is_err());
}

/// A file without a name.
fn file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

#[test]
fn every_kind_of_image_is_the_same_disk() {
    check(&mut MemoryDisk::new(100));
    let odd = || file(100 * 512 + 17);
    check(&mut FileDisk::new(odd(), false).unwrap());
    check(&mut FileDisk::unmapped(odd(), false).unwrap());
    check(&mut Snapshot::new(FileDisk::new(odd(), true).unwrap()));
    check(&mut SharedDisk::new(Box::new(MemoryDisk::new(100))));
    check(&mut SharedDisk::new(Box::new(FileDisk::new(odd(), false).unwrap())).clone());
}

#[test]
fn direct_io_moves_any_part_of_a_block() {
    let open = |len: u64| {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(len).unwrap();
        let mut options = File::options();
        let direct = std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
        direct.read(true).write(true).open(named.path())
    };
    // Old kernels have none on tmpfs; the product says so then, and so does this.
    let Ok(file) = open(100 * 512) else {
        return eprintln!("no direct I/O in {}", std::env::temp_dir().display());
    };
    let disk = DirectDisk::new(file, false).unwrap();
    if disk.sectors() == 100 {
        check(&mut disk.clone());
    }
    let mut disk = DirectDisk::new(open(4096 * 4 + 512).unwrap(), false).unwrap();
    disk.write(3, &[9; SECTOR]).unwrap();
    disk.write(6, &[8; 5 * SECTOR]).unwrap();
    let read = read_pieces(&mut disk, 2, 6 * SECTOR).unwrap();
    let firsts: Vec<u8> = read.chunks(SECTOR).map(|sector| sector[0]).collect();
    assert_eq!(firsts, [0, 9, 0, 0, 8, 8]);
}

#[test]
fn a_file_that_is_cut_off_is_an_error_and_not_the_end() {
    for make in [FileDisk::new, FileDisk::unmapped] {
        let file = file(64 * 4096);
        file.write_all_at(&[5; 64 * 4096], 0).unwrap();
        let mut disk = make(file.try_clone().unwrap(), false).unwrap();
        let mut other = disk.share();
        assert_eq!(read_pieces(&mut disk, 8 * 40, 4096).unwrap(), [5; 4096]);
        file.set_len(10 * 4096).unwrap();
        assert!(read_pieces(&mut disk, 8 * 40, 4096).is_err());
        assert!(read_pieces(&mut *other, 8 * 9 + 4, 4096).is_err(), "half of it is there");
        assert_eq!(read_pieces(&mut disk, 8 * 9, 4096).unwrap(), [5; 4096]);
        // On another thread, which has a signal stack of its own.
        std::thread::spawn(move || assert!(read_pieces(&mut *other, 8 * 63, 4096).is_err()))
            .join()
            .unwrap();
        file.set_len(64 * 4096).unwrap();
        assert_eq!(read_pieces(&mut disk, 8 * 40, 4096).unwrap(), [0; 4096], "it came back");
    }
}

#[test]
fn a_write_for_which_there_is_no_room_is_an_error() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    // As on a full disk, for nobody else in this process writes that far.
    let limit = 1 << 33;
    let mut limits = getrlimit(Resource::Fsize);
    let sparse = file(limit + (1 << 20));
    let mut disk = FileDisk::new(sparse, false).unwrap();
    limits.current = Some(limit);
    setrlimit(Resource::Fsize, limits).unwrap();
    let end = limit / SECTOR as u64;
    assert!(disk.write(end, &[1; SECTOR]).is_err());
    let words = words(4096);
    let page = Piece::new(&words, 0, 4096).unwrap();
    assert!(disk.write_pieces(end - 4, &[page]).is_err(), "a half does not fit");
    disk.write_pieces(end - 8, &[page]).unwrap();
}

#[test]
fn what_a_snapshot_keeps_does_not_reach_the_disk_below() {
    let mut below = MemoryDisk::new(100);
    below.write(0, &[9; 100 * SECTOR]).unwrap();
    let mut disk = Snapshot::new(below.clone());
    disk.write(7, &[1; 2 * SECTOR]).unwrap();
    disk.write(99, &[2; SECTOR]).unwrap();
    let mut buf = [0; 100 * SECTOR];
    disk.read(0, &mut buf).unwrap();
    for (sector, bytes) in buf.chunks(SECTOR).enumerate() {
        let expected = match sector {
            7 | 8 => 1,
            99 => 2,
            _ => 9,
        };
        assert!(bytes.iter().all(|&byte| byte == expected), "sector {sector}");
    }
    assert_eq!(read_pieces(&mut disk, 5, 4096).unwrap(), buf[5 * SECTOR..][..4096]);
    let mut part = [0; 2 * SECTOR];
    disk.read(8, &mut part).unwrap();
    assert_eq!((part[0], part[SECTOR]), (1, 9));
    disk.below.read(7, &mut part).unwrap();
    assert_eq!(part[0], 9);
}
