//! Every kind of file system on images that the ordinary tools made, whole, cut short and corrupted.

use alloc::sync::Arc;
use std::path::PathBuf;
use std::process::Command;
use std::string::String;
use std::vec::Vec;

use janus_front::class::{
    BlockDevice, BlockFeatures, BlockOp, BlockStatus, Completion, Geometry, PeerError, SubmitError,
};
use janus_front::heap_frames::HeapFrames;

use super::volume::Volume;
use super::*;
use crate::block::Block;
use crate::task::block_on;

/// A disk that has its contents in memory and answers at once; sectors from `bad_from` on fail.
struct MemoryDisk {
    contents: Vec<u8>,
    bad_from: u64,
    done: std::collections::VecDeque<Completion>,
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.contents.len() as u64 / 512,
            block_size: 512,
            max_request: 1 << 20,
            queue_depth: 32,
            features: BlockFeatures::empty(),
        }
    }
    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        let BlockOp::Read { sector, len, mut buf } = op else {
            return Err(SubmitError::Invalid(op));
        };
        let start = usize::try_from(sector).unwrap() * 512;
        buf[..len].copy_from_slice(&self.contents[start..start + len]);
        let bad = sector + (len as u64) / 512 > self.bad_from;
        let status = if bad { BlockStatus::IoError } else { BlockStatus::Ok };
        self.done.push_back(Completion { id, status, buf: Some(buf) });
        Ok(())
    }
    fn kick(&mut self) {}
    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        Ok(self.done.pop_front())
    }
    fn arm(&mut self) -> bool {
        !self.done.is_empty()
    }
}

fn disk_with(contents: Vec<u8>, bad_from: u64) -> Arc<Block> {
    let device = MemoryDisk { contents, bad_from, done: std::collections::VecDeque::new() };
    Block::start(String::from("disk"), Box::new(device), HeapFrames::leaked())
}

fn mount(contents: Vec<u8>) -> Result<Volume, FsError> {
    block_on(Volume::mount(disk_with(contents, u64::MAX)))
}

/// A folder with a known tree, and the place for the images made of it.
struct Work(tempfile::TempDir);

const LONG: &str = "a name that is much longer than eight and three letters.text";

/// Contents that no two places share.
fn pattern(len: u32) -> Vec<u8> {
    (0..len).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(len as usize).collect()
}

impl Work {
    fn new() -> Self {
        let work = Self(tempfile::tempdir().unwrap());
        let tree = work.tree();
        std::fs::create_dir_all(tree.join("sub/deeper")).unwrap();
        std::fs::write(tree.join("hello.txt"), "hello, world\n").unwrap();
        std::fs::write(tree.join("empty"), "").unwrap();
        std::fs::write(tree.join("sub/big"), pattern(3_000_001)).unwrap();
        std::fs::write(tree.join("sub/deeper").join(LONG), "deep").unwrap();
        work
    }
    fn tree(&self) -> PathBuf {
        self.0.path().join("tree")
    }
    fn image(&self) -> PathBuf {
        self.0.path().join("image")
    }
    fn tool(&self, package: &str, program: &str, arguments: &[&str]) {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        let output = command.args(arguments).current_dir(self.0.path()).env("PATH", path).output();
        let output =
            output.unwrap_or_else(|e| panic!("{program}: {e}: install the package {package}"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    fn ext(&self, kind: &str) -> Vec<u8> {
        std::fs::File::create(self.image()).unwrap().set_len(16 << 20).unwrap();
        self.tool(
            "e2fsprogs",
            "mke2fs",
            &["-q", "-F", "-t", kind, "-L", "data", "-d", "tree", "image"],
        );
        std::fs::read(self.image()).unwrap()
    }
    fn fat(&self, bits: &str, megabytes: u64) -> Vec<u8> {
        std::fs::File::create(self.image()).unwrap().set_len(megabytes << 20).unwrap();
        self.tool("dosfstools", "mkfs.vfat", &["-F", bits, "-n", "DATA", "image"]);
        for name in ["hello.txt", "empty", "sub"] {
            self.tool("mtools", "mcopy", &["-s", "-i", "image", &format!("tree/{name}"), "::/"]);
        }
        std::fs::read(self.image()).unwrap()
    }
    fn tar(&self, format: &str) -> Vec<u8> {
        std::os::unix::fs::symlink("../hello.txt", self.tree().join("sub/link")).ok();
        self.tool("tar", "tar", &["-c", "-f", "image", "--format", format, "-C", "tree", "."]);
        std::fs::read(self.image()).unwrap()
    }
    fn cpio(&self) -> Vec<u8> {
        std::os::unix::fs::symlink("../hello.txt", self.tree().join("sub/link")).ok();
        let pipe = "cd tree && find . | cpio -o -H newc --quiet > ../image";
        self.tool("cpio", "sh", &["-c", pipe]);
        let mut image = std::fs::read(self.image()).unwrap();
        image.resize(image.len().next_multiple_of(512), 0);
        image
    }
}

async fn read_all(volume: &Volume, path: &str, piece: usize) -> Result<Vec<u8>, FsError> {
    let file = volume.open(path).await?;
    let mut contents = Vec::new();
    loop {
        let buf = file.read_at(contents.len() as u64, vec![0; piece]).await?;
        if buf.is_empty() {
            assert_eq!(contents.len() as u64, file.size());
            return Ok(contents);
        }
        contents.extend_from_slice(&buf);
    }
}

/// The tree of [`Work`] is there, whole, and what is not there is an error of the right kind.
fn check_tree(volume: &Volume) {
    block_on(async {
        assert_eq!(read_all(volume, "/hello.txt", 5).await.unwrap(), b"hello, world\n");
        assert_eq!(read_all(volume, "empty", 5).await.unwrap(), b"");
        assert_eq!(read_all(volume, "/sub/big", 100_000).await.unwrap(), pattern(3_000_001));
        assert_eq!(read_all(volume, &format!("/sub/deeper/{LONG}"), 9).await.unwrap(), b"deep");
        let names = |entries: Vec<DirEntry>| {
            let names = entries.into_iter().map(|entry| entry.name);
            names.filter(|name| name != "lost+found" && name != "link").collect::<Vec<_>>()
        };
        assert_eq!(names(volume.list("/").await.unwrap()), ["empty", "hello.txt", "sub"]);
        assert_eq!(names(volume.list("/sub").await.unwrap()), ["big", "deeper"]);
        let metadata = volume.metadata("/sub/big").await.unwrap();
        assert_eq!(metadata, Metadata { kind: NodeKind::File, size: 3_000_001 });
        let file = volume.open("/sub/big").await.unwrap();
        for offset in [2_999_990, 5, 1_500_000] {
            let expected = &pattern(3_000_001)[offset..(offset + 100).min(3_000_001)];
            assert_eq!(
                file.read_at(offset as u64, vec![0; 100]).await.unwrap(),
                expected,
                "{offset}"
            );
        }
        assert_eq!(volume.open("/nothing").await.unwrap_err(), FsError::NotFound);
        assert_eq!(volume.open("/sub").await.unwrap_err(), FsError::NotAFile);
        let through = volume.open("/hello.txt/x").await.unwrap_err();
        assert!(matches!(through, FsError::NotADirectory | FsError::NotFound), "{through:?}");
        assert_eq!(volume.list("/hello.txt").await.unwrap_err(), FsError::NotADirectory);
        assert_eq!(volume.metadata("a\0b").await.unwrap_err(), FsError::BadPath);
    });
}

#[test]
fn ext_images_of_mke2fs_are_read_whole() {
    let work = Work::new();
    for kind in ["ext2", "ext3", "ext4"] {
        let volume = mount(work.ext(kind)).unwrap();
        assert_eq!((volume.type_name(), volume.label()), ("ext2/3/4", "data"), "{kind}");
        check_tree(&volume);
    }
}

#[test]
fn fat_images_of_mkfs_are_read_whole() {
    let work = Work::new();
    for (bits, megabytes) in [("12", 7), ("16", 24), ("32", 64)] {
        let volume = mount(work.fat(bits, megabytes)).unwrap();
        assert_eq!((volume.type_name(), volume.label()), ("vfat", "DATA"), "FAT{bits}");
        check_tree(&volume);
    }
}

#[test]
fn archives_are_read_whole_and_links_followed() {
    let work = Work::new();
    for (image, kind) in [
        (work.tar("gnu"), "tar"),
        (work.tar("pax"), "tar"),
        (work.tar("ustar"), "tar"),
        (work.cpio(), "cpio"),
    ] {
        let module: &'static [u8] = image.clone().leak();
        let volume = block_on(Volume::mount_module("module", module)).unwrap();
        for volume in [volume, mount(image).unwrap()] {
            assert_eq!(volume.type_name(), kind);
            check_tree(&volume);
            assert_eq!(block_on(read_all(&volume, "/sub/link", 99)).unwrap(), b"hello, world\n");
        }
    }
}

#[test]
fn a_partitioned_disk_is_mounted_from_its_first_file_system() {
    let ext = Work::new().ext("ext4");
    let mut disk = vec![0; 1 << 20];
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&2048u32.to_le_bytes());
    disk[458..462].copy_from_slice(&u32::try_from(ext.len() / 512).unwrap().to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend_from_slice(&ext);
    check_tree(&mount(disk).unwrap());
}

#[test]
fn disks_without_a_file_system_say_what_was_looked_for() {
    for contents in [vec![], vec![0; 512], vec![0xff; 1 << 20]] {
        let error = mount(contents).unwrap_err();
        assert!(matches!(error, FsError::Unrecognised(_)), "{error}");
        assert!(error.to_string().contains("disk"), "{error}");
    }
}

#[test]
fn a_failing_disk_is_a_disk_error_not_corruption() {
    let image = Work::new().ext("ext4");
    let sectors = image.len() as u64 / 512;
    assert_eq!(
        block_on(Volume::mount(disk_with(image.clone(), 0))).unwrap_err(),
        FsError::Disk(BlockError::Io)
    );
    // Good enough to mount and list, bad where the contents are.
    for bad_from in [sectors / 64, sectors / 8] {
        let Ok(volume) = block_on(Volume::mount(disk_with(image.clone(), bad_from))) else {
            continue;
        };
        let result = block_on(read_all(&volume, "/sub/big", 4096));
        assert_eq!(result.unwrap_err(), FsError::Disk(BlockError::Io));
    }
}

/// Walks everything that is reachable; errors are fine, panics and hangs are not.
fn walk(volume: &Volume) {
    let mut pending = vec![String::from("/")];
    let mut budget = 200;
    while let Some(path) = pending.pop() {
        for entry in block_on(volume.list(&path)).unwrap_or_default() {
            budget -= 1;
            if budget == 0 {
                return;
            }
            let path = format!("{path}/{}", entry.name);
            match entry.metadata.kind {
                NodeKind::Directory => pending.push(path),
                _ => drop(block_on(async {
                    let file = volume.open(&path).await?;
                    file.read_at(0, vec![0; 10_000]).await
                })),
            }
        }
    }
}

#[test]
fn corrupt_images_are_errors_never_panics() {
    let work = Work::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap()
    };
    for image in
        [work.ext("ext2"), work.ext("ext4"), work.fat("16", 24), work.tar("gnu"), work.cpio()]
    {
        for round in 0..40 {
            let mut bad = image.clone();
            // Mostly the first 64 KiB, where the structures are; and some truncation.
            for _ in 0..1 << (round % 8) {
                let at =
                    if random(4) == 0 { random(bad.len()) } else { random(65536.min(bad.len())) };
                bad[at] = u8::try_from(random(256)).unwrap();
            }
            if round % 5 == 0 {
                bad.truncate(random(bad.len()) / 512 * 512);
            }
            if let Ok(volume) = mount(bad) {
                walk(&volume);
            }
        }
    }
}

#[test]
fn a_truncated_archive_says_so() {
    let work = Work::new();
    for image in [work.tar("gnu"), work.cpio()] {
        let half = image[..image.len() / 2 / 512 * 512].to_vec();
        let error = mount(half).unwrap_err();
        assert!(matches!(&error, FsError::Corrupt(what) if what.contains("truncated")), "{error}");
    }
}
