//! Building `janus`, the bundled VMM.
//!
//! Linked with musl where that target is to be had: such a program starts in a fifth of the time, because glibc asks
//! the CPU dozens of questions before `main`, each of which is an exit to the hypervisor on a virtual machine. It is
//! also one static file that runs on any Linux. Elsewhere the host's own target does.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{paths, toolchain};

/// The target with musl.
const MUSL: &str = "x86_64-unknown-linux-musl";
/// The package, which is also its binary's name.
pub(crate) const PACKAGE: &str = "janus";
/// The profile of the workspace's `Cargo.toml`.
const PROFILE: &str = "vmm";

/// Builds the VMM and answers its file; or answers the one that `JANUS_VMM` names.
///
/// # Errors
/// The build fails.
pub(crate) fn build() -> Result<PathBuf> {
    if let Some(file) = std::env::var_os("JANUS_VMM") {
        return Ok(file.into());
    }
    let start = Instant::now();
    let musl = toolchain::host_has_target(MUSL) || toolchain::host_target_add(MUSL);
    let mut cargo = toolchain::host_cargo()?;
    let target = paths::root().join("target/vmm");
    cargo.args(["build", "--locked", "-p", PACKAGE, "--bin", PACKAGE, "--profile", PROFILE]);
    cargo.arg("--target-dir").arg(&target).stdin(Stdio::null());
    let directory = if musl {
        cargo.args(["--target", MUSL]);
        target.join(MUSL)
    } else {
        target
    };
    eprintln!("janus: building the VMM ({})", if musl { MUSL } else { "the host's target" });
    if !cargo.status().context("cannot start cargo")?.success() {
        bail!("building the VMM failed");
    }
    let file = directory.join(PROFILE).join(PACKAGE);
    let size = std::fs::metadata(&file).with_context(|| format!("no {}", file.display()))?.len();
    let seconds = start.elapsed().as_secs_f32();
    eprintln!("janus: {} ({} KiB) in {seconds:.1} s", file.display(), size / 1024);
    Ok(file)
}
