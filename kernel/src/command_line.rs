//! The words of the kernel's command line that this kernel knows.
//!
//! Words that it does not know are left alone, as Linux does: loaders and people add their own.

use alloc::string::String;
use alloc::vec::Vec;

/// What the command line asks of the default image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `--exec 'cmd; cmd'`: lines to run before the machine is switched off with their status.
    pub exec: Vec<String>,
    /// `--exec` without anything to run: said so rather than ignored.
    pub exec_without_commands: bool,
}

/// Splits a command line at spaces, except within quotes, which are taken off; a backslash keeps the next character.
#[must_use]
pub fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(open), c) if c == open => quote = None,
            (None, c) if c.is_whitespace() || c == '\0' => words.extend(word.take()),
            (None, '\\') => word.get_or_insert_default().extend(rest.next()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The value of the last word `name=VALUE`.
#[must_use]
pub fn value(line: &str, name: &str) -> Option<String> {
    words(line)
        .into_iter()
        .rev()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=').map(String::from))
}

impl Options {
    /// Reads a command line.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut options = Self::default();
        let mut words = words(line).into_iter();
        while let Some(word) = words.next() {
            let commands = match word.strip_prefix("--exec") {
                Some("") => words.next(),
                Some(rest) => match rest.strip_prefix('=') {
                    Some(commands) => Some(String::from(commands)),
                    None => continue,
                },
                None => continue,
            };
            match commands {
                Some(commands) => options.exec.push(commands),
                None => options.exec_without_commands = true,
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_takes_one_quoted_word() {
        for line in ["--exec 'ls /; cat /a'", "quiet --exec=\"ls /; cat /a\" x=y", "a --exec ls\\ /;\\ cat\\ /a"] {
            assert_eq!(Options::parse(line).exec, ["ls /; cat /a"], "{line}");
        }
        assert_eq!(Options::parse("--exec a --exec b").exec, ["a", "b"]);
        assert!(Options::parse("quiet --exec").exec_without_commands);
        assert_eq!(Options::parse("--executive x"), Options::default());
    }

    #[test]
    fn the_last_value_of_a_name_counts() {
        assert_eq!(value("ip=1 gw=2 ip=3", "ip").as_deref(), Some("3"));
        assert_eq!(value("ipx=1", "ip"), None);
        assert_eq!(value("name='a b'", "name").as_deref(), Some("a b"));
    }
}
