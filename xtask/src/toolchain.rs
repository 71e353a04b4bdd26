//! Finding a toolchain that can build for `x86_64-unknown-none`, on a networked machine or not.
//!
//! In this order: the target is installed; the sources of std are there and `-Zbuild-std` builds
//! it; `rustup target add`; Debian's packages, as root. `JANUS_TOOLCHAIN=installed|build-std|rustup`
//! forces one way, `JANUS_NO_INSTALL=1` forbids installing anything.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{packages, paths};

/// The guest's target triple.
pub(crate) const TARGET: &str = "x86_64-unknown-none";

/// The least version of Rust is 1.`MINOR`: the workspace's `rust-version`.
const MINOR: u32 = 95;

/// A cargo and a rustc that belong together.
#[derive(Clone, Debug)]
struct Pair {
    cargo: PathBuf,
    rustc: PathBuf,
}

/// How the guest is built.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    pair: Pair,
    build_std: bool,
    linker: Option<PathBuf>,
    /// For the progress line.
    pub(crate) description: String,
}

/// Variables that the outer `cargo run` sets, or a user may have set for the host, and that must not reach the guest's build.
fn is_foreign(name: &str) -> bool {
    let kept = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR", "RUSTUP_HOME"];
    !kept.contains(&name)
        && (name == "CARGO"
            || name.starts_with("CARGO_")
            || name.starts_with("RUSTUP_")
            || name == "LD_LIBRARY_PATH"
            || matches!(
                name,
                "RUSTC" | "RUSTDOC" | "RUSTFLAGS" | "RUSTC_BOOTSTRAP" | "RUSTC_WRAPPER"
            ))
}

/// A command without the outer cargo's variables; for cargo, rustc and rustup alike.
pub(crate) fn clean_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_foreign) {
            command.env_remove(name);
        }
    }
    command
}

impl Pair {
    /// The toolchain that runs this very tool.
    fn active() -> Result<Self> {
        let cargo = std::env::var_os("CARGO")
            .map(PathBuf::from)
            .or_else(|| paths::program(&["cargo"]))
            .context("no cargo in PATH")?;
        // The neighbour, not PATH's: PATH may hold rustup's proxy, and another toolchain behind it.
        let neighbour = cargo.with_file_name("rustc");
        let rustc = if neighbour.is_file() {
            neighbour
        } else {
            paths::program(&["rustc"]).context("no rustc beside cargo, nor in PATH")?
        };
        Ok(Self { cargo, rustc })
    }

    fn debian() -> Option<Self> {
        let pair = Self { cargo: "/usr/bin/cargo".into(), rustc: "/usr/bin/rustc".into() };
        (pair.cargo.is_file() && pair.rustc.is_file() && pair.is_recent()).then_some(pair)
    }

    fn print(&self, arguments: &[&str]) -> Option<String> {
        let output =
            clean_command(&self.rustc).args(arguments).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn version(&self) -> String {
        self.print(&["--version"]).unwrap_or_else(|| "rustc of unknown version".to_owned())
    }

    /// Debian 12's own rustc is 1.63; only the `-web` packages are new enough.
    fn is_recent(&self) -> bool {
        let version = self.version();
        let mut numbers = version.trim_start_matches("rustc ").split('.').map(str::parse::<u32>);
        matches!((numbers.next(), numbers.next()), (Some(Ok(1)), Some(Ok(minor))) if minor >= MINOR)
    }

    fn has_target(&self, target: &str) -> bool {
        let Some(dir) = self.print(&["--print", "target-libdir", "--target", target]) else {
            return false;
        };
        std::fs::read_dir(dir).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
            })
        })
    }

    fn sysroot(&self) -> Option<PathBuf> {
        self.print(&["--print", "sysroot"]).map(PathBuf::from)
    }

    fn has_sources(&self) -> bool {
        self.sysroot()
            .is_some_and(|root| root.join("lib/rustlib/src/rust/library/Cargo.lock").is_file())
    }

    fn toolchain(self, build_std: bool) -> Result<Toolchain> {
        let how = if build_std { "core and alloc from source" } else { "target installed" };
        let description = format!("{}, {how}", self.version());
        let linker = self.linker()?;
        Ok(Toolchain { pair: self, build_std, linker, description })
    }

    /// `None`: the toolchain brings rust-lld, which the target's specification names.
    fn linker(&self) -> Result<Option<PathBuf>> {
        let own = self.sysroot().is_some_and(|root| {
            root.join("lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld").is_file()
        });
        if own {
            return Ok(None);
        }
        // rustc infers the flavour from the file's name; GNU ld reads the same linker script.
        match paths::program(&["ld.lld", "ld"]) {
            Some(linker) => Ok(Some(linker)),
            None if packages::may_install() => {
                packages::install(&["binutils"])?;
                Ok(paths::program(&["ld"]))
            }
            None => bail!("no linker for the guest: install binutils (ld), or lld"),
        }
    }
}

impl Toolchain {
    /// `cargo build`, or another subcommand that takes the same arguments, for the guest, ready for `-p` and the like.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = clean_command(&self.pair.cargo);
        command.arg(subcommand).env("RUSTC", &self.pair.rustc);
        let rustdoc = self.pair.rustc.with_file_name("rustdoc");
        if rustdoc.is_file() {
            command.env("RUSTDOC", rustdoc);
        }
        if let Some(linker) = &self.linker {
            command.env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", linker);
        }
        if self.build_std {
            // Wins over the workspace's `[env]`, which admits unstable features to one crate only.
            command.env("RUSTC_BOOTSTRAP", "1").args([
                "-Zbuild-std=core,alloc,compiler_builtins",
                "-Zbuild-std-features=compiler-builtins-mem",
            ]);
        }
        command.args(["--target", TARGET, "--locked"]).current_dir(paths::root());
        command
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Installed,
    BuildStd,
    Rustup,
}

/// Finds, or makes, a toolchain that can build the guest.
///
/// # Errors
/// There is none; the message says what to install.
pub(crate) fn find() -> Result<Toolchain> {
    let forced = match std::env::var("JANUS_TOOLCHAIN").as_deref() {
        Err(_) | Ok("") => None,
        Ok("installed") => Some(Way::Installed),
        Ok("build-std") => Some(Way::BuildStd),
        Ok("rustup") => Some(Way::Rustup),
        Ok(other) => bail!("JANUS_TOOLCHAIN={other}: expected installed, build-std or rustup"),
    };
    let wanted = |way| forced.is_none_or(|forced| forced == way);
    let active = Pair::active()?;

    if wanted(Way::Installed) && active.has_target(TARGET) {
        return active.toolchain(false);
    }
    if wanted(Way::BuildStd) {
        let with_sources =
            Some(active.clone()).into_iter().chain(Pair::debian()).find(Pair::has_sources);
        if let Some(pair) = with_sources {
            return pair.toolchain(true);
        }
    }
    let may_install = std::env::var_os("JANUS_NO_INSTALL").is_none();
    if wanted(Way::Rustup) && may_install && rustup_target_add(TARGET) && active.has_target(TARGET)
    {
        return active.toolchain(false);
    }
    let mut why = String::new();
    if wanted(Way::BuildStd) && packages::may_install() {
        // What a release was made with is too old; its security updates bring a new one.
        match packages::install_newest(packages::RUST_WEB) {
            Ok(()) => match Pair::debian().filter(Pair::has_sources) {
                Some(pair) => return pair.toolchain(true),
                None => why = format!("; what apt-get installs is older than 1.{MINOR}"),
            },
            Err(error) => why = format!("; {error:#}"),
        }
    }
    bail!(
        "no toolchain here can build for {TARGET}; install one with `rustup target add {TARGET}`, \
         or on Debian `apt-get update && apt-get install {}`{why}",
        packages::RUST_WEB.join(" ")
    )
}

/// Whether the toolchain that runs this tool has the libraries of `target`.
pub(crate) fn host_has_target(target: &str) -> bool {
    Pair::active().is_ok_and(|active| active.has_target(target))
}

/// Adds `target` to the toolchain that runs this tool, if that is rustup's and installing is allowed.
pub(crate) fn host_target_add(target: &str) -> bool {
    std::env::var_os("JANUS_NO_INSTALL").is_none()
        && rustup_target_add(target)
        && host_has_target(target)
}

/// `cargo` for the host, with the compiler that belongs to it.
///
/// # Errors
/// There is no cargo, or no rustc.
pub(crate) fn host_cargo() -> Result<Command> {
    let active = Pair::active()?;
    let mut command = clean_command(&active.cargo);
    command.env("RUSTC", &active.rustc).current_dir(paths::root());
    Ok(command)
}

fn rustup_target_add(target: &str) -> bool {
    let Some(rustup) = paths::program(&["rustup"]) else {
        return false;
    };
    eprintln!("janus: rustup target add {target}");
    let mut command = clean_command(&rustup);
    if let Some(toolchain) = std::env::var_os("RUSTUP_TOOLCHAIN") {
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    command.args(["target", "add", target]).status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_cargos_variables_do_not_reach_the_guest_build() {
        for name in
            ["CARGO", "CARGO_PKG_NAME", "RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "RUSTC_BOOTSTRAP"]
        {
            assert!(is_foreign(name), "{name}");
        }
        for name in ["CARGO_HOME", "RUSTUP_HOME", "PATH", "RUST_BACKTRACE"] {
            assert!(!is_foreign(name), "{name}");
        }
    }
}
