//! `cargo xtask test`: every check and every test, one after the other, until one fails.

use std::io::{BufRead, BufReader};
use std::ops::AddAssign;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cargo;

/// What cargo runs, in this order: what fails quickly comes first, the guests last.
const STEPS: [&str; 9] = [
    "fmt --all --check",
    "fmt --manifest-path tests/fuzz/Cargo.toml --check",
    "clippy --workspace --all-targets -- -D warnings",
    "test --workspace --exclude testbed --no-fail-fast",
    "xtask models",
    // Those of the full barriers; without a name, all of them.
    "xtask mutants fence",
    "xtask bench --check",
    "xtask fuzz",
    "test --package testbed --no-fail-fast",
];

/// Tests that cargo has told of.
#[derive(Debug, Default, PartialEq)]
struct Count {
    passed: u64,
    failed: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

pub(crate) fn run() -> Result<ExitCode> {
    for component in ["rustfmt", "clippy"] {
        let subcommand = if component == "rustfmt" { "fmt" } else { component };
        let there = cargo().args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        ensure!(
            there.is_ok_and(|status| status.success()),
            "{component} is not installed: `rustup component add {component}`"
        );
    }
    let mut total = Count::default();
    for step in STEPS {
        println!("\n==> cargo {step}");
        let (count, code) = run_step(step)?;
        total += count;
        if code != 0 {
            eprintln!("\nfailed: cargo {step}");
            println!("{} passed, {} failed", total.passed, total.failed);
            return Ok(ExitCode::from(code));
        }
    }
    ensure!(total.passed > 0, "cargo has run no test");
    println!("\n{} passed, {} failed", total.passed, total.failed);
    Ok(ExitCode::SUCCESS)
}

/// Runs one step, its output passed on; returns the tests it told of, and its exit code.
fn run_step(step: &str) -> Result<(Count, u8)> {
    let mut child = cargo()
        .args(step.split(' '))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run cargo {step}"))?;
    let mut count = Count::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.with_context(|| format!("cannot read what cargo {step} prints"))?;
            println!("{line}");
            count += test_result(&line).unwrap_or_default();
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for cargo {step}"))?;
    // Without a code it was killed by a signal.
    Ok((count, status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1))))
}

/// "test result: ok. 11 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s"
fn test_result(line: &str) -> Option<Count> {
    let (_verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| counts.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok());
    Some(Count { passed: number("passed")?, failed: number("failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_other_lines_are_not() {
        let line = "test result: FAILED. 11 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s";
        assert_eq!(test_result(line), Some(Count { passed: 11, failed: 2 }));
        assert_eq!(test_result("test tests::result ... ok"), None);
        assert_eq!(test_result("test result: odd"), None);
    }
}
