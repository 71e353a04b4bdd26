//! Descriptions of guests in files: TOML of our own, and the configurations of `xl`.
//!
//! Both become [`Setting`]s: the options of `janus run` by name, each with the line that it comes from. What an option
//! means, and which there are, is the command line's affair; so a file can say whatever the command line can.

mod toml;
mod xl;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a file that is still taken for a configuration.
const MOST: u64 = 1 << 20;

/// The value of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A switch.
    Flag(bool),
    /// What would follow the option's name.
    Text(String),
}

/// An option that a file sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The option's long name; `image` is the kernel.
    pub name: String,
    /// Its values: several for an option that may be repeated.
    pub values: Vec<Value>,
    /// The line in the file.
    pub line: usize,
}

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Ours; relative paths are relative to the file.
    Toml,
    /// That of `xl create`; relative paths are relative to the current directory.
    Xl,
}

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The file.
    pub file: PathBuf,
    /// Its kind.
    pub format: Format,
    /// The options it sets, in its order.
    pub settings: Vec<Setting>,
    /// What it says that is not honoured: the line, and a text for people.
    pub remarks: Vec<(usize, String)>,
}

/// A file cannot be used.
#[derive(Debug)]
pub enum ConfigError {
    /// It cannot be read.
    File(PathBuf, io::Error),
    /// Something in it is wrong.
    Line {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, and what to do.
        what: String,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file, error) => write!(f, "{}: {error}", file.display()),
            Self::Line { file, line, what } => write!(f, "{}:{line}: {what}", file.display()),
        }
    }
}

impl std::error::Error for ConfigError {}

/// Something wrong in a text: its line, and what.
type Wrong = (usize, String);

/// Reads a file: TOML if its name ends so, else the configuration of an `xl` guest.
///
/// # Errors
/// See [`ConfigError`].
pub fn read(path: &Path) -> Result<Configuration, ConfigError> {
    let failed = |error| ConfigError::File(path.to_owned(), error);
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MOST {
        return Err(failed(io::Error::other("too large for a configuration (1 MiB at most)")));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let is_toml = path.extension().is_some_and(|extension| extension == "toml");
    let format = if is_toml { Format::Toml } else { Format::Xl };
    parse(path, format, &text)
}

/// Reads the text of a file.
///
/// # Errors
/// See [`ConfigError::Line`].
pub fn parse(file: &Path, format: Format, text: &str) -> Result<Configuration, ConfigError> {
    let read = match format {
        Format::Toml => toml::read(text).map(|settings| (settings, Vec::new())),
        Format::Xl => xl::read(text),
    };
    let file = file.to_owned();
    match read {
        Ok((settings, remarks)) => Ok(Configuration { file, format, settings, remarks }),
        Err((line, what)) => Err(ConfigError::Line { file, line, what }),
    }
}

/// The one of `known` that was probably meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let begins =
        |other: &str| word.len() >= 3 && (other.starts_with(word) || word.starts_with(other));
    let distance = |other: &str| strsim::damerau_levenshtein(word, other);
    let best = known.into_iter().min_by_key(|other| (!begins(other), distance(other)))?;
    (begins(best) || distance(best) <= 1 + word.len() / 4).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_probably_meant_is_found() {
        let known = ["memory", "cpus", "disk", "net"];
        for (word, meant) in [
            ("memry", Some("memory")),
            ("cpu", Some("cpus")),
            ("mem", Some("memory")),
            ("disks", Some("disk")),
            ("xyzzy", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), meant, "{word}");
        }
    }

    #[test]
    fn a_file_that_is_none_says_so() {
        let error = read(Path::new("/nonexistent/guest.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/guest.toml"), "{error}");
        assert!(read(Path::new("/")).is_err());
    }
}
