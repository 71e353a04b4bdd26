//! The disks that the matrix's tests ask for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::data::{DiskKind, ModuleKind};
use crate::{disk, packages, paths, process};

/// A disk image, made once a run.
///
/// # Errors
/// A tool is missing or fails.
pub(crate) fn image(kind: DiskKind) -> Result<PathBuf> {
    // Both workers of the matrix ask for the same disks.
    static MADE: Mutex<BTreeMap<DiskKind, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(file) = made.get(&kind) {
        return Ok(file.clone());
    }
    let file = make(kind)?;
    made.insert(kind, file.clone());
    Ok(file)
}

/// Makes a disk image anew. It replaces an older one as a whole: another run's machine may be using that.
fn make(kind: DiskKind) -> Result<PathBuf> {
    let directory = paths::cache("disk")?;
    match kind {
        DiskKind::Files => Ok(disk::files()?.0),
        DiskKind::Demo => disk::demo(),
        DiskKind::Scratch => disk::raw("scratch.img", 16 << 20),
        DiskKind::Empty => disk::raw("empty.img", 0),
        DiskKind::Corrupt => {
            let mut bytes = std::fs::read(disk::demo()?)?;
            // The primary superblock stays, so that it still looks like ext4; all behind it in the first
            // group (descriptors, bitmaps, inodes, the root directory) becomes nonsense.
            let noise = std::fs::read(disk::raw("noise.img", 4 << 20)?)?;
            for (byte, noise) in bytes.iter_mut().skip(4096).zip(noise) {
                *byte = noise;
            }
            let file = directory.join("corrupt.img");
            paths::replace(&file, &bytes)?;
            Ok(file)
        }
        DiskKind::Truncated => {
            let bytes = std::fs::read(disk::files()?.0)?;
            let file = directory.join("truncated.img");
            paths::replace(&file, bytes.get(..bytes.len() / 2).unwrap_or_default())?;
            Ok(file)
        }
        DiskKind::Fat => fat(),
    }
}

/// A FAT file system with a greeting.
fn fat() -> Result<PathBuf> {
    let directory = paths::cache("disk")?;
    let file = directory.join("fat.img");
    let fresh = paths::fresh(&file);
    packages::ensure(&[packages::FILE_SYSTEMS])?;
    // FAT32 has 65525 clusters at least.
    std::fs::File::create(&fresh)?.set_len(40 << 20)?;
    let greeting = directory.join("HELLO.TXT");
    std::fs::write(&greeting, "hello, world\n")?;
    let mformat = paths::program(&["mformat"]).context("no mformat (install mtools)")?;
    process::output(Command::new(mformat).args(["-F", "-c", "1", "-i"]).arg(&fresh).arg("::"))?;
    process::output(Command::new("mcopy").arg("-i").arg(&fresh).arg(&greeting).arg("::HELLO.TXT"))?;
    std::fs::rename(&fresh, &file)?;
    Ok(file)
}

/// A module, made once a run.
///
/// # Errors
/// A tool is missing or fails.
pub(crate) fn module(kind: ModuleKind) -> Result<PathBuf> {
    static MADE: Mutex<BTreeMap<ModuleKind, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(file) = made.get(&kind) {
        return Ok(file.clone());
    }
    packages::ensure(&[packages::FILE_SYSTEMS])?;
    let image = disk::demo()?;
    let tree = image.with_extension("");
    let (name, script) = match kind {
        ModuleKind::Tar => ("module.tar", "tar -cf \"$1\" ."),
        ModuleKind::Cpio => ("module.cpio", "find . | cpio -o -H newc --quiet >\"$1\""),
        ModuleKind::CpioGz => ("module.cpio.gz", "find . | cpio -o -H newc --quiet | gzip >\"$1\""),
    };
    let file = image.with_file_name(name);
    let fresh = paths::fresh(&file);
    process::output(Command::new("sh").args(["-c", script, "sh"]).arg(&fresh).current_dir(&tree))?;
    std::fs::rename(&fresh, &file)?;
    made.insert(kind, file.clone());
    Ok(file)
}

/// A file's place on this machine, for comparison with what the guest serves from the disk `files`.
///
/// # Errors
/// The disk cannot be made.
pub(crate) fn original(path: &str) -> Result<PathBuf> {
    let (_, big) = disk::files()?;
    Ok(big.with_file_name(path.trim_start_matches('/')))
}

/// Replaces each `{sha256:NAME}` by the sum of that file of the disk `files`.
///
/// # Errors
/// There is no such file.
pub(crate) fn fill_in(text: &str) -> Result<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{sha256:") {
        let (name, after) = after.split_once('}').context("a `{sha256:` without its `}`")?;
        out.push_str(before);
        out.push_str(&disk::sha256(&original(name)?)?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}
