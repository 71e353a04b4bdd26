//! A loader of Linux's 64-bit boot protocol: `tests/boot/linux64.s`, assembled.
//!
//! No VMM at hand enters an ELF by `boot_params` alone (QEMU and Firecracker prefer PVH), so the row
//! `linux64` brings its own.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, process};

/// The address it is linked at: QEMU puts its modules right behind it, and the image goes to 2 MiB.
const ADDRESS: &str = "0x1000000";

/// Assembles the loader, with the tools that any linker of ours comes with; answers its ELF32 file.
///
/// # Errors
/// binutils is missing, or refuses.
pub(crate) fn build() -> Result<PathBuf> {
    let directory = paths::cache("linux64")?;
    let (object, loader) = (directory.join("linux64.o"), directory.join("linux64.elf"));
    let source = paths::root().join("tests/boot/linux64.s");
    process::output(Command::new("as").args(["--32", "-o"]).arg(&object).arg(source))
        .context("assembling the Linux 64-bit loader")?;
    process::output(
        Command::new("ld")
            .args(["-m", "elf_i386", "-Ttext", ADDRESS, "-o"])
            .arg(&loader)
            .arg(object),
    )
    .context("linking the Linux 64-bit loader")?;
    Ok(loader)
}
