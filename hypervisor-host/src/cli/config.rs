//! `--config`: a file's settings become options in front of the command line's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use crate::config::{ConfigError, Configuration, Format, Setting, Value, nearest};

/// Options that a file cannot set.
const NOT_IN_FILES: [&str; 3] = ["config", "help", "detach"];
/// Prefixes behind which a value is a path.
const PREFIXES: [&str; 3] = ["file:", "socket:", "unix:"];

/// The words that a file adds to the command line; `command` is `run`, and `given` what the command line says.
///
/// # Errors
/// A setting that there is not, or a value that makes no sense.
pub(super) fn words(
    configuration: &Configuration,
    command: &Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>, ConfigError> {
    let mut words = Vec::new();
    for setting in &configuration.settings {
        let wrong =
            |what| ConfigError::Line { file: configuration.file.clone(), line: setting.line, what };
        let argument = find(command, setting).map_err(wrong)?;
        let added = one(argument, setting, configuration).map_err(wrong)?;
        // Alone first, so that what is wrong with it is told with its line.
        let alone = std::iter::once(OsString::from("run")).chain(added.iter().cloned());
        command.clone().try_get_matches_from(alone).map_err(|error| {
            let text = error.to_string();
            let text = text.lines().next().unwrap_or_default();
            wrong(text.trim_start_matches("error: ").to_owned())
        })?;
        // The command line wins.
        if given.value_source(argument.get_id().as_str()) != Some(ValueSource::CommandLine) {
            words.extend(added);
        }
    }
    Ok(words)
}

/// The option that a setting names.
fn find<'a>(command: &'a Command, setting: &Setting) -> Result<&'a Arg, String> {
    let key = |argument: &'a Arg| argument.get_long().unwrap_or(argument.get_id().as_str());
    let known = || command.get_arguments().filter(|a| !NOT_IN_FILES.contains(&key(a)));
    let name = setting.name.replace('_', "-");
    known().find(|argument| key(argument) == name).ok_or_else(|| {
        let meant = nearest(&name, known().map(key));
        let meant = meant.map(|meant| format!("; was `{meant}` meant?")).unwrap_or_default();
        format!("unknown field `{}`{meant}", setting.name)
    })
}

/// A setting as words of a command line.
fn one(
    argument: &Arg,
    setting: &Setting,
    configuration: &Configuration,
) -> Result<Vec<OsString>, String> {
    let name = &setting.name;
    let switch = matches!(argument.get_action(), ArgAction::SetTrue);
    let many = matches!(argument.get_action(), ArgAction::Append);
    if !many && setting.values.len() != 1 {
        return Err(format!("`{name}` is one value, not a list"));
    }
    let mut words = Vec::new();
    for value in &setting.values {
        match (value, switch) {
            (Value::Flag(true), true) => {
                words.push(format!("--{}", argument.get_long().unwrap_or_default()).into());
            }
            (Value::Flag(false), true) => {}
            (Value::Flag(_), false) => return Err(format!("`{name}` is not a switch")),
            (Value::Text(_), true) => return Err(format!("`{name}` is a switch: true or false")),
            (Value::Text(text), false) => {
                let text = resolved(argument, text, configuration);
                match argument.get_long() {
                    Some(long) => words.push(format!("--{long}={text}").into()),
                    None if text.starts_with('-') => {
                        return Err(format!("`{name}` cannot begin with -"));
                    }
                    None => words.push(text.into()),
                }
            }
        }
    }
    Ok(words)
}

/// A value with its path made relative to the file that it is in, where it has one.
fn resolved(argument: &Arg, text: &str, configuration: &Configuration) -> String {
    let directory = configuration.file.parent().unwrap_or(Path::new(""));
    let is_path = argument.get_value_hint() == ValueHint::FilePath;
    if !is_path || configuration.format == Format::Xl || directory == Path::new("") || text == "-" {
        return text.to_owned();
    }
    let prefixes = || PREFIXES.iter().find(|prefix| text.starts_with(**prefix));
    let (prefix, rest) = match argument.get_id().as_str() {
        "console" | "gdb" => match prefixes() {
            Some(prefix) => text.split_at(prefix.len()),
            None => return text.to_owned(),
        },
        "json" if text.starts_with("fd:") => return text.to_owned(),
        _ => ("", text),
    };
    let (path, options) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
    let path: PathBuf = directory.join(path);
    format!("{prefix}{}{options}", path.display())
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;
    use crate::cli::options::RunArguments;
    use crate::config::parse;

    fn command() -> Command {
        RunArguments::augment_args(Command::new("run"))
    }

    fn run(file: &str, text: &str, line: &[&str]) -> Result<RunArguments, String> {
        let format = if file.ends_with(".toml") { Format::Toml } else { Format::Xl };
        let read = parse(Path::new(file), format, text).map_err(|error| error.to_string())?;
        let own = || std::iter::once("run").chain(line.iter().copied()).map(OsString::from);
        let given = command().get_matches_from(own());
        let added = words(&read, &command(), &given).map_err(|error| error.to_string())?;
        let all = own().take(1).chain(added).chain(own().skip(1));
        let matches = command().try_get_matches_from(all).map_err(|error| error.to_string())?;
        Ok(RunArguments::from_arg_matches(&matches).unwrap())
    }

    #[test]
    fn a_file_says_what_the_command_line_does_not() {
        let text = "image = 'k.elf'\nmemory = '64M'\ncpus = 2\nstat = true\nno-reboot = false\n\
                    disk = ['a.img,ro', { file = '/b.img', ro = true }]\npublish = ['8080:80']\n\
                    append = '-x y'\nconsole = ['stdio', 'file:log']\ntimeout = 1.5\non_crash = 'preserve'\n";
        let arguments = run("vm/guest.toml", text, &["--memory", "32M"]).unwrap();
        assert_eq!(arguments.image.as_deref(), Some(Path::new("vm/k.elf")));
        assert_eq!((arguments.memory, arguments.cpus, arguments.stat), (32, 2, true));
        let files: Vec<_> = arguments.disk.iter().map(|disk| disk.file.as_path()).collect();
        assert_eq!(files, [Path::new("vm/a.img"), Path::new("/b.img")]);
        assert_eq!(arguments.append, "-x y");
        assert_eq!(arguments.timeout.map(|time| time.as_millis()), Some(1500));
        let other = run("vm/guest.toml", text, &["other.elf", "--disk", "c.img"]).unwrap();
        assert_eq!(other.image.as_deref(), Some(Path::new("other.elf")));
        assert_eq!(other.disk.len(), 1, "the command line's disks replace the file's");
    }

    #[test]
    fn an_xl_configuration_is_a_command_line_too() {
        let text = "name='x'\nkernel='k'\nmemory=64\ndisk=['a,raw,xvda,ro']\nvif=['mac=00:16:3e:00:00:01']\non_reboot='destroy'";
        let arguments = run("vm/guest.cfg", text, &[]).unwrap();
        assert_eq!(arguments.image.as_deref(), Some(Path::new("k")));
        assert_eq!(arguments.name.as_deref(), Some("x"));
        assert_eq!(arguments.disk[0].file.as_path(), Path::new("a"));
        assert_eq!(arguments.net[0].mac, Some([0, 0x16, 0x3e, 0, 0, 1]));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_line_and_field() {
        for (text, line, part) in [
            ("image='k'\nmemry = 64\n", 2, "unknown field `memry`; was `memory` meant?"),
            ("config = 'x'", 1, "unknown field `config`"),
            ("\nmemory = 'lots'", 2, "'lots'"),
            ("memory = ['1M', '2M']", 1, "not a list"),
            ("stat = 'yes'", 1, "true or false"),
            ("memory = true", 1, "not a switch"),
            ("disk = 'a,colour=red'", 1, "colour"),
            ("image = '-x'", 1, "begin with -"),
        ] {
            let error = run("guest.toml", text, &[]).unwrap_err();
            let place = format!("guest.toml:{line}: ");
            assert!(error.starts_with(&place) && error.contains(part), "{text:?}: {error}");
        }
    }
}
