//! A line into commands and words: spaces between words, `;` between commands, quotes and backslashes as usual.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Why a line is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// The quote that was opened at this byte is never closed.
    OpenQuote(char, usize),
    /// The line ends in a backslash.
    TrailingBackslash,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OpenQuote(quote, at) => {
                write!(f, "the quote {quote} at character {} is never closed", at + 1)
            }
            Self::TrailingBackslash => {
                f.write_str("the line ends in a backslash; write \\\\ for one")
            }
        }
    }
}

/// The commands of a line, each as its words; empty commands are left out.
///
/// # Errors
/// See [`ParseError`].
pub fn split(line: &str) -> Result<Vec<Vec<String>>, ParseError> {
    let mut commands = Vec::new();
    let mut words = Vec::new();
    // `Some` from the first character of a word, so that '' is a word.
    let mut word: Option<String> = None;
    let mut rest = line.char_indices();
    while let Some((at, c)) = rest.next() {
        match c {
            ';' | ' ' | '\t' => {
                words.extend(word.take());
                if c == ';' && !words.is_empty() {
                    commands.push(core::mem::take(&mut words));
                }
            }
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next() {
                        None => return Err(ParseError::OpenQuote(c, at)),
                        Some((_, end)) if end == c => break,
                        Some((_, '\\')) if c == '"' => match rest.next() {
                            None => return Err(ParseError::OpenQuote(c, at)),
                            Some((_, escaped)) => word.push(escaped),
                        },
                        Some((_, inside)) => word.push(inside),
                    }
                }
            }
            '\\' => match rest.next() {
                None => return Err(ParseError::TrailingBackslash),
                Some((_, escaped)) => word.get_or_insert_default().push(escaped),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    if !words.is_empty() {
        commands.push(words);
    }
    Ok(commands)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_quotes_and_semicolons() {
        for (line, commands) in [
            ("", vec![]),
            (" ;; ", vec![]),
            ("ls", vec![vec!["ls"]]),
            ("ls  /a;cat\t/b ;", vec![vec!["ls", "/a"], vec!["cat", "/b"]]),
            ("echo 'a;b' \"c \\\" d\" e\\ f ''", vec![vec!["echo", "a;b", "c \" d", "e f", ""]]),
            ("x'y'z", vec![vec!["xyz"]]),
        ] {
            assert_eq!(split(line).unwrap(), commands, "{line}");
        }
        assert_eq!(split("a 'b"), Err(ParseError::OpenQuote('\'', 2)));
        assert_eq!(split("a\\"), Err(ParseError::TrailingBackslash));
    }
}
