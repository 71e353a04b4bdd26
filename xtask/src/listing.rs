//! The tests in an image, read from its ELF file: 64 bytes each between two symbols, the name in the first 56.
//!
//! The other side is `kernel/src/test/registry.rs`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

const DESCRIPTOR_BYTES: usize = 64;
const NAME_BYTES: usize = 56;

/// The names of the tests that `image` holds.
///
/// # Errors
/// It is no ELF file of ours, or the descriptors make no sense.
pub(crate) fn tests(image: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let file = object::File::parse(&*bytes).context("not an ELF file")?;
    let address = |name: &str| -> Result<u64> {
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name));
        Ok(symbol.with_context(|| format!("no symbol {name}"))?.address())
    };
    let (start, end) = (address("janus_tests_start")?, address("janus_tests_end")?);
    if start == end {
        return Ok(Vec::new());
    }
    let length = end.checked_sub(start).context("descriptors end before they start")?;
    let data = file
        .sections()
        .find_map(|section| section.data_range(start, length).ok().flatten())
        .context("the descriptors are in no section")?;
    if data.len() % DESCRIPTOR_BYTES != 0 {
        bail!("{} bytes of test descriptors of {DESCRIPTOR_BYTES} each", data.len());
    }
    data.chunks_exact(DESCRIPTOR_BYTES)
        .map(|descriptor| {
            let name = descriptor.get(..NAME_BYTES).unwrap_or_default();
            let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
            let name = std::str::from_utf8(name.get(..end).unwrap_or_default());
            Ok(name.context("a test name that is not text")?.to_owned())
        })
        .collect()
}
