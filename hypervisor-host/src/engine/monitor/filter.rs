//! What a guest's process may ask of the host: the whole boundary between the two.
//!
//! A classic BPF program over `struct seccomp_data` (`linux/seccomp.h`). Only the stub's instructions may make system
//! calls, and since a guest can jump there, what is allowed to the stub is allowed to the guest: to wait and wake at the
//! one word of the mailbox, to return from a signal, and to arrange its own memory below the stub. All else, and all of
//! any other architecture (`int 0x80`, x32 numbers), traps into the stub's signal handler.

use libc::{
    BPF_ABS, BPF_ADD, BPF_ALU, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_MISC,
    BPF_RET, BPF_TAX, BPF_W, BPF_X,
};

use super::layout::{FILTER, IMAGE_SIZE, MAILBOX, RAM_FD, STUB, TOP};

const ARCH_X86_64: u32 = 0xc000_003e;
const FUTEX_WAIT: u32 = 0;
const FUTEX_WAKE: u32 = 1;
const MAP_SHARED_FIXED: u32 = 0x11;
/// The largest upper half of an address or of a length, and of their sum: with both lower halves that is less than
/// the stub's address.
const HIGHEST: u32 = (TOP >> 32) as u32;

/// The lower half of a constant.
const fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

const _: () = assert!(STUB >= TOP + (2 << 32) && STUB & 0xffff_ffff == 0);

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const INSTRUCTION: u32 = 8;
/// The lower half of an argument; the upper is 4 bytes behind it.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// Where a jump goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Next,
    Futex,
    FutexOperation,
    Map,
    Range,
    Allow,
    Trap,
}
use Label::{Allow, Futex, FutexOperation, Map, Next, Range, Trap};

enum Line {
    Load(u32),
    /// Test, value, then, else.
    Jump(u32, u32, Label, Label),
    Plain(u32, u32),
    Here(Label),
}
use Line::{Here, Jump, Load, Plain};

/// A value that must be so.
fn equal(offset: u32, value: u32) -> [Line; 2] {
    [Load(offset), Jump(BPF_JEQ, value, Next, Trap)]
}

fn lines() -> Vec<Line> {
    let stub = (STUB >> 32) as u32;
    let mut lines = Vec::new();
    lines.extend(equal(ARCH, ARCH_X86_64));
    lines.extend(equal(INSTRUCTION + 4, stub));
    lines.extend([
        Load(INSTRUCTION),
        Jump(BPF_JGE, low(IMAGE_SIZE as u64), Trap, Next),
        Load(NUMBER),
    ]);
    for (number, label) in [
        (libc::SYS_futex, Futex),
        (libc::SYS_rt_sigreturn, Allow),
        (libc::SYS_mmap, Map),
        (libc::SYS_munmap, Range),
    ] {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        lines.push(Jump(BPF_JEQ, number, label, Next));
    }
    lines.push(Plain(BPF_RET | BPF_K, libc::SECCOMP_RET_TRAP));

    lines.push(Here(Futex));
    lines.extend(equal(argument(0) + 4, stub));
    lines.extend(equal(argument(0), low(MAILBOX as u64)));
    lines.extend([
        Load(argument(1)),
        Jump(BPF_JEQ, FUTEX_WAIT, Allow, FutexOperation),
        Here(FutexOperation),
        Jump(BPF_JEQ, FUTEX_WAKE, Allow, Trap),
    ]);

    lines.push(Here(Map));
    lines.extend(equal(argument(4), RAM_FD.cast_unsigned()));
    lines.extend(equal(argument(3), MAP_SHARED_FIXED));
    lines.extend(equal(argument(3) + 4, 0));
    lines.extend(equal(argument(2) + 4, 0));
    lines.extend([Load(argument(2)), Jump(BPF_JGT, 7, Trap, Next)]);
    lines.push(Here(Range));
    lines.extend([
        Load(argument(0) + 4),
        Jump(BPF_JGT, HIGHEST, Trap, Next),
        Plain(BPF_MISC | BPF_TAX, 0),
        Load(argument(1) + 4),
        Jump(BPF_JGT, HIGHEST, Trap, Next),
        Plain(BPF_ALU | BPF_ADD | BPF_X, 0),
        Jump(BPF_JGT, HIGHEST, Trap, Next),
        Here(Allow),
        Plain(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
        Here(Trap),
        Plain(BPF_RET | BPF_K, libc::SECCOMP_RET_TRAP),
    ]);
    lines
}

/// The program as the stub hands it to `seccomp`: a `struct sock_fprog`, and behind it the instructions.
pub(super) fn program() -> Vec<u8> {
    let lines = lines();
    let mut labels = Vec::new();
    let mut count = 0_usize;
    for line in &lines {
        match line {
            Here(label) => labels.push((*label, count)),
            _ => count += 1,
        }
    }
    let distance = |from: usize, to: Label| {
        let found = labels.iter().find(|(label, _)| *label == to);
        let target = found.map_or(from + 1, |(_, at)| *at);
        u8::try_from(target - from - 1).unwrap_or(u8::MAX)
    };
    let mut bytes = Vec::new();
    bytes.extend((count as u64).to_le_bytes());
    bytes.extend((STUB + FILTER as u64 + 16).to_le_bytes());
    let mut at = 0;
    for line in &lines {
        let (code, then, otherwise, value) = match *line {
            Load(offset) => (BPF_LD | BPF_W | BPF_ABS, 0, 0, offset),
            Jump(test, value, then, otherwise) => {
                (BPF_JMP | test | BPF_K, distance(at, then), distance(at, otherwise), value)
            }
            Plain(code, value) => (code, 0, 0, value),
            Here(_) => continue,
        };
        at += 1;
        bytes.extend(code.to_le_bytes().into_iter().take(2));
        bytes.extend([then, otherwise]);
        bytes.extend(value.to_le_bytes());
    }
    bytes
}
