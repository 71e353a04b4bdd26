//! The shell as a user meets it: lines in, text and a status out.

use alloc::string::String;
use alloc::vec::Vec;

use super::*;
use crate::task::block_on;

fn run(line: &str) -> (Status, String) {
    let mut output = Vec::new();
    let status = block_on(Session::new(&mut output).run_line(line));
    (status, String::from_utf8(output).unwrap())
}

#[test]
fn an_unknown_command_has_a_message_and_status_127() {
    let (status, text) = run("frobnicate now");
    assert_eq!(status, Status::UNKNOWN);
    assert_eq!(text, "frobnicate: unknown command; `help` lists them\n");
}

#[test]
fn wrong_arguments_print_the_usage() {
    let (status, text) = run("sleep long");
    assert_eq!((status, text.as_str()), (Status::USAGE, "usage: sleep SECONDS\n"));
}

#[test]
fn a_failure_in_the_middle_is_the_status_of_the_line() {
    let (status, text) = run("echo one; nonsense; echo 'two; three'");
    assert_eq!(status, Status::UNKNOWN);
    assert!(text.starts_with("one\n") && text.ends_with("two; three\n"), "{text}");
    assert_eq!(run("echo 'open").0, Status::USAGE);
    assert_eq!(run("").0, Status::SUCCESS);
}

#[test]
fn help_knows_every_command_and_no_name_twice() {
    let (status, text) = run("help");
    assert_eq!(status, Status::SUCCESS);
    let mut names: Vec<&str> =
        TABLE.iter().flat_map(|group| group.iter()).map(|c| c.name).collect();
    for name in &names {
        assert!(text.contains(&format!("  {name} ")), "{name}");
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), TABLE.iter().map(|group| group.len()).sum::<usize>());
}

#[test]
fn files_that_are_not_there_are_failures() {
    for line in [
        "cat /nothing",
        "sha256sum /nothing",
        "ls /nothing",
        "block read nodisk 0 1",
        "block hash nodisk",
    ] {
        let (status, text) = run(line);
        assert_eq!(status, Status::FAILURE, "{line}: {text}");
        assert!(
            text.contains("nothing: no such file") || text.contains("no disk nodisk"),
            "{text}"
        );
    }
}

#[test]
fn completion_offers_commands_first_and_paths_after() {
    assert_eq!(block_on(complete("sha")), ["sha256sum"]);
    assert_eq!(block_on(complete("echo x; upt")), ["uptime"]);
    assert!(block_on(complete("cat /no")).is_empty());
}

#[test]
fn xen_commands_say_that_there_is_no_xen_here() {
    for line in ["grants", "xenstore ls", "xenstore read domid"] {
        let (status, text) = run(line);
        assert_eq!(status, Status::FAILURE, "{line}");
        assert!(text.contains("there is no"), "{text}");
    }
}
