//! Building guest images: the default one and the test images.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{image, paths, symbols, toolchain};

/// The package of the default image, which is also its binary's name.
pub(crate) const DEFAULT_IMAGE: &str = "janus-kernel";

/// Builds one package's guest binary and answers its ELF file.
///
/// # Errors
/// No toolchain, or the build fails.
pub(crate) fn build(package: &str) -> Result<PathBuf> {
    let mut images = build_all(&[package.to_owned()])?;
    images.remove(package).context("not built")
}

/// Builds several packages' guest binaries at once; answers their ELF files by package.
///
/// # Errors
/// No toolchain, or the build fails.
pub(crate) fn build_all(packages: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let toolchain = toolchain::find()?;
    let start = Instant::now();
    eprintln!("janus: building {} ({})", packages.join(", "), toolchain.description);
    let target = paths::guest_target();
    let mut cargo = toolchain.cargo("build");
    for package in packages {
        cargo.args(["-p", package]);
    }
    cargo.args(["--profile", "guest", "--target-dir"]).arg(&target);
    if !cargo.status().context("cannot start cargo")?.success() {
        bail!("building for the guest failed");
    }
    let mut images = BTreeMap::new();
    for package in packages {
        let elf = target.join(toolchain::TARGET).join("guest").join(package);
        symbols::fill(&elf).with_context(|| format!("no symbol table for {}", elf.display()))?;
        let elf =
            image::finish(&elf).with_context(|| format!("{} is not bootable", elf.display()))?;
        let size = std::fs::metadata(&elf).with_context(|| format!("no {}", elf.display()))?.len();
        eprintln!("janus: {} ({} KiB)", elf.display(), size / 1024);
        images.insert(package.clone(), elf);
    }
    eprintln!("janus: built in {:.1} s", start.elapsed().as_secs_f32());
    Ok(images)
}
