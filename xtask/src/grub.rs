//! Boot CDs: GRUB for BIOS and for UEFI on one disc, loading our ELF file by multiboot 1 or 2.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{packages, paths, process};

/// The protocol GRUB hands over by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Multiboot {
    /// Multiboot 1, by its address form.
    One,
    /// Multiboot 2.
    Two,
}

/// The UEFI firmware for QEMU.
pub(crate) const OVMF: &str = "/usr/share/ovmf/OVMF.fd";

/// Makes a CD that boots `kernel` with `command_line` and, if given, a module; `name` is the file's.
///
/// # Errors
/// GRUB's tools are missing or fail.
pub(crate) fn cd(
    name: &str,
    kernel: &Path,
    protocol: Multiboot,
    command_line: &str,
    module: Option<&Path>,
) -> Result<PathBuf> {
    packages::ensure(&[packages::GRUB])?;
    let directory = paths::cache("grub")?;
    let tree = directory.join(name);
    std::fs::create_dir_all(tree.join("boot/grub"))?;
    std::fs::copy(kernel, tree.join("boot/janus"))?;
    let (load, load_module) = match protocol {
        Multiboot::One => ("multiboot", "module"),
        Multiboot::Two => ("multiboot2", "module2"),
    };
    // GRUB splits and quotes words as our own command line does, and quotes them again for the kernel.
    let mut config =
        format!("set timeout=0\nmenuentry janus {{\n  {load} /boot/janus {command_line}\n");
    if let Some(module) = module {
        std::fs::copy(module, tree.join("boot/module"))?;
        config.push_str(&format!("  {load_module} /boot/module\n"));
    }
    config.push_str("  boot\n}\n");
    std::fs::write(tree.join("boot/grub/grub.cfg"), config)?;
    let iso = directory.join(format!("{name}.iso"));
    // Only what it takes: fewer files, and a boot without fonts and themes.
    let modules = "multiboot multiboot2 normal iso9660 part_msdos part_gpt configfile boot serial";
    process::output(
        Command::new("grub-mkrescue")
            .args(["--fonts=", "--locales=", "--themes=", "--compress=no"])
            .arg(format!("--install-modules={modules}"))
            .arg("-o")
            .arg(&iso)
            .arg(&tree),
    )?;
    Ok(iso)
}
