//! The other side: Debian's cloud kernel with an initramfs of busybox, its drivers and our workload program.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;
use crate::{lab, packages, paths, toolchain};

/// A Linux guest, ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

const INIT: &str = "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod /lib/$module; done
until [ -b /dev/$peer_disk ]; do sleep 0.01; done
mount -o ro /dev/$peer_disk /mnt
until [ -e /sys/class/net/eth0 ]; do sleep 0.01; done
ip addr add $peer_address dev eth0
ip link set eth0 up
/peer
poweroff -f
";

/// Builds the workload program, statically linked, with the host's toolchain.
///
/// # Errors
/// The build fails.
pub(super) fn program() -> Result<PathBuf> {
    let target = paths::root().join("target/peer");
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let status = toolchain::clean_command(&cargo)
        .current_dir(paths::root())
        .args(["build", "--quiet", "--locked", "--release", "-p", "janus-bench-peer"])
        // Named, so that the flags are not those of build scripts.
        .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("building the bench's peer failed");
    }
    Ok(target.join("x86_64-unknown-linux-gnu/release/janus-bench-peer"))
}

/// Makes a guest that loads `modules`, in this order and with what they need.
///
/// # Errors
/// A package is missing, or the build fails.
pub(crate) fn make(name: &str, modules: &[&str]) -> Result<Peer> {
    packages::ensure(&[packages::CLOUD])?;
    let kernel = packages::newest("/boot/vmlinuz-6.1.0-*-cloud-amd64")
        .context("no cloud kernel in /boot")?;
    let version = lab::kernel_version(&kernel)?;
    let mut archive = Cpio::default();
    for directory in ["proc", "sys", "dev", "mnt"] {
        archive.directory(directory);
    }
    lab::add_busybox(&mut archive)?;
    archive.file("peer", &read(&program()?)?);
    archive.file("init", INIT.as_bytes());
    let mut list = String::new();
    for module in lab::modules(&version, modules)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("module name")?;
        archive.file(&format!("lib/{name}"), &read(&module)?);
        list.push_str(name);
        list.push('\n');
    }
    archive.file("modules", list.as_bytes());
    let initramfs = paths::cache("bench")?.join(format!("{name}.cpio"));
    std::fs::write(&initramfs, archive.finish())?;
    Ok(Peer { kernel, initramfs })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
