//! What the VMM itself may still do once it runs a guest: should a guest find a fault in it, that is what it wins.
//!
//! Two steps, because of what Linux offers. [`Fence::close`] comes first, while there is one thread, whose children
//! inherit it: no new privileges, no capabilities but those that are asked for, and Landlock, so that no file opens but
//! those that were named. [`filter::install`] comes when the guest's processes are there, and holds for all threads at
//! once: only the system calls that serving a guest takes. The guest's processes have their own, far narrower filter
//! (`engine/monitor/filter.rs`), whose speed counts; this one they get only when they are started late.

pub mod filter;

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What of Landlock is asked for, as far as the kernel has it (Linux 6.12 has all).
const LANDLOCK: ABI = ABI::V6;
/// What the VMM and its libraries read of the host besides what they are told: who else has a disk, entropy, name
/// servers, how many CPUs there are.
const ALWAYS_READ: [&str; 7] = [
    "/proc",
    "/dev/urandom",
    "/dev/null",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
];

/// What stays allowed of files, network and privileges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fence {
    /// Files and folders to read.
    pub read: Vec<PathBuf>,
    /// Files to read and write.
    pub write: Vec<PathBuf>,
    /// Folders in which files and sockets are made and removed.
    pub folders: Vec<PathBuf>,
    /// TCP.
    pub network: bool,
    /// TAP interfaces: their device, and the capability to use those of others.
    pub tap: bool,
}

/// How well it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// All of it is in force.
    Whole,
    /// The kernel has only an older Landlock.
    Partly,
    /// The kernel has none: files are not fenced off.
    WithoutLandlock,
}

/// The fence cannot be closed.
#[derive(Debug)]
pub enum FenceError {
    /// Privileges cannot be given up.
    Privileges(rustix::io::Errno),
    /// Landlock refuses.
    Landlock(RulesetError),
}

impl fmt::Display for FenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Privileges(error) => write!(f, "privileges cannot be given up: {error}"),
            Self::Landlock(error) => write!(f, "files cannot be fenced off: {error}"),
        }
    }
}

impl std::error::Error for FenceError {}

impl From<RulesetError> for FenceError {
    fn from(error: RulesetError) -> Self {
        Self::Landlock(error)
    }
}

impl Fence {
    /// Lets files be made in the folder of `file`.
    pub fn make(&mut self, file: &Path) {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        self.folders.push(folder.unwrap_or(Path::new(".")).to_owned());
    }

    /// Closes it around this thread and all that it will start.
    ///
    /// # Errors
    /// The host refuses. An older kernel is none: see [`Closed`].
    pub fn close(&self) -> Result<Closed, FenceError> {
        rustix::thread::set_no_new_privs(true).map_err(FenceError::Privileges)?;
        self.drop_capabilities().map_err(FenceError::Privileges)?;
        self.landlock()
    }

    /// Root's rights are not needed for anything but its files and interfaces.
    fn drop_capabilities(&self) -> rustix::io::Result<()> {
        let have = capabilities(None)?;
        if have.permitted.is_empty() && have.inheritable.is_empty() {
            return Ok(());
        }
        let tap = if self.tap { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() };
        // Files of others that root may use by being root stay open to it: of those that are named, and no others.
        let files = CapabilitySet::DAC_OVERRIDE;
        let mut sets = CapabilitySets {
            effective: tap & have.permitted,
            permitted: (tap | files) & have.permitted,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets)?;
        sets.permitted = if opens(&self.read, false) && opens(&self.write, true) {
            sets.effective
        } else {
            sets.permitted
        };
        sets.effective = sets.permitted;
        set_capabilities(None, sets)
    }

    fn landlock(&self) -> Result<Closed, FenceError> {
        let all = AccessFs::from_all(LANDLOCK);
        let read = AccessFs::from_read(LANDLOCK) & !AccessFs::Execute;
        let write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        let make = write | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)?
            .scope(Scope::from_all(LANDLOCK))?;
        if !self.network {
            rules = rules.handle_access(AccessNet::from_all(LANDLOCK))?;
        }
        let devices: &[&str] = if self.tap { &["/dev/net/tun"] } else { &[] };
        let status = rules
            .create()?
            .add_rules(path_beneath_rules(ALWAYS_READ, read))?
            .add_rules(path_beneath_rules(&self.read, read))?
            .add_rules(path_beneath_rules(&self.write, write))?
            .add_rules(path_beneath_rules(devices, write))?
            .add_rules(path_beneath_rules(&self.folders, make))?
            .restrict_self()?;
        Ok(match status.ruleset {
            RulesetStatus::FullyEnforced => Closed::Whole,
            RulesetStatus::PartiallyEnforced => Closed::Partly,
            RulesetStatus::NotEnforced => Closed::WithoutLandlock,
        })
    }
}

/// Whether all of these can be opened with the capabilities as they are; what is not there is no matter of rights.
fn opens(paths: &[PathBuf], write: bool) -> bool {
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    paths.iter().all(|path| match options.open(path) {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::PermissionDenied,
    })
}

#[cfg(test)]
mod tests;
