//! `cargo xtask guests`: every guest that QEMU can run uses our disk, and a table says which did.
//!
//! The guests are the tests of `tests/qemu`; those that take long are ignored by `cargo test`, and run here.

mod bench;

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use testbed::Progress;

use crate::cargo;

/// What a test prints before the reason why QEMU or the guest can't do what it is about.
const CANNOT_RUN: &str = "cannot run: ";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only the guests whose names contain one of these words.
    words: Vec<String>,
    /// Measure our disk beside QEMU's own in one guest instead, and write the table into docs/compatibility.md.
    #[arg(long, conflicts_with = "words")]
    bench: bool,
    /// How long each value of --bench is measured, in seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How many times each value of --bench is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.bench {
        if cfg!(debug_assertions) {
            return crate::run_optimised();
        }
        return bench::run(options.seconds, options.rounds).map(|()| ExitCode::SUCCESS);
    }
    let rows = run_guests(&options.words)?;
    ensure!(!rows.is_empty(), "no guest's name contains {}", options.words.join(" or "));
    println!("\n{}", table(&rows));
    let failed = rows.iter().any(|row| row.verdict == Verdict::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs the guests, one after the other, and passes on what they print.
fn run_guests(words: &[String]) -> Result<Vec<Row>> {
    let step = Progress::stderr().step("building the tests and the server");
    let tests = ["test", "--quiet", "--package", "testbed", "--test", "qemu"];
    let built = cargo().args(tests).arg("--no-run").status().context("cannot run cargo")?;
    ensure!(built.success(), "the tests can't be built");
    testbed::Server::build()?;
    step.done("done");

    let mut child = cargo()
        .args(tests)
        .args(["--", "--format", "pretty", "--include-ignored", "--nocapture", "--test-threads", "1"])
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo test")?;
    let mut listing = Listing::default();
    if let Some(mut stdout) = child.stdout.take() {
        // Not by lines: the name of a test is there minutes before the end of its line.
        let mut bytes = [0; 4096];
        let mut line = Vec::new();
        while let Ok(read @ 1..) = stdout.read(&mut bytes) {
            let bytes = bytes.get(..read).unwrap_or_default();
            std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush()).context("standard output")?;
            for byte in bytes {
                if *byte == b'\n' {
                    listing.line(&String::from_utf8_lossy(&line), Instant::now());
                    line.clear();
                } else {
                    line.push(*byte);
                }
            }
        }
    }
    child.wait().context("cannot wait for cargo test")?;
    Ok(listing.rows)
}

/// What became of a guest.
#[derive(Debug, PartialEq)]
enum Verdict {
    Passed,
    Failed,
    /// QEMU or the guest can't, for this reason.
    CannotRun(String),
}

#[derive(Debug, PartialEq)]
struct Row {
    guest: String,
    verdict: Verdict,
    took: Duration,
}

/// The rows of what a test program prints that runs one test at a time and captures nothing:
/// `test NAME ... `, then whatever the test prints, then the verdict and the end of the line.
#[derive(Debug)]
struct Listing {
    rows: Vec<Row>,
    /// The test that runs, and why it cannot.
    running: Option<(String, Option<String>)>,
    since: Instant,
}

impl Default for Listing {
    fn default() -> Self {
        Self { rows: Vec::new(), running: None, since: Instant::now() }
    }
}

impl Listing {
    fn line(&mut self, line: &str, now: Instant) {
        let started = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        let rest = match started {
            Some((guest, rest)) => {
                self.running = Some((guest.replace("::", ": ").replace('_', " "), None));
                rest
            }
            None if line.starts_with("running ") => {
                self.since = now;
                return;
            }
            None => line,
        };
        if let (Some(why), Some((_, reason))) = (rest.strip_prefix(CANNOT_RUN), self.running.as_mut()) {
            *reason = Some(why.to_owned());
        }
        if let "ok" | "FAILED" = rest
            && let Some((guest, reason)) = self.running.take()
        {
            let verdict = match (rest, reason) {
                ("ok", Some(why)) => Verdict::CannotRun(why),
                ("ok", None) => Verdict::Passed,
                _ => Verdict::Failed,
            };
            self.rows.push(Row { guest, verdict, took: now - self.since });
            self.since = now;
        }
    }
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.guest.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Row { guest, verdict, took } in rows {
        let verdict = match verdict {
            Verdict::Passed => "passed",
            Verdict::Failed => "FAILED",
            Verdict::CannotRun(why) => &format!("cannot run: {why}"),
        };
        let _ = writeln!(text, "{guest:width$}  {:>4} s  {verdict}", took.as_secs()); // a String takes all
    }
    let count = |wanted: fn(&Verdict) -> bool| rows.iter().filter(|row| wanted(&row.verdict)).count();
    let _ = write!(
        text,
        "{} passed, {} failed, {} cannot run",
        count(|verdict| *verdict == Verdict::Passed),
        count(|verdict| *verdict == Verdict::Failed),
        count(|verdict| matches!(verdict, Verdict::CannotRun(_))),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_told_from_what_tests_print() {
        let mut listing = Listing::default();
        let start = Instant::now();
        for (seconds, line) in [
            (0, "running 3 tests"),
            (5, "test linux::it_boots ... ok"),
            (7, "test hotplug::out ... cannot run: QEMU aborts"),
            (7, "ok"),
            (9, "test linux::it_fails ... some words"),
            (9, "ok then"),
            (12, "FAILED"),
            (12, "test result: FAILED. 2 passed; 1 failed"),
        ] {
            listing.line(line, start + Duration::from_secs(seconds));
        }
        let row = |guest: &str, verdict, seconds| Row {
            guest: guest.to_owned(),
            verdict,
            took: Duration::from_secs(seconds),
        };
        let expected = [
            row("linux: it boots", Verdict::Passed, 5),
            row("hotplug: out", Verdict::CannotRun("QEMU aborts".to_owned()), 2),
            row("linux: it fails", Verdict::Failed, 5),
        ];
        assert_eq!(listing.rows, expected);
        assert!(table(&listing.rows).ends_with("1 passed, 1 failed, 1 cannot run"));
    }
}
