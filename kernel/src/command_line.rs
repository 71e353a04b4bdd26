//! The words of the kernel's command line that this kernel knows.
//!
//! Words that it does not know are left alone, as Linux does: loaders and people add their own.

use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

/// What the command line asks of the default image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `--exec 'cmd; cmd'`: lines to run before the machine is switched off with their status.
    pub exec: Vec<String>,
    /// `--exec` without anything to run: said so rather than ignored.
    pub exec_without_commands: bool,
    /// `ip=ADDRESS/BITS`, with `gw=ADDRESS`: a fixed address instead of DHCP.
    pub address: Option<(Ipv4Cidr, Option<Ipv4Address>)>,
    /// Words whose values make no sense, for a message.
    pub unusable: Vec<String>,
    /// `http=PORT`: where the web server listens, 80 unless told; `http=0` for none.
    pub http_port: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            exec: Vec::new(),
            exec_without_commands: false,
            address: None,
            unusable: Vec::new(),
            http_port: 80,
        }
    }
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
        let mut gateway = None;
        for word in words(line) {
            let Some((name, value)) = word.split_once('=') else { continue };
            let usable = match name {
                "ip" => {
                    value.parse().map(|address| options.address = Some((address, None))).is_ok()
                }
                "gw" => value.parse().map(|address| gateway = Some(address)).is_ok(),
                // Read where it is used, before there is anybody to tell.
                "cpus" => value.parse::<usize>().is_ok_and(|count| count > 0),
                "http" => value.parse().map(|port| options.http_port = port).is_ok(),
                _ => true,
            };
            if !usable {
                options.unusable.push(word);
            }
        }
        if let Some((_, of_address)) = &mut options.address {
            *of_address = gateway;
        }
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
        for line in [
            "--exec 'ls /; cat /a'",
            "quiet --exec=\"ls /; cat /a\" x=y",
            "a --exec ls\\ /;\\ cat\\ /a",
        ] {
            assert_eq!(Options::parse(line).exec, ["ls /; cat /a"], "{line}");
        }
        assert_eq!(Options::parse("--exec a --exec b").exec, ["a", "b"]);
        assert!(Options::parse("quiet --exec").exec_without_commands);
        assert_eq!(Options::parse("--executive x"), Options::default());
    }

    #[test]
    fn an_address_is_read_or_named_as_unusable() {
        let options = Options::parse("ip=10.0.0.2/24 gw=10.0.0.1 http=8080");
        let (address, gateway) = options.address.unwrap();
        assert_eq!(
            (format!("{address}"), gateway.map(|g| format!("{g}"))),
            ("10.0.0.2/24".into(), Some("10.0.0.1".into()))
        );
        assert_eq!(options.http_port, 8080);
        assert_eq!(Options::parse("ip=10.0.0.2 http=x").unusable, ["ip=10.0.0.2", "http=x"]);
        assert_eq!(Options::parse("cpus=2 cpus=0 cpus=two").unusable, ["cpus=0", "cpus=two"]);
    }

    #[test]
    fn the_last_value_of_a_name_counts() {
        assert_eq!(value("ip=1 gw=2 ip=3", "ip").as_deref(), Some("3"));
        assert_eq!(value("ipx=1", "ip"), None);
        assert_eq!(value("name='a b'", "name").as_deref(), Some("a b"));
    }
}
