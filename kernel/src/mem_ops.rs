//! `memcpy`, `memmove`, `memset`, `memcmp` and `bcmp` in 64-bit words.
//!
//! The compiler's own use `rep movsb`, which QEMU's TCG carries out byte by byte (about 0.5 GiB/s against 4.7 for
//! words, unrolled); on real CPUs both run at the memory's speed. Written in assembly because a loop in Rust would
//! be recognised and turned into a call of itself. On the host they have other names, for the tests.
// UNSAFETY: raw memory by its contract, in assembly.
#![expect(unsafe_code, reason = "memory operations in assembly")]

use core::arch::naked_asm;
use core::ffi::c_int;

/// Copies `len` bytes from `from` to `to`; answers `to`. Correct also where they overlap and `to` is lower.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "memcpy"))]
pub unsafe extern "sysv64" fn copy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 8",
        "jb 5f",
        // The last word is read first and written last: it covers what is less than a word.
        "mov r11, [rsi + rdx - 8]",
        "lea r10, [rdi + rdx - 8]",
        "cmp rdx, 64",
        "jbe 3f",
        ".balign 16",
        "2:",
        "mov r8, [rsi]",
        "mov r9, [rsi + 8]",
        "mov [rdi], r8",
        "mov [rdi + 8], r9",
        "mov r8, [rsi + 16]",
        "mov r9, [rsi + 24]",
        "mov [rdi + 16], r8",
        "mov [rdi + 24], r9",
        "mov r8, [rsi + 32]",
        "mov r9, [rsi + 40]",
        "mov [rdi + 32], r8",
        "mov [rdi + 40], r9",
        "mov r8, [rsi + 48]",
        "mov r9, [rsi + 56]",
        "mov [rdi + 48], r8",
        "mov [rdi + 56], r9",
        "add rsi, 64",
        "add rdi, 64",
        "sub rdx, 64",
        "cmp rdx, 64",
        "ja 2b",
        "3:",
        "cmp rdx, 8",
        "jbe 4f",
        "mov r8, [rsi]",
        "mov [rdi], r8",
        "add rsi, 8",
        "add rdi, 8",
        "sub rdx, 8",
        "jmp 3b",
        "4:",
        "mov [r10], r11",
        "ret",
        // Fewer than 8 bytes.
        "5:",
        "cmp rdx, 4",
        "jb 6f",
        "mov r8d, [rsi]",
        "mov r9d, [rsi + rdx - 4]",
        "mov [rdi], r8d",
        "mov [rdi + rdx - 4], r9d",
        "ret",
        "6:",
        "test rdx, rdx",
        "jz 7f",
        // 1, 2 or 3: first, middle and last byte.
        "mov rcx, rdx",
        "shr rcx",
        "movzx r8d, byte ptr [rsi]",
        "movzx r9d, byte ptr [rsi + rcx]",
        "movzx r10d, byte ptr [rsi + rdx - 1]",
        "mov [rdi], r8b",
        "mov [rdi + rcx], r9b",
        "mov [rdi + rdx - 1], r10b",
        "7:",
        "ret",
    )
}

/// Copies `len` bytes from `from` to `to`, which may overlap; answers `to`.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "memmove"))]
pub unsafe extern "sysv64" fn copy_overlapping(
    to: *mut u8,
    from: *const u8,
    len: usize,
) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "sub rax, rsi",
        "cmp rax, rdx", // unsigned: `to` below `from`, or behind its end
        "jae {copy}",
        "cmp rdx, 8",
        "jb {copy}", // reads all before it writes
        "mov rax, rdi",
        "mov r11, [rsi]", // the first word: read first, written last
        "2:",
        "cmp rdx, 64",
        "jbe 3f",
        "mov r8, [rsi + rdx - 8]",
        "mov r9, [rsi + rdx - 16]",
        "mov [rdi + rdx - 8], r8",
        "mov [rdi + rdx - 16], r9",
        "mov r8, [rsi + rdx - 24]",
        "mov r9, [rsi + rdx - 32]",
        "mov [rdi + rdx - 24], r8",
        "mov [rdi + rdx - 32], r9",
        "mov r8, [rsi + rdx - 40]",
        "mov r9, [rsi + rdx - 48]",
        "mov [rdi + rdx - 40], r8",
        "mov [rdi + rdx - 48], r9",
        "mov r8, [rsi + rdx - 56]",
        "mov r9, [rsi + rdx - 64]",
        "mov [rdi + rdx - 56], r8",
        "mov [rdi + rdx - 64], r9",
        "sub rdx, 64",
        "jmp 2b",
        "3:",
        "cmp rdx, 8",
        "jbe 4f",
        "mov r8, [rsi + rdx - 8]",
        "mov [rdi + rdx - 8], r8",
        "sub rdx, 8",
        "jmp 3b",
        "4:",
        "mov [rax], r11",
        "ret",
        copy = sym copy,
    )
}

/// Fills `len` bytes from `to` on with the low byte of `value`; answers `to`.
///
/// # Safety
/// As C's `memset`.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "memset"))]
pub unsafe extern "sysv64" fn fill(to: *mut u8, value: c_int, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "movzx ecx, sil",
        "mov r8, 0x0101010101010101",
        "imul rcx, r8",
        "cmp rdx, 8",
        "jb 5f",
        "mov [rdi + rdx - 8], rcx", // what is less than a word at the end
        "2:",
        "cmp rdx, 64",
        "jb 3f",
        "mov [rdi], rcx",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rcx",
        "mov [rdi + 24], rcx",
        "mov [rdi + 32], rcx",
        "mov [rdi + 40], rcx",
        "mov [rdi + 48], rcx",
        "mov [rdi + 56], rcx",
        "add rdi, 64",
        "sub rdx, 64",
        "jmp 2b",
        "3:",
        "cmp rdx, 8",
        "jb 4f",
        "mov [rdi], rcx",
        "add rdi, 8",
        "sub rdx, 8",
        "jmp 3b",
        "4:",
        "ret",
        "5:",
        "test rdx, rdx",
        "jz 4b",
        "mov [rdi], cl",
        "inc rdi",
        "dec rdx",
        "jmp 5b",
    )
}

/// Compares `len` bytes as unsigned numbers: below, 0 or above zero.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "memcmp"))]
pub unsafe extern "sysv64" fn compare(a: *const u8, b: *const u8, len: usize) -> c_int {
    naked_asm!(
        "2:",
        "cmp rdx, 8",
        "jb 4f",
        "mov rax, [rdi]",
        "mov rcx, [rsi]",
        "cmp rax, rcx",
        "jne 3f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "jmp 2b",
        // The first byte that differs is the highest one in big-endian order.
        "3:",
        "bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
        "4:",
        "test rdx, rdx",
        "jz 5f",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jnz 6f",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "jmp 4b",
        "5:",
        "xor eax, eax",
        "6:",
        "ret",
    )
}

/// As [`compare`], but tells only whether there is a difference.
///
/// # Safety
/// As C's `bcmp`.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "bcmp"))]
pub unsafe extern "sysv64" fn differ(a: *const u8, b: *const u8, len: usize) -> c_int {
    naked_asm!("jmp {compare}", compare = sym compare)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 24] = [
        0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 71, 72, 127, 128, 129, 200, 511,
        1000,
    ];

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i * 31 % 251).unwrap()).collect()
    }

    #[test]
    fn copies_are_exact_at_every_alignment() {
        let from = bytes(1100);
        for len in LENGTHS {
            for (a, b) in [(0, 0), (1, 0), (0, 3), (5, 7)] {
                let mut to = vec![0xEE; 1100];
                // SAFETY: both ranges lie in their vectors, which are apart.
                unsafe { copy(to.as_mut_ptr().add(a + 8), from.as_ptr().add(b), len) };
                assert_eq!(to[a + 8..a + 8 + len], from[b..b + len]);
                assert!(to[..a + 8].iter().chain(&to[a + 8 + len..]).all(|b| *b == 0xEE), "{len}");
            }
        }
    }

    #[test]
    fn overlapping_copies_are_those_of_the_standard_library() {
        for len in LENGTHS {
            for (to, from) in [(0, 1), (1, 0), (0, 8), (8, 0), (3, 60), (60, 3), (70, 0), (0, 70)] {
                let mut expected = bytes(1100);
                let mut found = expected.clone();
                expected.copy_within(from..from + len, to);
                let base = found.as_mut_ptr();
                // SAFETY: both ranges lie in the vector.
                unsafe { copy_overlapping(base.add(to), base.add(from), len) };
                assert!(found == expected, "{len} bytes from {from} to {to}");
            }
        }
    }

    #[test]
    fn fills_touch_nothing_else() {
        for len in LENGTHS {
            let mut to = vec![1; len + 20];
            // SAFETY: the range lies in the vector.
            unsafe { fill(to.as_mut_ptr().add(9), 0x1_C3, len) };
            assert!(to[9..9 + len].iter().all(|b| *b == 0xC3));
            assert!(to[..9].iter().chain(&to[9 + len..]).all(|b| *b == 1), "{len}");
        }
    }

    #[test]
    fn comparisons_find_the_first_difference() {
        for len in LENGTHS {
            let a = bytes(len);
            // SAFETY: both are this long.
            assert_eq!(unsafe { compare(a.as_ptr(), a.as_ptr(), len) }, 0);
            for at in (0..len).step_by(3) {
                let mut b = a.clone();
                b[at] = b[at].wrapping_add(100);
                if let Some(later) = b.get_mut(at + 1) {
                    *later = later.wrapping_sub(100);
                }
                // SAFETY: both are this long.
                let (forth, back, differ) = unsafe {
                    (
                        compare(a.as_ptr(), b.as_ptr(), len),
                        compare(b.as_ptr(), a.as_ptr(), len),
                        differ(a.as_ptr(), b.as_ptr(), len),
                    )
                };
                assert_eq!(forth.signum(), a.cmp(&b) as c_int);
                assert_eq!(back.signum(), -forth.signum());
                assert!(differ != 0);
            }
        }
    }
}
