//! `tests/matrix.toml` as data: rows (where) and tests (what), and their product.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::grub::Multiboot;
use crate::lab::Mode;
use crate::paths;
use crate::qemu::Machine;

/// The file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Matrix {
    row: BTreeMap<String, RowData>,
    #[serde(default)]
    test: Vec<Case>,
    /// The images whose tests are listed in their ELF files.
    #[serde(default)]
    guest_tests: Vec<GuestTests>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RowData {
    machine: String,
    #[serde(default)]
    door: Option<String>,
}

/// Where a test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    /// QEMU's own loader.
    Qemu(Machine),
    /// GRUB in QEMU: the protocol, and UEFI or not.
    Grub(Multiboot, Firmware),
    /// QEMU's own loader with a copy of the image without its multiboot header, which QEMU would prefer to the
    /// PVH note.
    Pvh(Machine),
    /// The same without ACPI: QEMU names the virtio-mmio windows on the command line.
    PvhNoAcpi(Machine),
    /// Linux's 64-bit boot protocol, by a loader of our own in QEMU.
    Linux64(Machine),
    /// A guest of real Xen in the lab.
    Xen(Mode),
    /// In the place of dom0, directly under Xen: no devices.
    Dom0(Mode),
    /// The bundled VMM, as a Xen PV guest in a process.
    Monitor(Devices),
    /// The bundled VMM with real KVM, in the KVM lab.
    Kvm(KvmDoor),
}

/// The devices of a guest of the bundled VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// Xen's.
    Xen,
    /// virtio's.
    Virtio,
    /// virtio's, which see only what the guest grants them.
    VirtioGrants,
    /// Disks of virtio's, cards of Xen's.
    Mixed,
}

/// How the bundled VMM enters a guest of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvmDoor {
    /// By the PVH note.
    Pvh,
    /// By Linux's 64-bit protocol.
    Linux,
}

/// What GRUB runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

/// A disk that a test asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DiskKind {
    /// ext4 with a 64 MiB file.
    Files,
    /// ext4 with a page and some text.
    Demo,
    /// 16 MiB of known noise.
    Scratch,
    /// 0 bytes.
    Empty,
    /// ext4 whose metadata is overwritten.
    Corrupt,
    /// The first half of `files`.
    Truncated,
    /// A FAT file system.
    Fat,
}

/// A module that the loader hands to the kernel (an initial RAM disk): the tree of the disk `demo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ModuleKind {
    /// By `tar`.
    Tar,
    /// By `cpio -H newc`, as Linux's initramfs.
    Cpio,
    /// The same, compressed: not for this kernel.
    CpioGz,
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ending {
    /// It switched itself off.
    PowerOff,
    /// It asked to be started again.
    Reboot,
    /// It said that it crashed.
    Crash,
}

/// One step of a test, in order, while the guest runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) enum Step {
    /// Waits for a line with this text on the guest's console.
    Wait(String),
    /// Types this on the guest's console.
    Type(String),
    /// Fetches this path over HTTP, from dom0 or the host, and compares it with the disk's own file.
    Fetch(String),
    /// Fetches this path and expects this HTTP status.
    Status(String, u16),
    /// Runs this in dom0 and expects status 0; `{guest}` is the guest's name, `{disk}` its first disk.
    Dom0(String),
    /// Gives this to QEMU's monitor.
    Monitor(String),
    /// Waits.
    SleepMs(u64),
    /// Kills the machine: the test ends here.
    Kill,
}

/// A test: how the guest is set up, what happens to it, and how it must end.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) rows: Vec<String>,
    /// For `--group`.
    #[serde(default)]
    pub(crate) groups: Vec<String>,
    /// The package whose image is booted.
    #[serde(default = "default_image")]
    pub(crate) image: String,
    #[serde(default)]
    pub(crate) disks: Vec<DiskKind>,
    #[serde(default)]
    pub(crate) module: Option<ModuleKind>,
    /// A user network (QEMU) or a vif (Xen).
    #[serde(default)]
    pub(crate) network: bool,
    #[serde(default = "default_memory")]
    pub(crate) memory_mib: u32,
    /// Virtual CPUs.
    #[serde(default = "default_cpus")]
    pub(crate) cpus: u32,
    /// Shell commands.
    #[serde(default)]
    pub(crate) exec: Option<String>,
    /// Further words of the command line.
    #[serde(default)]
    pub(crate) append: String,
    /// Commands in dom0 while the guest is created but does not run yet; `{id}` is its domain number.
    #[serde(default)]
    pub(crate) before: Vec<String>,
    #[serde(default)]
    pub(crate) steps: Vec<Step>,
    /// Texts that the console must hold. `{sha256:NAME}` stands for the sum of a file of the disk.
    #[serde(default)]
    pub(crate) expect: Vec<String>,
    /// Texts that it must not hold.
    #[serde(default)]
    pub(crate) reject: Vec<String>,
    /// The code the guest ends with.
    #[serde(default)]
    pub(crate) status: u8,
    /// What the hypervisor is told at the end, where that matters.
    #[serde(default)]
    pub(crate) ending: Option<Ending>,
    /// Bytes the kernel's file is cut to before it is booted.
    #[serde(default)]
    pub(crate) cut_image_to: Option<usize>,
    /// The hypervisor's loader refuses this image: it never runs.
    #[serde(default)]
    pub(crate) refused: bool,
    #[serde(default = "default_timeout")]
    pub(crate) timeout_s: u64,
    /// What it prints is compared with what is known of Xen (`conformance.rs`).
    #[serde(default)]
    pub(crate) answers: bool,
}

/// Tests that an image lists itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct GuestTests {
    image: String,
    rows: Vec<String>,
    #[serde(default)]
    groups: Vec<String>,
    #[serde(default)]
    disks: Vec<DiskKind>,
    #[serde(default)]
    network: bool,
    #[serde(default = "default_memory")]
    memory_mib: u32,
    #[serde(default = "default_timeout")]
    timeout_s: u64,
    /// What they print is compared with what is known of Xen.
    #[serde(default)]
    answers: bool,
    /// Rows for tests whose name starts so; the longest prefix counts.
    #[serde(default)]
    only: BTreeMap<String, Vec<String>>,
    /// Virtual CPUs for tests whose name starts so; others have one.
    #[serde(default)]
    cpus: BTreeMap<String, u32>,
    /// Tests that must end otherwise than with success.
    #[serde(default)]
    ends: BTreeMap<String, End>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct End {
    status: u8,
    expect: Vec<String>,
}

fn default_image() -> String {
    crate::guest::DEFAULT_IMAGE.to_owned()
}
const fn default_memory() -> u32 {
    128
}
const fn default_cpus() -> u32 {
    1
}
const fn default_timeout() -> u64 {
    30
}

/// One test on one row.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    pub(crate) row_name: String,
    pub(crate) row: Row,
    pub(crate) case: Case,
}

fn row(name: &str, data: &RowData) -> Result<Row> {
    let machine = data.machine.as_str();
    Ok(match (machine, data.door.as_deref()) {
        ("q35", None) => Row::Qemu(Machine::Q35),
        ("microvm", None) => Row::Qemu(Machine::Microvm),
        ("pc", None) => Row::Qemu(Machine::Pc),
        ("q35", Some("pvh")) => Row::Pvh(Machine::Q35),
        ("microvm", Some("pvh")) => Row::Pvh(Machine::Microvm),
        ("microvm", Some("pvh-no-acpi")) => Row::PvhNoAcpi(Machine::Microvm),
        ("q35", Some("linux64")) => Row::Linux64(Machine::Q35),
        ("q35-bios", Some("multiboot")) => Row::Grub(Multiboot::One, Firmware::Bios),
        ("q35-bios", Some("multiboot2")) => Row::Grub(Multiboot::Two, Firmware::Bios),
        ("q35-uefi", Some("multiboot")) => Row::Grub(Multiboot::One, Firmware::Uefi),
        ("q35-uefi", Some("multiboot2")) => Row::Grub(Multiboot::Two, Firmware::Uefi),
        ("xen", Some("pv")) => Row::Xen(Mode::Pv),
        ("xen", Some("pvh")) => Row::Xen(Mode::Pvh),
        ("dom0", Some("pv")) => Row::Dom0(Mode::Pv),
        ("dom0", Some("pvh")) => Row::Dom0(Mode::Pvh),
        ("monitor", None) => Row::Monitor(Devices::Xen),
        ("monitor", Some("virtio")) => Row::Monitor(Devices::Virtio),
        ("monitor", Some("virtio-grants")) => Row::Monitor(Devices::VirtioGrants),
        ("monitor", Some("mixed")) => Row::Monitor(Devices::Mixed),
        ("kvm", None | Some("pvh")) => Row::Kvm(KvmDoor::Pvh),
        ("kvm", Some("linux64")) => Row::Kvm(KvmDoor::Linux),
        (_, door) => bail!("row {name}: no machine {machine:?} with door {door:?}"),
    })
}

/// Reads `tests/matrix.toml`.
///
/// # Errors
/// It cannot be read, or says something unknown.
pub(crate) fn load() -> Result<Matrix> {
    let file = paths::root().join("tests/matrix.toml");
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}", file.display()))?;
    toml::from_str(&text).with_context(|| format!("in {}", file.display()))
}

impl Matrix {
    /// The packages of the images that `wanted` may need, each once: by rows, groups and, if known, the name.
    pub(crate) fn images(
        &self,
        wanted: impl Fn(&[String], &[String], Option<&str>) -> bool,
    ) -> Vec<String> {
        let cases = self
            .test
            .iter()
            .filter(|case| wanted(&case.rows, &case.groups, Some(&case.name)))
            .map(|case| case.image.clone());
        // The names of these are in the images.
        let listed = self
            .guest_tests
            .iter()
            .filter(|tests| wanted(&tests.rows, &tests.groups, None))
            .map(|tests| tests.image.clone());
        let mut images: Vec<String> = cases.chain(listed).collect();
        images.sort_unstable();
        images.dedup();
        images
    }

    /// Every test on every row of its own; `listed` answers the names of the tests in an image, `None` if it
    /// was not built because nobody wants them.
    ///
    /// # Errors
    /// A test names an unknown row.
    pub(crate) fn instances(
        &self,
        listed: impl Fn(&str) -> Result<Option<Vec<String>>>,
    ) -> Result<Vec<Instance>> {
        let mut rows = BTreeMap::new();
        for (name, data) in &self.row {
            rows.insert(name.as_str(), row(name, data)?);
        }
        let mut cases = self.test.clone();
        for tests in &self.guest_tests {
            let Some(names) = listed(&tests.image)? else { continue };
            if names.is_empty() {
                bail!("the image {} lists no test", tests.image);
            }
            for ended in tests.ends.keys() {
                if !names.contains(ended) {
                    bail!(
                        "tests/matrix.toml speaks of {ended}, which {} does not list",
                        tests.image
                    );
                }
            }
            cases.extend(names.iter().map(|name| tests.case(name)));
        }
        let mut instances = Vec::new();
        for case in cases {
            for row_name in &case.rows {
                let row = *rows
                    .get(row_name.as_str())
                    .with_context(|| format!("test {}: no row {row_name}", case.name))?;
                instances.push(Instance { row_name: row_name.clone(), row, case: case.clone() });
            }
        }
        Ok(instances)
    }
}

impl GuestTests {
    fn case(&self, name: &str) -> Case {
        let longest = self
            .only
            .iter()
            .filter(|(prefix, _)| name.starts_with(prefix.as_str()))
            .max_by_key(|(prefix, _)| prefix.len());
        let rows = match longest {
            Some((_, rows)) => self.rows.iter().filter(|row| rows.contains(row)).cloned().collect(),
            None => self.rows.clone(),
        };
        let (status, expect) = match self.ends.get(name) {
            Some(ending) => (ending.status, ending.expect.clone()),
            None => (0, vec![format!("{{\"test\":\"{name}\",\"outcome\":\"success\"")]),
        };
        Case {
            name: name.to_owned(),
            rows,
            groups: self.groups.clone(),
            image: self.image.clone(),
            disks: self.disks.clone(),
            module: None,
            network: self.network,
            memory_mib: self.memory_mib,
            cpus: self
                .cpus
                .iter()
                .find(|(prefix, _)| name.starts_with(prefix.as_str()))
                .map_or(1, |(_, cpus)| *cpus),
            exec: None,
            append: format!("test={name}"),
            before: Vec::new(),
            steps: Vec::new(),
            expect,
            reject: Vec::new(),
            status,
            ending: None,
            cut_image_to: None,
            refused: false,
            timeout_s: self.timeout_s,
            answers: self.answers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_projects_matrix_is_valid_and_every_row_has_a_test() {
        let matrix = load().unwrap();
        let instances = matrix.instances(|_| {
            let ends = matrix.guest_tests.iter().flat_map(|tests| tests.ends.keys().cloned());
            Ok(Some(ends.chain(["any".to_owned()]).collect()))
        });
        let instances = instances.unwrap();
        for name in matrix.row.keys() {
            assert!(
                instances.iter().any(|instance| instance.row_name == *name),
                "no test on {name}"
            );
        }
    }

    #[test]
    fn the_longest_prefix_says_where_a_guest_test_runs() {
        let tests: GuestTests = toml::from_str(
            "image = 'i'\nrows = ['q35', 'xen-pv']\n[only]\n'grant' = ['xen-pv']\n'grant_any' = ['q35']\n\
             [cpus]\n'grant_' = 2\n[ends.boom]\nstatus = 6\nexpect = ['panic']\n",
        )
        .unwrap();
        assert_eq!(tests.case("grants_end").rows, ["xen-pv"]);
        assert_eq!(tests.case("grant_any_x").rows, ["q35"]);
        assert_eq!(tests.case("other").rows, ["q35", "xen-pv"]);
        assert_eq!(tests.case("boom").status, 6);
        assert_eq!((tests.case("grant_any_x").cpus, tests.case("other").cpus), (2, 1));
    }
}
