//! Report lines: one JSON object behind `janus-report: ` on a line of its own, for the program that watches the console.
//!
//! `{"test":NAME,"outcome":WORD,"detail":TEXT,"ns":NUMBER}` when a test ends, `{"exit":CODE}` just
//! before the machine does: under Xen the shutdown reason has no room for a code.

use core::fmt::{self, Write};

use super::Outcome;

/// What every report line begins with.
pub const PREFIX: &str = "janus-report: ";

/// A string in JSON's quotes.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\0'..='\u{1f}' | '\u{7f}' => write!(f, "\\u{:04x}", u32::from(c))?,
                _ => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

/// Writes the line that ends a test.
///
/// # Errors
/// `out` fails.
pub fn test_ended(
    out: &mut impl Write,
    name: &str,
    outcome: Outcome,
    detail: &str,
    ns: u64,
) -> fmt::Result {
    let (name, detail) = (Quoted(name), Quoted(detail));
    writeln!(
        out,
        "{PREFIX}{{\"test\":{name},\"outcome\":\"{outcome}\",\"detail\":{detail},\"ns\":{ns}}}"
    )
}

/// Writes the line that names one test of the image.
///
/// # Errors
/// `out` fails.
pub fn test_listed(out: &mut impl Write, name: &str) -> fmt::Result {
    writeln!(out, "{PREFIX}{{\"listed\":{}}}", Quoted(name))
}

/// Writes one measured value.
///
/// # Errors
/// `out` fails.
pub fn measured(out: &mut impl Write, name: &str, value: u64, unit: &str) -> fmt::Result {
    writeln!(
        out,
        "{PREFIX}{{\"measured\":{},\"value\":{value},\"unit\":{}}}",
        Quoted(name),
        Quoted(unit)
    )
}

/// Writes the machine's last line.
///
/// # Errors
/// `out` fails.
pub fn exit(out: &mut impl Write, code: u8) -> fmt::Result {
    writeln!(out, "{PREFIX}{{\"exit\":{code}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_stays_one_line_of_json() {
        let mut line = String::new();
        test_ended(&mut line, "a", Outcome::Failure, "say \"no\"\n\\ \u{1b}[0m", 7).unwrap();
        assert_eq!(
            line,
            "janus-report: {\"test\":\"a\",\"outcome\":\"failure\",\
             \"detail\":\"say \\\"no\\\"\\n\\\\ \\u001b[0m\",\"ns\":7}\n"
        );
        line.clear();
        exit(&mut line, 5).unwrap();
        assert_eq!(line, "janus-report: {\"exit\":5}\n");
    }
}
