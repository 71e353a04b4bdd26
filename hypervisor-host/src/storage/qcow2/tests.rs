//! Images of our own making: what they hold, and what they may name.

use imago::FormatCreateBuilder as _;

use super::*;
use crate::storage::open::{DiskFile, Format, Writes, open};

/// Makes an image of 8 MiB, behind which is `backing` in its format.
fn make(path: &Path, backing: Option<(&str, &str)>) {
    File::create(path).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let how = How { read_only: false, direct: false, backing: false };
    let builder = Qcow2::<file::File>::create_builder(storage(path, file, how).unwrap());
    let mut builder = builder.size(8 << 20);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.to_owned());
    }
    builder.create().unwrap();
}

fn disk(path: &Path) -> DiskFile {
    DiskFile { file: path.to_owned(), format: Some(Format::Qcow2), ..DiskFile::default() }
}

#[test]
fn what_is_written_is_there_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    make(&path, None);
    let mut image = open(&disk(&path)).unwrap();
    assert_eq!((image.sectors(), image.is_read_only()), (16384, false));
    let mut buf = [1; 3 * SECTOR];
    image.read(100, &mut buf).unwrap();
    assert_eq!(buf, [0; 3 * SECTOR], "nothing was written there");
    image.write(101, &[7; 2 * SECTOR]).unwrap();
    image.write(16383, &[8; SECTOR]).unwrap();
    image.discard(102, 1).unwrap();
    image.flush().unwrap();
    assert!(image.read(16382, &mut buf).is_err(), "beyond the end");
    assert!(image.write(16383, &buf).is_err(), "beyond the end");
    drop(image);
    assert!(path.metadata().unwrap().len() < 1 << 20, "it has only what was written");
    // By its name and its contents alone.
    let read_only = DiskFile { format: None, writes: Writes::Refused, ..disk(&path) };
    let mut image = open(&read_only).unwrap();
    assert!(image.is_read_only());
    image.read(100, &mut buf).unwrap();
    let firsts: Vec<u8> = buf.chunks(SECTOR).map(|sector| sector[SECTOR - 1]).collect();
    assert_eq!(firsts, [0, 7, 0]);
    assert!(image.write(0, &buf).is_err());
}

#[test]
fn a_backing_file_is_read_only_if_the_user_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (base, middle) = (directory.path().join("base.img"), directory.path().join("middle.qcow2"));
    let top = directory.path().join("top.qcow2");
    std::fs::write(&base, vec![5; 8 << 20]).unwrap();
    make(&middle, Some(("base.img", "raw")));
    make(&top, Some(("middle.qcow2", "qcow2")));
    let error = open(&disk(&top)).map(drop).unwrap_err();
    assert!(matches!(&error, OpenError::Backing(file) if *file == middle), "{error}");
    let mut image = open(&DiskFile { backing: true, ..disk(&top) }).unwrap();
    image.write(1, &[6; SECTOR]).unwrap();
    let mut buf = [0; 2 * SECTOR];
    image.read(0, &mut buf).unwrap();
    assert_eq!((buf[0], buf[SECTOR]), (5, 6));
    drop(image);
    assert_eq!(std::fs::read(&base).unwrap(), vec![5; 8 << 20], "nobody wrote it");
    // While the base is written by another, it is no base.
    let held = File::open(&base).unwrap();
    held.lock().unwrap();
    let error = open(&DiskFile { backing: true, ..disk(&top) }).map(drop).unwrap_err();
    assert!(error.to_string().contains("base.img: the disk is written by"), "{error}");
}

#[test]
fn images_that_lead_elsewhere_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    for (name, format, expected) in [
        ("none.img", "raw", "none.img: "),
        ("a.qcow2", "qcow2", "a.qcow2: the disk is written by"),
        ("/dev/null", "raw", "/dev/null: a disk is a file"),
        ("b.vmdk", "vmdk", "not in a format that is known here (vmdk)"),
    ] {
        std::fs::write(directory.path().join("b.vmdk"), [0; 512]).unwrap();
        make(&path, Some((name, format)));
        let error = open(&DiskFile { backing: true, ..disk(&path) }).map(drop).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    // Around and around, with nobody who writes.
    make(&path, Some(("a.qcow2", "qcow2")));
    let round = DiskFile { backing: true, writes: Writes::Refused, ..disk(&path) };
    let error = open(&round).map(drop).unwrap_err();
    assert!(error.to_string().contains("more than 8"), "{error}");
}

#[test]
fn a_broken_image_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    std::fs::write(&path, [&MAGIC[..], &[0xff; 2000]].concat()).unwrap();
    let error = open(&disk(&path)).map(drop).unwrap_err();
    assert!(matches!(error, OpenError::Image(_)), "{error}");
    // Cut off while it is used.
    make(&path, None);
    let mut image = open(&disk(&path)).unwrap();
    image.write(0, &[7; 4096]).unwrap();
    image.flush().unwrap();
    let mut buf = [0; 4096];
    image.read(0, &mut buf).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert!(image.read(0, &mut buf).is_err());
    assert!(image.write(0, &buf).is_err());
}
