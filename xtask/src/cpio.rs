//! Archives in cpio's "new ASCII" form: what Linux unpacks as its initramfs.
//!
//! Format: the Linux kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// An archive under construction. Directories are made as they are needed.
#[derive(Debug, Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    known: BTreeSet<String>,
}

impl Cpio {
    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.known.contains(path) {
            return;
        }
        self.parent(path);
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file, executable. The first of a name stays.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) {
        self.add(path, PROGRAM, contents);
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.add(path, SYMLINK, target.as_bytes());
    }

    /// Adds a file of this machine under the same name.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<()> {
        let name = path.to_str().context("a file name that is not text")?;
        if !self.contains(name) {
            let contents = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
            self.file(name, &contents);
        }
        Ok(())
    }

    /// Whether something of this name is there.
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.known.contains(path.trim_matches('/'))
    }

    /// The finished archive, padded so that another one may follow it.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.known.clear();
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn add(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let path = path.trim_matches('/');
        if !self.known.contains(path) {
            self.parent(path);
            self.entry(path, mode, contents);
        }
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.known.insert(path.to_owned());
        let mut header = String::from("070701");
        let fields = [
            self.known.len(), // inode number
            mode as usize,
            0, // user
            0, // group
            1, // links
            0, // time of change
            contents.len(),
            0, // device numbers: the file's two, and the special file's two
            0,
            0,
            0,
            path.len() + 1,
            0, // checksum, unused in this form
        ];
        for field in fields {
            // Writing to a String cannot fail.
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend(header.bytes());
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn cpio_itself_reads_the_archive() {
        let mut archive = Cpio::default();
        archive.file("/usr/bin/tool", b"#!/bin/sh\n");
        archive.file("/usr/bin/tool", b"second of its name");
        archive.symlink("sbin/tool", "/usr/bin/tool");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<String> = bytes
            .split(|byte| *byte == 0)
            .filter_map(|part| std::str::from_utf8(part).ok())
            .filter_map(|part| part.rfind("070701").and_then(|at| part.get(at + 110..)))
            .map(str::to_owned)
            .collect();
        assert_eq!(names, ["usr", "usr/bin", "usr/bin/tool", "sbin", "sbin/tool", "TRAILER!!!"]);
        // With the real tool too, where it is installed.
        if crate::paths::program(&["cpio"]).is_some() {
            let file = crate::paths::cache("test-cpio").unwrap().join("a.cpio");
            std::fs::write(&file, &bytes).unwrap();
            let mut list = Command::new("sh");
            list.args(["-c", "cpio -t --quiet < \"$1\"", "sh"]).arg(&file);
            assert_eq!(
                crate::process::output(&mut list).unwrap(),
                "usr\nusr/bin\nusr/bin/tool\nsbin\nsbin/tool\n"
            );
        }
    }
}
