//! What can be wrong with a kernel or what it is given, in words that help.

use std::fmt;
use std::io;

/// A domain could not be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildError {
    /// The kernel's file.
    pub file: String,
    /// What is wrong.
    pub cause: Cause,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The file starts as a gzip file does.
    Compressed,
    /// It is no ELF file.
    NotElf,
    /// It is one for something else; the field and its value.
    Machine(&'static str, u64),
    /// A part of the file that it says it has is not there.
    Truncated(&'static str),
    /// There is nothing to load in it.
    NoSegments,
    /// Two segments want the same memory, at this address.
    Overlap(u64),
    /// It has no notes of Xen's, nor the old section.
    NoNotes,
    /// It has them, but only to be started as PVH.
    OnlyPvh,
    /// A note has a value that makes no sense.
    Note(&'static str),
    /// A note asks for what this host does not do.
    Unsupported(&'static str),
    /// It lives in the upper half of the address space, at this address, which the engine does not have.
    UpperHalf(u64),
    /// Addresses that do not go together, by the name of the field.
    Image(&'static str),
    /// The guest has too little memory, in bytes.
    Memory {
        /// What its boot takes.
        needed: u64,
        /// What it has.
        given: u64,
    },
    /// The command line has so many bytes.
    CommandLine(usize),
    /// The command line has a zero byte in it.
    CommandLineZero,
    /// So many CPUs.
    Vcpus(usize),
    /// The host refused the memory.
    Host(io::ErrorKind),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compressed => f.write_str("the file is compressed: unpack it first (gunzip)"),
            Self::NotElf => f
                .write_str("not an ELF file: give the kernel's ELF image, not a bzImage or disk"),
            Self::Machine(field, value) => write!(
                f,
                "{field} is {value:#x}: only 64-bit x86 executables run here, so build the kernel for x86-64"
            ),
            Self::Truncated(what) => {
                write!(f, "{what} is outside the file: it is incomplete, so copy it again")
            }
            Self::NoSegments => {
                f.write_str("no PT_LOAD segment with contents: link it as an executable")
            }
            Self::Overlap(address) => {
                write!(f, "two segments want address {address:#x}: mend the linker script")
            }
            Self::NoNotes => f.write_str(
                "no Xen ELF note and no __xen_guest section: not a kernel for Xen, or built without its PV support",
            ),
            Self::OnlyPvh => f.write_str(
                "its Xen notes have PHYS32_ENTRY only: a PVH kernel, so build it with its PV entry",
            ),
            Self::Note(name) => {
                write!(f, "the Xen note {name} has a value that makes no sense")
            }
            Self::Unsupported(what) => {
                write!(f, "it wants {what}, which a 64-bit PV domain here does not have")
            }
            Self::UpperHalf(address) => write!(
                f,
                "it lives in the upper half of the address space, at {address:#x}: a process has only the lower half, \
                 so run this kernel under QEMU, Xen or KVM"
            ),
            Self::Image(field) => {
                write!(f, "{field} does not fit the image's addresses: mend the linker script")
            }
            Self::Memory { needed, given } => write!(
                f,
                "{} KiB of memory are too few: its boot takes {} KiB, so give it more (--memory)",
                given >> 10,
                needed >> 10
            ),
            Self::CommandLine(length) => write!(
                f,
                "the command line has {length} bytes, and a PV guest's has at most 1023: shorten it"
            ),
            Self::CommandLineZero => {
                f.write_str("the command line has a zero byte in it: take it out")
            }
            Self::Vcpus(count) => write!(f, "{count} CPUs: a PV guest here has 1 to 32"),
            Self::Host(kind) => write!(f, "the host refuses the guest's memory: {kind}"),
        }
    }
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.cause)
    }
}

impl std::error::Error for BuildError {}
