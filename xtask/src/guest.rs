//! Building guest images: the default one and the test images.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{paths, symbols, toolchain};

/// The package of the default image, which is also its binary's name.
pub(crate) const DEFAULT_IMAGE: &str = "janus-kernel";

/// Builds one package's guest binary and answers its ELF file.
///
/// # Errors
/// No toolchain, or the build fails.
pub(crate) fn build(package: &str) -> Result<PathBuf> {
    let toolchain = toolchain::find()?;
    let start = Instant::now();
    eprintln!("janus: building {package} ({})", toolchain.description);
    let target = paths::guest_target();
    let status = toolchain
        .cargo_build()
        .args(["-p", package, "--profile", "guest", "--target-dir"])
        .arg(&target)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("building {package} for the guest failed");
    }
    let elf = target.join(toolchain::TARGET).join("guest").join(package);
    symbols::fill(&elf).with_context(|| format!("no symbol table for {}", elf.display()))?;
    let size = std::fs::metadata(&elf).with_context(|| format!("no {}", elf.display()))?.len();
    eprintln!(
        "janus: {} ({} KiB, {:.1} s)",
        elf.display(),
        size / 1024,
        start.elapsed().as_secs_f32()
    );
    Ok(elf)
}
