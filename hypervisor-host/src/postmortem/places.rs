//! Addresses as functions, files and lines. The kernel's file is read when the first is asked for.

use std::cell::OnceCell;
use std::fmt;
use std::path::{Path, PathBuf};

use addr2line::Loader;
use object::Object as _;
use serde::Serialize;

use crate::symbols::Symbols;

/// A place in the guest's code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Place {
    address: String,
    function: Option<String>,
    file: Option<String>,
    line: Option<u32>,
    /// It is part of the next place's function.
    inlined: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)?;
        if let Some(function) = &self.function {
            write!(f, " {function}")?;
        }
        if let Some(file) = &self.file {
            write!(f, " at {file}")?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
        }
        Ok(())
    }
}

/// What is known of a kernel's addresses.
pub(super) struct Places {
    file: PathBuf,
    symbols: OnceCell<Option<Symbols>>,
    lines: OnceCell<Option<Loader>>,
}

impl Places {
    pub(super) fn new(kernel: &Path) -> Self {
        Self { file: kernel.to_owned(), symbols: OnceCell::new(), lines: OnceCell::new() }
    }

    /// The place of an address, behind those that are inlined there; `is_return`: of the call before it.
    pub(super) fn at(&self, address: u64, is_return: bool) -> Vec<Place> {
        let subject = if is_return { address.wrapping_sub(1) } else { address };
        let read = || std::fs::read(&self.file).ok().and_then(|file| Symbols::read(&file));
        let symbols = self.symbols.get_or_init(read).as_ref();
        let name = symbols.and_then(|symbols| symbols.name(subject)).map(|name| {
            match name.rsplit_once('+') {
                // As of the address itself.
                Some((name, offset)) if is_return => {
                    let offset =
                        offset.strip_prefix("0x").and_then(|o| u64::from_str_radix(o, 16).ok());
                    offset.map_or_else(
                        || name.to_owned(),
                        |offset| format!("{name}+{:#x}", offset + 1),
                    )
                }
                _ => name,
            }
        });
        let text = format!("{address:#018x}");
        // Nothing outside of the kernel has lines.
        let lines = || symbols.and_then(|symbols| lines_of(&self.file, symbols));
        let lines = name.as_ref().and_then(|_| self.lines.get_or_init(lines).as_ref());
        let mut places = Vec::new();
        let frames = lines.and_then(|lines| lines.find_frames(subject).ok());
        if let Some(mut frames) = frames {
            while let Ok(Some(frame)) = frames.next() {
                let function = frame.function.as_ref().and_then(|function| {
                    function.demangle().ok().map(std::borrow::Cow::into_owned)
                });
                let (file, line) = match &frame.location {
                    Some(location) => (location.file.map(shortened), location.line),
                    None => (None, None),
                };
                places.push(Place { address: text.clone(), function, file, line, inlined: true });
            }
        }
        match places.last_mut() {
            // The function that is really there has its name from the symbols, with the offset.
            Some(last) => {
                last.inlined = false;
                last.function = name.or(last.function.take());
            }
            None => places.push(Place {
                address: text,
                function: name,
                file: None,
                line: None,
                inlined: false,
            }),
        }
        places
    }
}

/// The lines of a kernel: in its own file, or in the one that it was stripped from, which lies beside it without the
/// last part of its name (`kernel.elf`: `kernel`) or with another one (`kernel.elf.debug`).
fn lines_of(kernel: &Path, symbols: &Symbols) -> Option<Loader> {
    let mut debug = kernel.as_os_str().to_owned();
    debug.push(".debug");
    [kernel.to_owned(), kernel.with_extension(""), debug.into()].into_iter().find_map(|file| {
        let bytes = std::fs::read(&file).ok()?;
        let has_lines = object::File::parse(&*bytes).ok()?.section_by_name(".debug_info").is_some();
        // Of another build it would lie.
        let is_same = has_lines && Symbols::read(&bytes).is_some_and(|all| symbols.are_in(&all));
        is_same.then(|| Loader::new(&file).ok()).flatten()
    })
}

/// The end of a path that says enough.
fn shortened(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').collect();
    parts.get(parts.len().saturating_sub(4)..).unwrap_or_default().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function that is there whatever the compiler makes of the others.
    #[inline(never)]
    fn marked(places: &Places) -> usize {
        places.file.as_os_str().len()
    }

    #[test]
    fn our_own_functions_have_files_and_lines() {
        // This very program has symbols and lines, at addresses from the start of its file.
        let places = Places::new(Path::new("/proc/self/exe"));
        let file = std::fs::read("/proc/self/exe").unwrap();
        let symbols = Symbols::read(&file).unwrap();
        let address = symbols.address("places::tests::marked").expect("it is in this program");
        assert!(marked(&places) > 0);
        let found = places.at(address, false);
        let last = found.last().unwrap();
        assert!(last.function.as_deref().is_some_and(|name| name.contains("marked+0x0")), "{last}");
        assert!(
            last.file.as_deref().is_some_and(|file| file.ends_with("postmortem/places.rs")),
            "{last}"
        );
        assert!(last.line.is_some() && !last.inlined);
    }

    #[test]
    fn what_is_not_known_is_an_address() {
        let places = Places::new(Path::new("/nonexistent"));
        assert_eq!(places.at(0x1000, false)[0].to_string(), "0x0000000000001000");
        assert_eq!(shortened("/a/b/c/d/e.rs"), "b/c/d/e.rs");
    }
}
