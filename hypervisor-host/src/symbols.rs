//! The names of a guest's functions, from its kernel's file.

use object::{Object as _, ObjectSymbol as _, SymbolKind};

/// The functions of one kernel, by address.
#[derive(Debug)]
pub struct Symbols(Vec<(u64, u64, String)>);

impl Symbols {
    /// Reads them; `None`: the file has none, or is no ELF file.
    #[must_use]
    pub fn read(file: &[u8]) -> Option<Self> {
        let file = object::File::parse(file).ok()?;
        let functions = file.symbols().filter(|symbol| {
            symbol.kind() == SymbolKind::Text
                || (symbol.kind() == SymbolKind::Unknown && symbol.address() != 0)
        });
        let mut list: Vec<_> = functions
            .filter_map(|symbol| {
                let name = rustc_demangle::demangle(symbol.name().ok()?);
                Some((symbol.address(), symbol.size(), format!("{name:#}")))
            })
            .collect();
        list.sort();
        (!list.is_empty()).then_some(Self(list))
    }

    /// Whether another file has all of these, at the same addresses.
    #[must_use]
    pub fn are_in(&self, other: &Self) -> bool {
        self.0.iter().all(|symbol| other.0.binary_search(symbol).is_ok())
    }

    /// Where the function is whose name ends so.
    #[must_use]
    pub fn address(&self, end: &str) -> Option<u64> {
        self.0.iter().find(|(_, _, name)| name.ends_with(end)).map(|(start, ..)| *start)
    }

    /// The function at an address, and how far into it that is: `name+0x12`.
    #[must_use]
    pub fn name(&self, address: u64) -> Option<String> {
        let after = self.0.partition_point(|(start, ..)| *start <= address);
        let (start, size, name) = self.0.get(after.checked_sub(1)?)?;
        let into = address - start;
        (into < *size || *size == 0 && into < 0x1000).then(|| format!("{name}+{into:#x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_inside_a_function_has_its_name() {
        let symbols = Symbols(vec![(0x1000, 0x10, "first".into()), (0x1010, 0, "second".into())]);
        assert_eq!(symbols.name(0x1004).as_deref(), Some("first+0x4"));
        assert_eq!(symbols.name(0x1010).as_deref(), Some("second+0x0"));
        assert_eq!(symbols.name(0xfff), None);
        assert_eq!(symbols.name(0x9000), None);
    }

    #[test]
    fn no_file_has_no_symbols() {
        assert!(Symbols::read(b"").is_none() && Symbols::read(&[0x7f; 100]).is_none());
    }
}
