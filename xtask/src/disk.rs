//! Disk images for guests, made with ordinary tools and without root.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{packages, paths, process};

/// Bytes of the big file of [`files`].
pub(crate) const BIG_FILE_BYTES: usize = 64 << 20;
/// Its name on the disk.
pub(crate) const BIG_FILE: &str = "big.bin";

/// The disk of `cargo xtask run`: an ext4 file system with a web page and this project's documents.
///
/// # Errors
/// `mke2fs` is missing or fails.
pub(crate) fn demo() -> Result<PathBuf> {
    let directory = paths::cache("disk")?;
    let folder = directory.join("demo");
    std::fs::create_dir_all(folder.join("docs"))?;
    std::fs::write(
        folder.join("index.html"),
        "<!doctype html>\n<title>Janus</title>\n<h1>Hello from Janus</h1>\n\
         <p>This page came from an ext4 disk, through a guest kernel in Rust.\n\
         <ul><li><a href=\"hello.txt\">hello.txt</a><li><a href=\"docs/README.md\">docs/README.md</a></ul>\n",
    )?;
    std::fs::write(folder.join("hello.txt"), "hello, world\n")?;
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        std::fs::copy(paths::root().join(name), folder.join("docs").join(name))?;
    }
    ext4(&folder, &directory.join("demo.img"), 32)
}

/// The disk of the acceptance rows: an ext4 file system with a file of 64 MiB, and that file beside it.
///
/// # Errors
/// `mke2fs` is missing or fails.
pub(crate) fn files() -> Result<(PathBuf, PathBuf)> {
    let directory = paths::cache("disk")?;
    let folder = directory.join("files");
    let big = folder.join(BIG_FILE);
    let image = directory.join("files.img");
    if !image.is_file() {
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("hello.txt"), "hello, world\n")?;
        std::fs::write(&big, noise(BIG_FILE_BYTES))?;
        ext4(&folder, &image, 96)?;
    }
    Ok((image, big))
}

/// Makes an ext4 image of `mib` MiB that holds `folder`.
///
/// # Errors
/// `mke2fs` is missing or fails.
pub(crate) fn ext4(folder: &Path, image: &Path, mib: u32) -> Result<PathBuf> {
    packages::ensure(&[packages::QEMU])?;
    let tool = paths::program(&["mke2fs"]).context("no mke2fs")?;
    // Made beside and moved: a half-made image must not be taken for a whole one.
    let fresh = paths::fresh(image);
    process::output(
        Command::new(tool)
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(folder)
            .arg(&fresh)
            .arg(format!("{mib}M")),
    )?;
    std::fs::rename(&fresh, image)?;
    Ok(image.to_owned())
}

/// An image of `bytes` bytes of noise, without a file system.
///
/// # Errors
/// It cannot be written.
pub(crate) fn raw(name: &str, bytes: usize) -> Result<PathBuf> {
    let image = paths::cache("disk")?.join(name);
    paths::replace(&image, &noise(bytes))?;
    Ok(image)
}

/// A file's SHA-256 by coreutils: an oracle that shares no code with the guest.
///
/// # Errors
/// `sha256sum` fails.
pub(crate) fn sha256(file: &Path) -> Result<String> {
    let output = process::output(Command::new("sha256sum").arg(file))?;
    Ok(output.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}

/// Incompressible bytes, the same every time (xorshift64*).
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_its_length_and_does_not_repeat() {
        let bytes = noise(4099);
        assert_eq!(bytes.len(), 4099);
        assert_ne!(bytes[..2048], bytes[2048..4096]);
    }
}
