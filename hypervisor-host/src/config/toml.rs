//! TOML: the names of the command line's options as keys.
//!
//! A list sets an option several times. A table is one value: its `file`, `kind` or first word, then the rest as
//! `key=value`, or only the key of a `true`; so `{ file = "a.img", ro = true, vdev = "hda" }` is `a.img,ro,vdev=hda`.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Setting, Value, Wrong};

/// Keys of a table whose value comes first, without the key.
const FIRST: [&str; 2] = ["file", "kind"];

fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.as_bytes().get(..span.start).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// The options that a text sets.
pub(super) fn read(text: &str) -> Result<Vec<Setting>, Wrong> {
    let document = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, &span));
        (line, format!("this is not TOML: {}", error.message()))
    })?;
    let mut settings = Vec::new();
    for (key, value) in document.get_ref() {
        let line = line_of(text, &key.span());
        let values = match value.get_ref() {
            DeValue::Array(list) => {
                let one = |value: &Spanned<DeValue<'_>>| {
                    let line = line_of(text, &value.span());
                    scalar(value.get_ref()).map_err(|what| (line, what))
                };
                list.iter().map(one).collect::<Result<_, Wrong>>()?
            }
            value => {
                vec![scalar(value).map_err(|what| (line, format!("`{}`: {what}", key.get_ref())))?]
            }
        };
        settings.push(Setting { name: key.get_ref().clone().into_owned(), values, line });
    }
    settings.sort_by_key(|setting| setting.line);
    Ok(settings)
}

fn scalar(value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::Text(text.clone().into_owned()),
        DeValue::Integer(number) if number.radix() == 10 => Value::Text(number.as_str().to_owned()),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix());
            Value::Text(number.map_err(|_| "a number that large has no meaning here")?.to_string())
        }
        DeValue::Float(number) => Value::Text(number.as_str().to_owned()),
        DeValue::Boolean(on) => Value::Flag(*on),
        DeValue::Table(table) => Value::Text(words(table)?),
        DeValue::Array(_) => return Err("a list in a list has no meaning here".into()),
        DeValue::Datetime(_) => return Err("a date has no meaning here".into()),
    })
}

/// A table as the words that the command line would have.
fn words(table: &DeTable<'_>) -> Result<String, String> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| (!FIRST.contains(&key.get_ref().as_ref()), key.span().start));
    let mut words = Vec::new();
    for (key, value) in entries {
        let key = key.get_ref();
        match scalar(value.get_ref())? {
            Value::Flag(true) => words.push(key.to_string()),
            Value::Flag(false) => {}
            Value::Text(text) if text.contains(',') => {
                return Err(format!("`{key}`: a comma cannot be part of `{text}`"));
            }
            Value::Text(text) if FIRST.contains(&key.as_ref()) => words.push(text),
            Value::Text(text) => words.push(format!("{key}={text}")),
        }
    }
    Ok(words.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.into())
    }

    #[test]
    fn keys_are_options_and_lists_repeat_them() {
        let settings = read(
            "# a guest\nimage = 'k.elf'\nmemory = 64\nstat = true\n\ndisk = [\n  'a,ro',\n  { vdev = 'hda', ro = true, snapshot = false, file = 'b' },\n]\ncpus = 0x2\n",
        )
        .unwrap();
        let expected = [
            ("image", vec![text("k.elf")], 2),
            ("memory", vec![text("64")], 3),
            ("stat", vec![Value::Flag(true)], 4),
            ("disk", vec![text("a,ro"), text("b,vdev=hda,ro")], 6),
            ("cpus", vec![text("2")], 10),
        ];
        let found: Vec<_> =
            settings.iter().map(|s| (s.name.as_str(), s.values.clone(), s.line)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_list_of_tables_repeats_an_option() {
        let settings = read("[[disk]]\nfile = 'a'\n\n[[disk]]\nfile = 'b'\nro = true\n").unwrap();
        assert_eq!(settings.len(), 1);
        assert_eq!(settings[0].values, [text("a"), text("b,ro")]);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (wrong, line, part) in [
            ("a = 1\nb = \n", 2, "not TOML"),
            ("a = 1\na = 2\n", 2, "not TOML"),
            ("a = [1,\n [2]]\n", 2, "list in a list"),
            ("\nwhen = 2020-01-01\n", 2, "date"),
            ("disk = { file = 'a,b' }", 1, "comma"),
        ] {
            let (at, what) = read(wrong).unwrap_err();
            assert!(at == line && what.contains(part), "{wrong:?}: {at}: {what}");
        }
    }
}
