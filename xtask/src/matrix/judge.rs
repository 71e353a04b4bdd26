//! Judging a run: what the console holds, and the code the guest ended with.

use crate::console;
use crate::results::Outcome;

use super::data::{Case, Ending};

/// What is known of a run that has ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    /// Everything on the guest's console.
    pub(crate) console: String,
    /// The exit code, by the machine's own way.
    pub(crate) code: Option<u8>,
    /// What the hypervisor was told at the end, if it was told anything.
    pub(crate) ending: Option<Ending>,
    /// Why it did not go as planned (a step that failed, a time limit).
    pub(crate) trouble: Option<String>,
    /// The test killed the machine on purpose.
    pub(crate) killed: bool,
    /// The loader refused the image.
    pub(crate) refused: bool,
}

/// The exit code of the guest's last report line: `janus-report: {"exit":N}`.
pub(crate) fn reported_exit(console: &str) -> Option<u8> {
    reports(console).filter_map(|report| u8::try_from(report.get("exit")?.as_u64()?).ok()).last()
}

/// The objects of the report lines.
pub(crate) fn reports(console: &str) -> impl Iterator<Item = serde_json::Value> {
    console.lines().filter_map(|line| {
        let at = line.find("janus-report: ")?;
        serde_json::from_str(line.get(at + "janus-report: ".len()..)?.trim()).ok()
    })
}

/// Whether `run` is what `case` asks for, and if not, why; `expect` has its placeholders filled in.
pub(crate) fn judge(case: &Case, expect: &[String], run: &Run) -> (Outcome, String) {
    let last = console::tail(&run.console, 25);
    if let Some(trouble) = &run.trouble {
        return (Outcome::Failure, format!("{trouble}; last lines:{last}"));
    }
    if let Some(missing) = expect.iter().find(|text| !run.console.contains(text.as_str())) {
        // A test's own words say more than the absence of "success".
        let said = reports(&run.console)
            .filter_map(|report| {
                let outcome = report.get("outcome")?.as_str()?.to_owned();
                (outcome != "success").then(|| {
                    format!(
                        "{outcome}: {}",
                        report.get("detail").and_then(|d| d.as_str()).unwrap_or_default()
                    )
                })
            })
            .last();
        let outcome = run.code.map_or(Outcome::Failure, Outcome::from_code).max(Outcome::Failure);
        let what = said.unwrap_or_else(|| format!("the console does not hold {missing:?}"));
        return (outcome, format!("{what}; last lines:{last}"));
    }
    if let Some(found) = case.reject.iter().find(|text| run.console.contains(text.as_str())) {
        return (Outcome::Failure, format!("the console holds {found:?}; last lines:{last}"));
    }
    if run.refused != case.refused {
        let what = if run.refused {
            "the loader refused the image"
        } else {
            "the loader did not refuse the image"
        };
        return (Outcome::Failure, format!("{what}; last lines:{last}"));
    }
    if run.killed || run.refused {
        return (Outcome::Success, String::new());
    }
    let reported = reported_exit(&run.console);
    if let (Some(code), Some(reported)) = (run.code, reported)
        && code.min(15) != reported.min(15)
    {
        let what =
            format!("the machine's code is {code}, the reported one {reported}; last lines:{last}");
        return (Outcome::Failure, what);
    }
    if let Some(wanted) = case.ending
        && run.ending != Some(wanted)
    {
        let what = format!("ended by {:?}, not {wanted:?}; last lines:{last}", run.ending);
        return (Outcome::Failure, what);
    }
    // A machine also ends with 0 when its CPU gave up: only the guest's own word counts as success.
    match reported.or(run.code.filter(|code| *code != 0)) {
        Some(code) if code == case.status => (Outcome::Success, String::new()),
        Some(code) => {
            let outcome = Outcome::from_code(code).max(Outcome::Failure);
            (outcome, format!("ended with code {code}, not {}; last lines:{last}", case.status))
        }
        None => (Outcome::Crash, format!("ended without a code; last lines:{last}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(text: &str) -> Case {
        toml::from_str(&format!("name = 'n'\nrows = []\n{text}")).unwrap()
    }

    fn run(console: &str, code: Option<u8>) -> Run {
        Run { console: console.to_owned(), code, ..Run::default() }
    }

    #[test]
    fn an_end_without_a_word_is_no_success() {
        let silent = run("janus: entered by PVH\n", Some(0));
        assert_eq!(judge(&case(""), &[], &silent).0, Outcome::Crash);
        let said = run("janus-report: {\"exit\":0}\n", Some(0));
        assert_eq!(judge(&case(""), &[], &said).0, Outcome::Success);
    }

    #[test]
    fn an_end_is_the_one_that_was_asked_for() {
        let mut ended = run("janus-report: {\"exit\":0}\n", Some(0));
        ended.ending = Some(Ending::PowerOff);
        assert_eq!(judge(&case("ending = 'reboot'"), &[], &ended).0, Outcome::Failure);
        ended.ending = Some(Ending::Reboot);
        assert_eq!(judge(&case("ending = 'reboot'"), &[], &ended).0, Outcome::Success);
    }

    #[test]
    fn a_run_is_judged_by_its_text_and_its_code() {
        let wanted = case("status = 5\nreject = ['panic']");
        let expect = ["hello".to_owned()];
        assert_eq!(judge(&wanted, &expect, &run("hello\n", Some(5))).0, Outcome::Success);
        assert_eq!(judge(&wanted, &expect, &run("hello\n", Some(4))).0, Outcome::Failure);
        assert_eq!(judge(&wanted, &expect, &run("nothing\n", Some(5))).0, Outcome::Failure);
        assert_eq!(judge(&wanted, &expect, &run("hello panic\n", Some(5))).0, Outcome::Failure);
        assert_eq!(judge(&wanted, &expect, &run("hello\n", None)).0, Outcome::Crash);
    }

    #[test]
    fn the_guests_own_report_stands_in_for_a_code() {
        let console = "x\njanus-report: {\"exit\":4}\njanus-report: {broken\n";
        assert_eq!(reported_exit(console), Some(4));
        assert_eq!(judge(&case("status = 4"), &[], &run(console, None)).0, Outcome::Success);
    }

    #[test]
    fn a_large_code_is_cut_off_by_the_machine_but_not_in_the_report() {
        let console = "janus-report: {\"exit\":127}\n";
        assert_eq!(judge(&case("status = 127"), &[], &run(console, Some(15))).0, Outcome::Success);
        assert_eq!(judge(&case("status = 127"), &[], &run(console, Some(5))).0, Outcome::Failure);
    }

    #[test]
    fn a_failed_tests_own_words_are_told() {
        let console = "janus-report: {\"test\":\"a\",\"outcome\":\"failure\",\"detail\":\"2 is not 3\",\"ns\":1}\n";
        let (outcome, detail) = judge(&case(""), &["success".into()], &run(console, Some(5)));
        assert_eq!(outcome, Outcome::Failure);
        assert!(detail.starts_with("failure: 2 is not 3"), "{detail}");
    }
}
