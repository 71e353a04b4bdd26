//! The program that a guest's process executes: an ELF file of one segment, made in memory and sealed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::layout::{CODE, FILTER, IMAGE_SIZE, STUB};
use super::{filter, host, stub};

/// The file, the same for all guests.
///
/// # Errors
/// The host has no files in memory.
pub(super) fn file() -> io::Result<&'static File> {
    static FILE: OnceLock<File> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file);
    }
    let file = host::memory_file(c"janus-stub", true)?;
    file.write_all_at(&bytes()?, 0)?;
    host::seal(
        &file,
        libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
    )?;
    Ok(FILE.get_or_init(|| file))
}

/// ELF header and program headers (System V gABI 4.1), code, filter.
fn bytes() -> io::Result<Vec<u8>> {
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |image: &mut Vec<u8>, value: u16| image.extend(value.to_le_bytes());
    let word = |image: &mut Vec<u8>, value: u32| image.extend(value.to_le_bytes());
    let long = |image: &mut Vec<u8>, value: u64| image.extend(value.to_le_bytes());
    half(&mut image, 2); // ET_EXEC
    half(&mut image, 62); // EM_X86_64
    word(&mut image, 1);
    long(&mut image, stub::entry());
    long(&mut image, 64); // program headers
    long(&mut image, 0); // no sections
    word(&mut image, 0);
    for value in [64, 56, 2, 0, 0, 0] {
        half(&mut image, value);
    }
    // PT_LOAD, read and execute; PT_GNU_STACK, without which old kernels make all memory executable.
    let segments: [(u32, u32, u64, u64, u64); 2] =
        [(1, 5, STUB, IMAGE_SIZE as u64, 0x1000), (0x6474_e551, 6, 0, 0, 16)];
    for (kind, flags, address, size, alignment) in segments {
        word(&mut image, kind);
        word(&mut image, flags);
        for value in [0, address, address, size, size, alignment] {
            long(&mut image, value);
        }
    }
    let mut put = |at: usize, end: usize, part: &[u8]| {
        let fits = part.len() <= end - at && image.len() <= at;
        image.resize(at, 0);
        image.extend_from_slice(part);
        fits
    };
    if !(put(CODE, FILTER, stub::code()) && put(FILTER, IMAGE_SIZE, &filter::program())) {
        return Err(io::Error::other("the stub has outgrown its pages"));
    }
    image.resize(IMAGE_SIZE, 0);
    Ok(image)
}
