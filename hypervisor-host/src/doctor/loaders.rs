//! What each loader does with a kernel: its rules as code, in the order in which the loader looks.
//!
//! Each function is one loader, and says where its rules are written. Versions matter: QEMU's are those of 7.2 to 10,
//! Xen's those of 4.17 to 4.21, and of the others what their trees said in August 2026.

use std::fmt;

use janus_proto::abi::xen::elfnote::ElfNote;
use object::elf::{EM_386, EM_X86_64};

use super::image::{Elf, Image, Kind, Note};
use crate::pv::builder::Kernel;

/// The end of the lower half of the address space.
const LOWER_HALF: u64 = 1 << 47;
const MIB: u64 = 1 << 20;

/// What a loader will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It loads and enters it.
    Yes,
    /// It enters it, and whether the kernel expects to be entered so is not in its headers.
    Perhaps,
    /// It refuses it, or what it enters cannot work.
    No,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Yes => "yes",
            Self::Perhaps => "perhaps",
            Self::No => "no",
        })
    }
}

/// What a loader will do with a kernel, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// The loader.
    pub loader: &'static str,
    /// What it will do.
    pub verdict: Verdict,
    /// By which door it enters, or why it does not.
    pub why: String,
    /// What to change so that it does; empty where nothing need be.
    pub fix: &'static str,
    /// Where the rule is written.
    pub rule: &'static str,
}

/// A loader's answer before its name is put to it.
struct Answer {
    verdict: Verdict,
    why: String,
    fix: &'static str,
    rule: &'static str,
}

fn yes(why: impl Into<String>, rule: &'static str) -> Answer {
    Answer { verdict: Verdict::Yes, why: why.into(), fix: "", rule }
}

fn perhaps(why: impl Into<String>, fix: &'static str, rule: &'static str) -> Answer {
    Answer { verdict: Verdict::Perhaps, why: why.into(), fix, rule }
}

fn no(why: impl Into<String>, fix: &'static str, rule: &'static str) -> Answer {
    Answer { verdict: Verdict::No, why: why.into(), fix, rule }
}

type Loader = (&'static str, fn(&Image, &[u8]) -> Answer);

/// The loaders, in the order of the table.
const LOADERS: [Loader; 10] = [
    ("Xen, type=pv", |image, _| xen_pv(image)),
    ("Xen, type=pvh", |image, _| xen_pvh(image)),
    ("janus, monitor engine", monitor),
    ("janus, KVM engine", |image, _| linux_loader(image, LinuxLoader::Janus)),
    ("QEMU -kernel (pc, q35, microvm)", |image, _| qemu(image)),
    ("Firecracker", |image, _| linux_loader(image, LinuxLoader::Firecracker)),
    ("Cloud Hypervisor", |image, _| linux_loader(image, LinuxLoader::CloudHypervisor)),
    ("crosvm", |image, _| crosvm(image)),
    ("GRUB, multiboot", |image, _| grub_multiboot(image)),
    ("GRUB, multiboot2", |image, _| grub_multiboot2(image)),
];

/// Says what each loader will do with `image`, which was read from `file`.
#[must_use]
pub fn predict(image: &Image, file: &[u8]) -> Vec<Prediction> {
    let predict = |(loader, rules): &Loader| {
        let Answer { verdict, why, fix, rule } = rules(image, file);
        Prediction { loader, verdict, why, fix, rule }
    };
    LOADERS.iter().map(predict).collect()
}

const LIBELF: &str = "xen/common/libelf/libelf-dominfo.c, elf_xen_parse";
const UNPACK: &str = "unpack it: extract-vmlinux for a bzImage, or the program that packed it";
const COPY: &str = "copy the file again, it is incomplete";

/// The ELF file that Xen's toolstack will read, or its refusal.
fn for_xen(image: &Image) -> Result<&Elf, Answer> {
    const RULE: &str = "tools/libs/guest/xg_dom_elfloader.c and xg_dom_bzimageloader.c";
    let elf = match (&image.elf, &image.payload) {
        (Some(elf), _) | (None, Some(Ok(elf))) => elf,
        (None, Some(Err(why))) => return Err(no(why.clone(), UNPACK, RULE)),
        (None, None) => {
            return Err(match image.kind {
                Kind::Compressed(name) => {
                    no(format!("the file is packed with {name}"), UNPACK, RULE)
                }
                _ => {
                    no("neither an ELF file nor a bzImage", "build the kernel as an ELF file", RULE)
                }
            });
        }
    };
    if let Some(missing) = elf.missing {
        return Err(no(format!("{missing} is not in the file"), COPY, RULE));
    }
    Ok(elf)
}

/// `xl create` with `type="pv"`.
fn xen_pv(image: &Image) -> Answer {
    let elf = match for_xen(image) {
        Ok(elf) => elf,
        Err(answer) => return answer,
    };
    if elf.machine != EM_X86_64.0 {
        let rule =
            "xen/arch/x86/pv/domain.c: 32-bit PV needs CONFIG_PV32, which distributions leave out";
        return no(format!("a {}-bit kernel", elf.bits), "build it for x86-64", rule);
    }
    let notes = elf.xen_notes();
    if notes.is_empty() {
        if elf.has_xen_guest {
            return yes("by the text of its section __xen_guest", LIBELF);
        }
        return no(
            "no ELF note of Xen's and no section __xen_guest",
            "build it with its Xen PV support (Linux: CONFIG_XEN_PV)",
            LIBELF,
        );
    }
    let text = |kind| elf.xen_note(kind).and_then(Note::text).unwrap_or_default();
    let number = |kind| elf.xen_note(kind).and_then(Note::number);
    let (loader, guest) = (text(ElfNote::LOADER), text(ElfNote::GUEST_OS));
    if !loader.starts_with("generic") && !guest.starts_with("linux") {
        return no(
            format!("LOADER is \"{loader}\" and GUEST_OS \"{guest}\""),
            "add the note LOADER with \"generic\"",
            LIBELF,
        );
    }
    let version = text(ElfNote::XEN_VERSION);
    if !version.starts_with("xen-3.0") {
        let fix = "add the note XEN_VERSION with \"xen-3.0\"";
        return no(format!("XEN_VERSION is \"{version}\""), fix, LIBELF);
    }
    let (base, offset) = (number(ElfNote::VIRT_BASE), number(ElfNote::PADDR_OFFSET));
    if offset.is_some() && base.is_none() {
        return no("PADDR_OFFSET without VIRT_BASE", "add the note VIRT_BASE", LIBELF);
    }
    let shift = base.unwrap_or(0).wrapping_sub(offset.unwrap_or(0));
    let Some((start, end)) = elf.span() else {
        return no("no segment to load", "link it as an executable", LIBELF);
    };
    let (start, end) = (start.wrapping_add(shift), end.wrapping_add(shift));
    let entry = number(ElfNote::ENTRY).unwrap_or(elf.entry);
    if start > end || entry < start || entry > end || base.unwrap_or(0) > start {
        return no(
            format!("its entry {entry:#x} is outside of {start:#x} to {end:#x}"),
            "let ENTRY, VIRT_BASE and PADDR_OFFSET agree with the program headers",
            LIBELF,
        );
    }
    if number(ElfNote::INIT_P2M).is_some_and(|list| list >= start && list < end) {
        return no("INIT_P2M is within the image", "put it behind the image", LIBELF);
    }
    yes(format!("by its Xen notes, at {entry:#x}"), LIBELF)
}

/// `xl create` with `type="pvh"`.
fn xen_pvh(image: &Image) -> Answer {
    match for_xen(image) {
        Err(answer) => answer,
        Ok(elf) => match elf.xen_note(ElfNote::PHYS32_ENTRY).and_then(Note::number) {
            Some(entry) => yes(format!("by the note PHYS32_ENTRY, at {entry:#x}"), LIBELF),
            None => no(
                "no note PHYS32_ENTRY",
                "add the note PHYS32_ENTRY with a 32-bit entry (Linux: CONFIG_PVH)",
                LIBELF,
            ),
        },
    }
}

/// `janus run` on the monitor: the domain builder itself answers.
fn monitor(_: &Image, file: &[u8]) -> Answer {
    const RULE: &str =
        "Xen's rules for PV, and the lower half only: the upper one is the host kernel's";
    match Kernel::parse(file) {
        Err(cause) => no(cause.to_string(), "", RULE),
        Ok(kernel) if kernel.end > LOWER_HALF => no(
            format!("it lives in the upper half of the address space, at {:#x}", kernel.start),
            "a process has only the lower half: run this kernel as PVH or under KVM",
            RULE,
        ),
        Ok(kernel) => yes(format!("by its Xen notes, at {:#x}", kernel.entry), RULE),
    }
}

/// `qemu-system-x86_64 -kernel`.
fn qemu(image: &Image) -> Answer {
    const RULE: &str =
        "hw/i386/x86.c (x86-common.c), x86_load_linux: HdrS, then multiboot, then the PVH note";
    const MULTIBOOT: &str = "hw/i386/multiboot.c, load_multiboot";
    if image.linux.is_some() {
        return from_linux_header(image, "by the boot sector's protocol (linuxboot)", RULE);
    }
    if let Some(multiboot) = image.multiboot.filter(|found| found.offset < 8192 - 48) {
        let Some([header, load, load_end, bss_end, entry]) = multiboot.addresses else {
            return match &image.elf {
                Some(elf) if elf.machine == EM_X86_64.0 => no(
                    "a multiboot 1 header without addresses in an x86-64 ELF file: \"Cannot load x86-64 image, give a \
                     32bit one.\", and the PVH note is not looked at",
                    "set flag 16 of the multiboot header and give the addresses, or remove the header",
                    MULTIBOOT,
                ),
                Some(elf) if elf.missing.is_none() => {
                    yes(format!("by multiboot 1, at {:#x}", elf.entry), MULTIBOOT)
                }
                Some(_) => no("the ELF file is not whole", COPY, MULTIBOOT),
                None => no(
                    "a multiboot 1 header without addresses, and not an ELF file",
                    "set flag 16 of the multiboot header and give the addresses",
                    MULTIBOOT,
                ),
            };
        };
        let offset = u64::from(header).checked_sub(u64::from(load));
        let from = offset.and_then(|offset| (multiboot.offset as u64).checked_sub(offset));
        let length = match load_end {
            0 => from.and_then(|from| (image.size as u64).checked_sub(from)),
            end => u64::from(end).checked_sub(u64::from(load)),
        };
        let in_file = |(from, length): (u64, u64)| from + length <= image.size as u64;
        let fits = from.zip(length).filter(|part| in_file(*part)).is_some_and(|(_, length)| {
            bss_end == 0 || u64::from(bss_end) >= u64::from(load) + length
        });
        if !fits {
            return no(
                "the addresses of its multiboot 1 header do not fit each other or the file",
                "mend header_addr, load_addr, load_end_addr and bss_end_addr, or copy the file again",
                MULTIBOOT,
            );
        }
        return yes(
            format!("by multiboot 1, at {entry:#x} (the PVH note is not looked at)"),
            MULTIBOOT,
        );
    }
    let Some(elf) = &image.elf else {
        return no(
            "no HdrS, no multiboot header, not ELF: it is taken for a Linux of the nineties and entered in real mode",
            "build it as an ELF file with the note PHYS32_ENTRY, or as a bzImage",
            RULE,
        );
    };
    if elf.flags & 0x0001_0004 != 0 {
        return no(format!("e_flags {:#x}", elf.flags), "clear e_flags", RULE);
    }
    if let Some(missing) = elf.missing {
        return no(format!("{missing} is not in the file"), COPY, RULE);
    }
    if elf.machine != EM_X86_64.0 && elf.machine != EM_386.0 {
        return no(format!("e_machine is {}", elf.machine), "build it for x86", RULE);
    }
    let by_alignment = elf.notes.iter().flat_map(|segment| &segment.xen_by_alignment);
    let entry =
        by_alignment.filter(|note| note.kind == ElfNote::PHYS32_ENTRY).find_map(Note::number);
    match entry.filter(|entry| *entry != 0) {
        Some(entry) => yes(format!("by the note PHYS32_ENTRY, at {entry:#x}"), RULE),
        None if elf.xen_note(ElfNote::PHYS32_ENTRY).is_some() => no(
            "its note PHYS32_ENTRY is not where p_align of the PT_NOTE segment puts it",
            "align the note section and its segment to 4, not 8",
            "include/hw/elf_ops.h, get_elf_note_type",
        ),
        None => no(
            "\"Error loading uncompressed kernel without PVH ELF Note\"",
            "add the note PHYS32_ENTRY (Linux: CONFIG_PVH), or give the bzImage",
            RULE,
        ),
    }
}

fn from_linux_header(image: &Image, door: &str, rule: &'static str) -> Answer {
    match image.linux {
        Some(linux) if !linux.is_whole => no("its setup code is not all in the file", COPY, rule),
        Some(linux) => {
            yes(format!("{door}, {}.{:02}", linux.version >> 8, linux.version & 0xff), rule)
        }
        None => no("no HdrS at 0x202", "give a bzImage", rule),
    }
}

/// Monitors that load with rust-vmm's `linux-loader`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LinuxLoader {
    Janus,
    Firecracker,
    CloudHypervisor,
}

fn linux_loader(image: &Image, monitor: LinuxLoader) -> Answer {
    const RULE: &str = "linux-loader 0.14, loader/elf/mod.rs, Elf::load";
    let Some(elf) = &image.elf else {
        return linux_loader_bzimage(image, monitor);
    };
    if elf.bits != 64 || elf.missing == Some("the program header table") {
        return no("not a whole 64-bit ELF file", "build it for x86-64, or copy it again", RULE);
    }
    if let Some(missing) = elf.missing {
        return no(format!("{missing} is not in the file"), COPY, RULE);
    }
    if elf.entry < MIB {
        return no(
            format!("e_entry is {:#x}, below 1 MiB: InvalidEntryAddress", elf.entry),
            "let e_entry be above 1 MiB, even if only the PVH note is used",
            RULE,
        );
    }
    // Each PT_NOTE segment overwrites what the one before said.
    let entry = elf.notes.last().and_then(|segment| {
        segment.xen.iter().find(|note| note.kind == ElfNote::PHYS32_ENTRY).and_then(Note::number)
    });
    let overwritten = entry.is_none() && elf.xen_note(ElfNote::PHYS32_ENTRY).is_some();
    match (entry, monitor) {
        (Some(entry), _) => yes(format!("by the note PHYS32_ENTRY, at {entry:#x}"), RULE),
        (None, LinuxLoader::CloudHypervisor) if overwritten => no(
            "its note PHYS32_ENTRY is not in the last PT_NOTE segment, and only that one counts",
            "put .note.Xen into the last PT_NOTE segment, or drop the other notes (.note.gnu.property)",
            RULE,
        ),
        (None, LinuxLoader::CloudHypervisor) => no(
            "no note PHYS32_ENTRY: \"Kernel is missing PVH header\"",
            "add the note PHYS32_ENTRY (Linux: CONFIG_PVH)",
            "cloud-hypervisor, vmm/src/vm.rs, load_kernel",
        ),
        (None, _) => perhaps(
            format!(
                "enters {:#x} in 64-bit mode with boot_params{}",
                elf.entry,
                if overwritten { ": the PVH note is not in the last PT_NOTE segment" } else { "" }
            ),
            "right for Linux and for kernels whose e_entry follows Linux's 64-bit protocol; others: add PHYS32_ENTRY",
            "firecracker, src/vmm/src/arch/x86_64/mod.rs, load_kernel",
        ),
    }
}

fn linux_loader_bzimage(image: &Image, monitor: LinuxLoader) -> Answer {
    const RULE: &str = "linux-loader 0.14, loader/bzimage/mod.rs";
    let Some(linux) = image.linux else {
        return match image.kind {
            Kind::Compressed(name) => no(format!("the file is packed with {name}"), UNPACK, RULE),
            _ => no("neither ELF nor bzImage", "build it as an ELF file with PHYS32_ENTRY", RULE),
        };
    };
    if linux.version < 0x200 || !linux.is_loaded_high {
        return no("an old bzImage that is not loaded at 1 MiB", "build a current one", RULE);
    }
    match monitor {
        LinuxLoader::Firecracker if !linux.has_64_bit_entry => no(
            "the bzImage has no 64-bit entry (XLF_KERNEL_64)",
            "build a 64-bit kernel with CONFIG_RELOCATABLE",
            "firecracker, src/vmm/src/arch/x86_64/mod.rs, load_kernel",
        ),
        LinuxLoader::Firecracker => perhaps(
            "as a bzImage, in versions after 1.16",
            "older versions take only ELF files: extract-vmlinux",
            "firecracker, src/vmm/src/arch/x86_64/mod.rs, load_kernel",
        ),
        LinuxLoader::CloudHypervisor => {
            from_linux_header(image, "as a bzImage, 32-bit entry", RULE)
        }
        LinuxLoader::Janus if !linux.has_64_bit_entry => {
            no("the bzImage has no 64-bit entry (XLF_KERNEL_64)", "build a 64-bit kernel", RULE)
        }
        LinuxLoader::Janus => from_linux_header(image, "as a bzImage, 64-bit entry", RULE),
    }
}

/// `crosvm run`.
fn crosvm(image: &Image) -> Answer {
    const RULE: &str = "crosvm, x86_64/src/lib.rs, load_kernel";
    const LOWEST: u64 = 2 << 20;
    if let Some([.., entry]) = image.multiboot.and_then(|multiboot| multiboot.addresses) {
        return yes(format!("by multiboot 1, at {entry:#x}"), RULE);
    }
    let Some(elf) = &image.elf else {
        return match image.linux {
            Some(_) => from_linux_header(image, "as a bzImage", RULE),
            None => no("neither multiboot with addresses, nor ELF, nor bzImage", UNPACK, RULE),
        };
    };
    if let Some(missing) = elf.missing {
        return no(format!("{missing} is not in the file"), COPY, RULE);
    }
    match elf.span() {
        None => no("no segment to load", "link it as an executable", RULE),
        Some((start, _)) if start < LOWEST => no(
            format!("a segment at {start:#x}, below 2 MiB: ProgramHeaderAddressOutOfRange"),
            "link it at 2 MiB or above",
            RULE,
        ),
        Some((start, end)) if elf.entry < start || elf.entry >= end => no(
            format!("e_entry {:#x} is outside of its segments", elf.entry),
            "let e_entry be the physical address of Linux's 64-bit entry",
            RULE,
        ),
        Some(_) if elf.bits == 64 => perhaps(
            format!("enters {:#x} in 64-bit mode with boot_params; no PVH", elf.entry),
            "right for kernels whose e_entry follows Linux's 64-bit protocol",
            RULE,
        ),
        Some(_) => perhaps(
            format!("enters {:#x} in 32-bit mode with boot_params", elf.entry),
            "right for kernels whose e_entry follows Linux's 32-bit protocol",
            RULE,
        ),
    }
}

/// GRUB's `multiboot`.
fn grub_multiboot(image: &Image) -> Answer {
    const RULE: &str = "grub, loader/i386/multiboot_mbi.c; multiboot 0.6.96, 3.1";
    /// Flags that a loader must know or refuse; 0 to 2 are known.
    const REQUIRED: u32 = 0xfff8;
    let Some(multiboot) = image.multiboot else {
        return no("no multiboot 1 header in the first 8 KiB", "add one", RULE);
    };
    if multiboot.flags & REQUIRED != 0 {
        return no(
            format!("flags {:#x} ask for more than there is", multiboot.flags),
            "clear them",
            RULE,
        );
    }
    match (multiboot.addresses, &image.elf) {
        (Some([.., entry]), _) => yes(format!("by the header's addresses, at {entry:#x}"), RULE),
        (None, Some(elf)) if elf.missing.is_none() && elf.entry < 1 << 32 => {
            yes(format!("by its program headers, at {:#x}", elf.entry), RULE)
        }
        (None, _) => no(
            "the header has no addresses, and the file is no whole ELF file with an entry below 4 GiB",
            "set flag 16 and give the addresses",
            RULE,
        ),
    }
}

/// GRUB's `multiboot2`.
fn grub_multiboot2(image: &Image) -> Answer {
    const RULE: &str = "grub, loader/multiboot_mbi2.c; multiboot 2.0, 3.1";
    match (image.multiboot2, &image.elf) {
        (None, _) => no("no multiboot 2 header in the first 32 KiB", "add one", RULE),
        (Some(_), Some(elf)) if elf.missing.is_none() => {
            yes("by its header and program headers", RULE)
        }
        (Some(_), Some(_)) => no("the ELF file is not whole", COPY, RULE),
        (Some(_), None) => perhaps("if its header has the address and entry tags", "", RULE),
    }
}
