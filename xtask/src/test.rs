//! `cargo xtask test`: every check and every test, one after the other, until one fails.

use std::io::{BufRead, BufReader};
use std::ops::AddAssign;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cargo;

/// What cargo runs, in this order: what fails quickly comes first, the guests last. `PSK` stands for the feature that brings pre-shared
/// keys; what has no such word is built as it is by default.
const STEPS: [&str; 9] = [
    "fmt --all --check",
    "fmt --manifest-path tests/fuzz/Cargo.toml --check",
    "clippy --workspace --all-targets --features vfio-user-blk/PSK,testbed/PSK -- -D warnings",
    "test --workspace --exclude testbed --no-fail-fast --features vfio-user-blk/PSK",
    "xtask models",
    // The mildest of the full barriers: whoever sees these sees what is weaker yet. Without a name, all of them.
    "xtask mutants AcqRel",
    "xtask bench --check",
    "xtask fuzz",
    "test --package testbed --no-fail-fast --features testbed/PSK",
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
    let psk = psk();
    if psk.is_none() {
        println!("{WITHOUT_KEYS}");
    }
    let mut total = Count::default();
    for step in STEPS {
        let step = &with_feature(step, psk);
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
    if psk.is_none() {
        println!("\n{WITHOUT_KEYS}");
    }
    println!("\n{} passed, {} failed", total.passed, total.failed);
    Ok(ExitCode::SUCCESS)
}

const WITHOUT_KEYS: &str = "left out: pre-shared keys of TLS, which need libssl-dev and pkg-config, or perl and make";

/// The feature that this machine can build pre-shared keys by: by its own OpenSSL, which takes seconds, or by one that is built
/// along, which takes minutes.
fn psk() -> Option<&'static str> {
    let works = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if works("pkg-config", &["--atleast-version=1.1.1", "openssl"]) {
        return Some("psk");
    }
    // What OpenSSL's Configure uses, and Debian's smallest perl lacks.
    let perl = works("perl", &["-MIPC::Cmd", "-MFindBin", "-MFile::Compare", "-MFile::Copy", "-e", "1"]);
    (perl && works("make", &["--version"])).then_some("psk-vendored")
}

/// A step with the feature that `PSK` stands for, or without the words that say so.
fn with_feature(step: &str, psk: Option<&str>) -> String {
    let Some(feature) = psk else {
        let words: Vec<_> = step.split(' ').filter(|word| *word != "--features" && !word.contains("PSK")).collect();
        return words.join(" ");
    };
    step.replace("PSK", feature)
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
    fn a_machine_without_openssl_tests_the_rest() {
        let step = "clippy --all-targets --features vfio-user-blk/PSK,testbed/PSK -- -D warnings";
        let vendored = "clippy --all-targets --features vfio-user-blk/psk-vendored,testbed/psk-vendored -- -D warnings";
        assert_eq!(with_feature(step, Some("psk-vendored")), vendored);
        assert_eq!(with_feature(step, None), "clippy --all-targets -- -D warnings");
        assert_eq!(with_feature("xtask fuzz", None), "xtask fuzz");
    }

    #[test]
    fn results_are_counted_and_other_lines_are_not() {
        let line = "test result: FAILED. 11 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s";
        assert_eq!(test_result(line), Some(Count { passed: 11, failed: 2 }));
        assert_eq!(test_result("test tests::result ... ok"), None);
        assert_eq!(test_result("test result: odd"), None);
    }
}
