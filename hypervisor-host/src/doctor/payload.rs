//! What a bzImage carries: the kernel proper, compressed (Linux, `Documentation/arch/x86/boot.rst`, `payload_offset`).
//!
//! The unpackers are libraries; here is only which one, and how much they may make of a file.

use std::io::Read;

use super::image::u32_at;

/// No kernel unpacks to more.
const LIMIT: u64 = 1 << 30;

/// The program that made a compressed file, by its first bytes.
#[must_use]
pub fn format(data: &[u8]) -> Option<&'static str> {
    const FORMATS: [(&[u8], &str); 7] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        // The "legacy" frame is what Linux uses.
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
        (b"BZh", "bzip2"),
        (&[0x5d, 0, 0], "lzma"),
        (&[0x89, b'L', b'Z', b'O'], "lzop"),
    ];
    FORMATS.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, name)| *name)
}

/// Bytes of the setup code in front of the protected-mode kernel, the boot sector included.
pub(super) fn setup_size(file: &[u8]) -> Option<usize> {
    let sectors = match file.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    Some((sectors + 1) * 512)
}

/// The payload of a bzImage, unpacked.
///
/// # Errors
/// Why it cannot be seen.
pub fn unpack(file: &[u8]) -> Result<Vec<u8>, String> {
    let truncated = || "its payload is outside the file: it is incomplete".to_owned();
    let start = setup_size(file).ok_or_else(truncated)?;
    // `payload_offset` and `payload_length`: protocol 2.08.
    let offset = u32_at(file, 0x248).ok_or_else(truncated)? as usize;
    let length = u32_at(file, 0x24c).ok_or_else(truncated)? as usize;
    let from = start.checked_add(offset).ok_or_else(truncated)?;
    let end = from.checked_add(length).ok_or_else(truncated)?;
    let data = file.get(from..end).ok_or_else(truncated)?;
    if data.starts_with(&object::elf::ELFMAG) {
        return Ok(data.to_vec());
    }
    let name = format(data).ok_or("its payload is in no format known here")?;
    let failed = |error: &dyn std::fmt::Display| format!("its {name} payload is damaged: {error}");
    let mut unpacked = Vec::new();
    match name {
        "gzip" => {
            flate2::read::GzDecoder::new(data)
                .take(LIMIT)
                .read_to_end(&mut unpacked)
                .map_err(|error| failed(&error))?;
        }
        "zstd" => {
            ruzstd::decoding::StreamingDecoder::new(data)
                .map_err(|error| failed(&error))?
                .take(LIMIT)
                .read_to_end(&mut unpacked)
                .map_err(|error| failed(&error))?;
        }
        "lz4" => unpack_lz4(data, &mut unpacked).map_err(|error| failed(&error))?,
        "xz" => {
            // The size follows the stream (`scripts/Makefile.lib`, size_append).
            let stream = data.get(..data.len().saturating_sub(4)).unwrap_or_default();
            lzma_rs::xz_decompress(&mut &*stream, &mut unpacked)
                .map_err(|error| failed(&format_args!("{error:?}")))?;
        }
        _ => return Err(format!("its payload is packed with {name}, which is not unpacked here")),
    }
    Ok(unpacked)
}

/// The legacy frame: chunks of at most 8 MiB, each with its size before it.
fn unpack_lz4(data: &[u8], unpacked: &mut Vec<u8>) -> Result<(), String> {
    const CHUNK: usize = 8 << 20;
    let mut at = 4;
    // The last four bytes are the size of the whole, not of a chunk.
    while at + 4 < data.len() {
        let size = u32_at(data, at).ok_or("a chunk's size is missing")? as usize;
        at += 4;
        let chunk = at.checked_add(size).and_then(|end| data.get(at..end));
        let chunk = chunk.ok_or("a chunk is not whole")?;
        let whole = lz4_flex::block::decompress(chunk, CHUNK).map_err(|error| error.to_string())?;
        unpacked.extend_from_slice(&whole);
        at += size;
    }
    Ok(())
}
