//! `cargo xtask fuzz`: the targets of tests/fuzz under libFuzzer, each for a while.
//!
//! The targets are laid out as cargo-fuzz wants them, and it can run them too. All that is needed of it here is a handful of
//! flags, so that nobody has to install it.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use testbed::Progress;

use crate::models::{target, workspace};

/// How long each target runs unless it is said.
const SHORT: Duration = Duration::from_secs(8);
/// How the targets are compiled: counters at every edge, the comparisons made known to the fuzzer, AddressSanitizer.
const RUSTFLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cforce-frame-pointers -Cpasses=sancov-module \
     -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Lines of a target that failed which are shown, and characters of each.
const SHOWN: usize = 60;
const WIDTH: usize = 200;

/// What runs.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Minutes for each target [default: 8 seconds, as CI does]; what they learn is kept for the next time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    minutes: Option<u32>,

    /// This target alone
    #[arg(long, value_name = "TARGET", value_parser = TARGETS.map(|target| target.name))]
    only: Option<String>,

    /// Run the target on this input, and on nothing else
    #[arg(long, value_name = "FILE", requires = "only")]
    input: Option<PathBuf>,
}

/// A fuzz target.
struct Target {
    name: &'static str,
    /// What libFuzzer is told besides.
    arguments: &'static [&'static str],
}

const TARGETS: [Target; 6] = [
    Target { name: "codec", arguments: &["-max_len=1024"] },
    Target { name: "config", arguments: &["-max_len=1024", "-dict=tests/fuzz/config.dict"] },
    Target { name: "request", arguments: &["-max_len=128"] },
    Target { name: "chain", arguments: &["-max_len=512"] },
    Target { name: "nbd", arguments: &["-max_len=512"] },
    // The server's threads keep what they have: what looks like a leak to the sanitizer is none. The target counts itself.
    Target { name: "session", arguments: &["-max_len=400", "-detect_leaks=0"] },
];

/// What came of a target.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    executions: u64,
    /// Edges of the program that were taken.
    coverage: u64,
    /// The input that it failed on.
    find: Option<PathBuf>,
    failed: bool,
    last: VecDeque<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    let progress = Progress::stderr();
    toolchain(&progress)?;
    let targets = TARGETS.iter().filter(|target| options.only.as_ref().is_none_or(|only| only == target.name));
    let targets: Vec<&Target> = targets.collect();
    let binaries = build(&targets, &progress)?;
    let time = options.minutes.map_or(SHORT, |minutes| Duration::from_secs(60 * u64::from(minutes)));
    let mut failed = 0;
    for target in &targets {
        let outcome = target.run(&binaries, time, options, &progress)?;
        let verdict = if outcome.failed { "FAILED" } else { "nothing found" };
        println!(
            "{:<8} {:>9} executions, {:>5} edges covered, {verdict}",
            target.name, outcome.executions, outcome.coverage
        );
        if outcome.failed {
            failed += 1;
            for line in &outcome.last {
                println!("    {line}");
            }
            if let Some(find) = &outcome.find {
                println!("see it again: cargo xtask fuzz --only {} --input {}", target.name, find.display());
            }
        }
    }
    let (passed, verdict) = (targets.len() - failed, if failed == 0 { "ok" } else { "FAILED" });
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in \
         {:.2}s",
        start.elapsed().as_secs_f64()
    );
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A tool of the nightly toolchain.
fn nightly(tool: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", tool]);
    command
}

/// Installs the nightly toolchain if it is not there: coverage and sanitizers are in no other.
fn toolchain(progress: &Progress) -> Result<()> {
    const INSTALL: [&str; 5] = ["toolchain", "install", "nightly", "--profile", "minimal"];
    if nightly("rustc").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    let step = progress.step("installing a nightly toolchain");
    let how = format!("`rustup {}` has to work (https://rustup.rs)", INSTALL.join(" "));
    let output = Command::new("rustup").args(INSTALL).output();
    let output =
        output.with_context(|| format!("cannot run rustup; the fuzz targets need a nightly toolchain: {how}"))?;
    ensure!(
        output.status.success(),
        "the fuzz targets need a nightly toolchain, which cannot be installed: {how}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    step.done("done");
    Ok(())
}

/// Compiles the targets; gives the folder of their executables.
fn build(targets: &[&Target], progress: &Progress) -> Result<PathBuf> {
    let step = progress.step("compiling the fuzz targets");
    let start = Instant::now();
    let (dir, triple) = (target().join("fuzz/build"), format!("{}-unknown-linux-gnu", std::env::consts::ARCH));
    let mut command = nightly("cargo");
    command.current_dir(workspace()).args(["build", "--release", "--manifest-path", "tests/fuzz/Cargo.toml"]);
    command.arg("--target-dir").arg(&dir).args(["--target", &triple]);
    for target in targets {
        command.args(["--bin", target.name]);
    }
    command.env("RUSTFLAGS", RUSTFLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS");
    let output = command.output().context("cannot run rustup")?;
    ensure!(output.status.success(), "the fuzz targets do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    step.done(&format!("{:.0} s", start.elapsed().as_secs_f64()));
    Ok(dir.join(triple).join("release"))
}

impl Target {
    fn run(&self, binaries: &Path, time: Duration, options: &Options, progress: &Progress) -> Result<Outcome> {
        let temporary = tempfile::tempdir().context("cannot make a folder")?;
        let mut command = Command::new(binaries.join(self.name));
        command.current_dir(workspace()).env("TMPDIR", temporary.path());
        // An input that takes longer hangs, however busy the machine is; no target needs much memory.
        command.args(["-timeout=150", "-report_slow_units=150", "-rss_limit_mb=2048", "-print_final_stats=1"]);
        command.args(self.arguments);
        let finds = target().join("fuzz/finds").join(self.name);
        command.arg(format!("-artifact_prefix={}/", folder(&finds)?.display()));
        if let Some(input) = &options.input {
            command.arg(std::path::absolute(input).context("cannot find the input")?);
        } else {
            // What was learned in a long run is worth keeping; a short one does the same each time.
            let learned = if options.minutes.is_some() {
                target().join("fuzz/corpus").join(self.name)
            } else {
                temporary.path().join("corpus")
            };
            command.arg(format!("-max_total_time={}", time.as_secs()));
            command.arg(folder(&learned)?).arg(Path::new("tests/fuzz/corpus").join(self.name));
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", self.name))?;
        let step = progress.step(format!("fuzzing {}", self.name));
        let start = Instant::now();
        let mut outcome = Outcome::default();
        if let Some(stderr) = child.stderr.take() {
            for line in BufReader::new(stderr).split(b'\n') {
                let line = line.with_context(|| format!("cannot read what {} prints", self.name))?;
                outcome.read(String::from_utf8_lossy(&line).trim_end());
                step.advance(start.elapsed().min(time).as_secs(), time.as_secs());
                step.note(&format!("{} executions, {} edges", outcome.executions, outcome.coverage));
            }
        }
        let status = child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        outcome.failed = !status.success();
        if !outcome.failed {
            if options.input.is_none() && outcome.executions == 0 {
                bail!("{} has executed nothing", self.name);
            }
            step.done("done");
        }
        Ok(outcome)
    }
}

impl Outcome {
    /// A line of libFuzzer's:
    ///
    ///     #4096 NEW    cov: 1513 ft: 4504 corp: 294/3959b lim: 33 exec/s: 2006 rss: 340Mb L: 11/33 MS: 1 ChangeBit-
    fn read(&mut self, line: &str) {
        if self.last.len() == SHOWN {
            // A panic is at the front, the name of the input at the end.
            self.last.remove(SHOWN / 2);
        }
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some(executions) = first.strip_prefix('#').and_then(|count| count.parse().ok()) {
            self.executions = executions;
            if words.any(|word| word == "cov:") {
                self.coverage = words.next().and_then(|count| count.parse().ok()).unwrap_or(self.coverage);
            }
            return;
        }
        if let Some(executions) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = executions.trim().parse().unwrap_or(self.executions);
        }
        if let Some((_, file)) = line.split_once("Test unit written to ") {
            self.find = Some(file.into());
        }
        if !line.is_empty() && !line.starts_with("INFO:") {
            self.last.push_back(line.chars().take(WIDTH).collect());
        }
    }
}

fn folder(path: &Path) -> Result<&Path> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_prints_is_understood() {
        let mut outcome = Outcome::default();
        for line in [
            "INFO: Seed: 1",
            "#41\tINITED cov: 5997 ft: 14434 corp: 40/1576b exec/s: 0 rss: 72Mb",
            "#4096\tpulse  cov: 6001 ft: 14440 corp: 41/1600b lim: 205 exec/s: 100 rss: 72Mb",
            "thread '<unnamed>' panicked at codec.rs:1:1:",
            "artifact_prefix='finds/'; Test unit written to finds/crash-0a",
            "stat::number_of_executed_units: 4100",
        ] {
            outcome.read(line);
        }
        assert_eq!((outcome.executions, outcome.coverage), (4100, 6001));
        assert_eq!(outcome.find, Some("finds/crash-0a".into()));
        assert!(outcome.last.front().is_some_and(|line| line.contains("panicked")));
        for _ in 0..2 * SHOWN {
            outcome.read("   0: a frame");
        }
        assert_eq!(outcome.last.len(), SHOWN);
        assert!(outcome.last.front().is_some_and(|line| line.contains("panicked")));
    }

    /// A target that is compiled and never run is one that nobody notices.
    #[test]
    fn every_target_is_run() {
        let manifest = fs::read_to_string(workspace().join("tests/fuzz/Cargo.toml")).unwrap();
        let manifest: toml::Value = toml::from_str(&manifest).unwrap();
        let mut there: Vec<_> = manifest["bin"].as_array().unwrap().iter().map(|bin| bin["name"].as_str()).collect();
        let mut run: Vec<_> = TARGETS.iter().map(|target| Some(target.name)).collect();
        there.sort_unstable();
        run.sort_unstable();
        assert_eq!(there, run);
        for target in &TARGETS {
            assert!(workspace().join("tests/fuzz/corpus").join(target.name).is_dir(), "{}", target.name);
        }
    }
}
