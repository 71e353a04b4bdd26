//! `cargo xtask tidy`: the project's own rules, those that no compiler checks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::paths;

/// Longer files want splitting.
const MAX_LINES: usize = 700;
/// Which workspace crates a crate may use.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("drivers/proto", &[]),
    ("drivers/front", &["janus-proto"]),
    ("boot", &["janus-proto"]),
    ("kernel", &["janus-boot", "janus-proto", "janus-front"]),
    ("hypervisor-host", &["janus-proto"]),
];

/// A source file.
struct Source {
    /// Its path below the workspace.
    name: String,
    text: String,
}

/// Checks everything; answers what was found wrong, one line each.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn check() -> Result<Vec<String>> {
    let root = paths::root();
    let sources = sources(&root)?;
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| source.name.ends_with(".rs")) {
        rust_file(source, &mut found);
    }
    let architecture = read(&root, "ARCHITECTURE.md")?;
    ledger(&sources, &architecture, &mut found);
    abi(&sources, &mut found);
    for (member, allowed) in DEPENDENCIES {
        dependencies(&read(&root, &format!("{member}/Cargo.toml"))?, member, allowed, &mut found)?;
    }
    // The page's program is a crate of the tree, which is built and run as a test: they must not drift apart.
    let example = read(&root, "tests/hello/src/main.rs")?;
    if !read(&root, "docs/test-images.md")?.contains(example.trim_end()) {
        found.push(
            "docs/test-images.md: its program is not that of tests/hello/src/main.rs".to_owned(),
        );
    }
    for document in documents(&root)? {
        paths_exist(&root, &document, &mut found)?;
    }
    Ok(found)
}

/// All Rust and assembly files, sorted by name.
fn sources(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for top in ["boot", "drivers", "kernel", "hypervisor-host", "tests", "xtask"] {
        collect(root, &root.join(top), &mut sources)?;
    }
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(sources)
}

fn read(root: &Path, name: &str) -> Result<String> {
    std::fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"))
}

fn collect(root: &Path, directory: &Path, sources: &mut Vec<Source>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && name != "corpus" {
                collect(root, &path, sources)?;
            }
        } else if name.ends_with(".rs") || name.ends_with(".s") {
            let text = std::fs::read_to_string(&path)?;
            let name = path.strip_prefix(root)?.to_str().context("a file name that is not text")?;
            sources.push(Source { name: name.to_owned(), text });
        }
    }
    Ok(())
}

/// The rules for one file.
fn rust_file(source: &Source, found: &mut Vec<String>) {
    let Source { name, text } = source;
    let lines = text.lines().count();
    if lines > MAX_LINES {
        found.push(format!("{name}: {lines} lines; split it below {MAX_LINES}"));
    }
    let starts = text.lines().find(|line| !line.starts_with("#!")).unwrap_or_default();
    if !starts.starts_with("//!") {
        found.push(format!("{name}: begins without a //! header that says what it is for"));
    }
    // In two parts, so that this file does not find itself.
    for word in [concat!("to", "do!("), concat!("unimple", "mented!("), concat!("FIX", "ME")] {
        if text.contains(word) {
            found.push(format!("{name}: contains {word}"));
        }
    }
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    if opts_in(code) && !text.contains("// UNSAFETY:") {
        found.push(format!("{name}: opts in to unsafe code without a `// UNSAFETY:` comment"));
    }
}

/// Whether a file opts in to unsafe code.
fn opts_in(text: &str) -> bool {
    text.lines().any(|line| line.trim_start().starts_with("#![expect(unsafe_code"))
}

/// Whether a line opens the section of ARCHITECTURE.md that lists the modules with unsafe code.
fn opens_ledger(line: &str) -> bool {
    line.starts_with('#') && line.to_lowercase().contains("unsafe ledger")
}

/// What a module says of its opting in, in one line.
fn reason(text: &str) -> String {
    let mut lines = text.lines().skip_while(|line| !line.starts_with("// UNSAFETY:"));
    let first = lines.next().unwrap_or_default().trim_start_matches("// UNSAFETY:").trim();
    let more = lines.map_while(|line| line.strip_prefix("// ")).map(str::trim);
    let all: Vec<&str> = std::iter::once(first).chain(more).collect();
    all.join(" ").trim_end_matches('.').to_owned()
}

/// The ledger as the tree has it: path and reason.
fn actual_ledger(sources: &[Source]) -> BTreeMap<&str, String> {
    sources
        .iter()
        .filter(|source| source.name.ends_with(".rs") && opts_in(&source.text))
        .map(|source| (source.name.as_str(), reason(&source.text)))
        .collect()
}

/// The list of unsafe modules in ARCHITECTURE.md is the tree's: one `- `path`: why` each, under "Unsafe ledger".
fn ledger(sources: &[Source], architecture: &str, found: &mut Vec<String>) {
    let listed: BTreeSet<&str> = architecture
        .lines()
        .skip_while(|line| !opens_ledger(line))
        .skip(1)
        .take_while(|line| !line.starts_with('#'))
        .filter_map(|line| line.trim().strip_prefix("- `")?.split('`').next())
        .collect();
    let actual = actual_ledger(sources);
    for name in actual.keys().filter(|name| !listed.contains(*name)) {
        found.push(format!(
            "ARCHITECTURE.md: the unsafe ledger lacks `{name}` (cargo xtask tidy --fix)"
        ));
    }
    for name in listed.iter().filter(|name| !actual.contains_key(*name)) {
        found.push(format!(
            "ARCHITECTURE.md: the unsafe ledger lists `{name}`, which has no unsafe code (cargo xtask tidy --fix)"
        ));
    }
}

/// ARCHITECTURE.md with the list in its section "Unsafe ledger" (made at the end if there is none) as the tree has it.
fn with_ledger(architecture: &str, ledger: &BTreeMap<&str, String>) -> String {
    let mut text = String::new();
    let mut lines = architecture.lines().peekable();
    for line in lines.by_ref() {
        text.push_str(line);
        text.push('\n');
        if opens_ledger(line) {
            break;
        }
    }
    if !text.lines().last().is_some_and(opens_ledger) {
        text.push_str("\n## Unsafe ledger\n");
    }
    // What is said before the list stays.
    while let Some(line) = lines.next_if(|line| !line.starts_with("- ") && !line.starts_with('#')) {
        text.push_str(line);
        text.push('\n');
    }
    while lines.next_if(|line| line.starts_with("- ")).is_some() {}
    if !text.ends_with("\n\n") {
        text.push('\n');
    }
    for (name, reason) in ledger {
        text.push_str(&format!("- `{name}`: {reason}\n"));
    }
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Writes the unsafe ledger of ARCHITECTURE.md from the tree.
///
/// # Errors
/// A file cannot be read or written.
pub(crate) fn fix() -> Result<()> {
    let root = paths::root();
    let sources = sources(&root)?;
    let fixed = with_ledger(&read(&root, "ARCHITECTURE.md")?, &actual_ledger(&sources));
    std::fs::write(root.join("ARCHITECTURE.md"), fixed)?;
    Ok(())
}

/// Structures of the ABI are `repr(C)` (or transparent), and never use types whose size the machine chooses.
fn abi(sources: &[Source], found: &mut Vec<String>) {
    for source in sources.iter().filter(|source| source.name.starts_with("drivers/proto/src/abi/"))
    {
        let code = source.text.split("#[cfg(test)]").next().unwrap_or_default();
        let mut attributes = String::new();
        let mut in_struct = false;
        for (number, line) in code.lines().enumerate() {
            let place = format!("{}:{}", source.name, number + 1);
            // What is indented stands in a macro (`bitflags!`, `open_enum!`), which sees to its repr itself.
            let is_item = !line.starts_with(' ');
            let line = line.trim();
            if line.starts_with("#[") {
                attributes.push_str(line);
            } else if is_item && line.starts_with("pub struct ") {
                if !attributes.contains("repr(") {
                    found.push(format!("{place}: a structure of the ABI without repr"));
                }
                in_struct = line.ends_with('{');
                attributes.clear();
            } else if line.starts_with('}') {
                in_struct = false;
            } else if in_struct
                && line.starts_with("pub ")
                && (line.contains("usize") || line.contains(": bool"))
            {
                found.push(format!("{place}: a field of the ABI is usize or bool"));
            } else if !line.starts_with("//") && !line.is_empty() && !line.starts_with(')') {
                attributes.clear();
            }
        }
    }
}

/// The crates of this workspace that `manifest` uses are among `allowed`; dev-dependencies are free.
fn dependencies(
    manifest: &str,
    member: &str,
    allowed: &[&str],
    found: &mut Vec<String>,
) -> Result<()> {
    let manifest: BTreeMap<String, toml::Value> = toml::from_str(manifest)?;
    let used = manifest.get("dependencies").and_then(toml::Value::as_table);
    for name in used.into_iter().flat_map(toml::Table::keys) {
        if name.starts_with("janus") && !allowed.contains(&name.as_str()) {
            found.push(format!("{member}/Cargo.toml: must not depend on {name}"));
        }
    }
    Ok(())
}

fn documents(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root.join(name)).to_vec();
    if let Ok(entries) = std::fs::read_dir(root.join("docs")) {
        for entry in entries {
            files.push(entry?.path());
        }
    }
    Ok(files
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "md"))
        .collect())
}

/// What a document names in backquotes and looks like a path of this tree is one.
fn paths_exist(root: &Path, document: &Path, found: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(document)?;
    let name = document.strip_prefix(root)?.display();
    let mut fenced = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if fenced {
            continue;
        }
        for quoted in line.split('`').skip(1).step_by(2) {
            let tops = [
                "boot/",
                "drivers/",
                "kernel/",
                "hypervisor-host/",
                "tests/",
                "xtask/",
                "docs/",
                ".ci/",
                ".github/",
            ];
            let is_path = tops.iter().any(|top| quoted.starts_with(top))
                && !quoted.contains(['*', '{', ' ', '<', '$'])
                && !quoted.contains("..");
            if is_path && !root.join(quoted.split(':').next().unwrap_or_default()).exists() {
                found.push(format!("{name}:{}: `{quoted}` does not exist", number + 1));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, text: &str) -> Source {
        Source { name: name.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn a_file_without_a_header_or_with_unexplained_unsafe_is_found() {
        let mut found = Vec::new();
        rust_file(&source("a.rs", "use x;\n"), &mut found);
        rust_file(&source("b.rs", "//! B.\n#![expect(unsafe_code, reason = \"x\")]\n"), &mut found);
        rust_file(&source("c.rs", "#![no_std]\n//! C.\n"), &mut found);
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn the_ledger_and_the_tree_must_agree_both_ways() {
        let unsafe_file = source("k/a.rs", "//! A.\n#![expect(unsafe_code)]\n");
        let mut found = Vec::new();
        ledger(
            &[unsafe_file],
            "## Unsafe ledger\n- `k/b.rs`: gone\n## Next\n- `k/a.rs`\n",
            &mut found,
        );
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn the_ledger_is_written_from_the_tree_and_nothing_else_changes() {
        let files =
            [source("k/a.rs", "//! A.\n// UNSAFETY: pokes\n// ports.\n#![expect(unsafe_code)]\n")];
        let before =
            "# A\ntext\n## Unsafe ledger\n\nWords.\n\n- `k/b.rs`: gone\n\n## Next\n- more\n";
        let after = with_ledger(before, &actual_ledger(&files));
        assert_eq!(
            after,
            "# A\ntext\n## Unsafe ledger\n\nWords.\n\n- `k/a.rs`: pokes ports\n\n## Next\n- more\n"
        );
        assert_eq!(with_ledger(&after, &actual_ledger(&files)), after);
        let made = with_ledger("# A\n", &actual_ledger(&files));
        assert_eq!(made, "# A\n\n## Unsafe ledger\n\n- `k/a.rs`: pokes ports\n");
    }

    #[test]
    fn the_abi_has_no_machine_sized_fields() {
        let text = "//! X.\n#[repr(C)]\npub struct A {\n    pub x: usize,\n}\n#[derive(Debug)]\npub struct B {\n    pub y: u32,\n}\n";
        let mut found = Vec::new();
        abi(&[source("drivers/proto/src/abi/x.rs", text)], &mut found);
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn the_dependency_rule_is_kept() {
        let mut found = Vec::new();
        let manifest = "[dependencies]\njanus-kernel.workspace = true\njanus-proto.workspace = true\n[dev-dependencies]\njanus-front.workspace = true\n";
        dependencies(manifest, "hypervisor-host", &["janus-proto"], &mut found).unwrap();
        assert_eq!(found, ["hypervisor-host/Cargo.toml: must not depend on janus-kernel"]);
    }
}
