//! `cargo xtask models` and `cargo xtask stress`: what shows that no wakeup is lost, on the source as it stands.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::mutants::Tree;

/// Longer than any of them takes on a busy machine: guards against hanging alone.
const LIMIT: Duration = Duration::from_secs(900);

/// A test executable that can tell a lost wakeup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suite {
    /// The models of a package under loom.
    Models(&'static str),
    /// The event index, exhaustively.
    EventIdx,
    /// Two threads on two cores.
    Stress,
}

/// Everything that `cargo xtask models` runs.
pub(crate) const ALL: [Suite; 5] =
    [Suite::Models("pci"), Suite::Models("virtio"), Suite::Models("vfio-user-blk"), Suite::EventIdx, Suite::Stress];

/// What came of a suite.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The tests that failed, or one line that says that it did not end.
    pub(crate) failed: Vec<String>,
    pub(crate) took: Duration,
    /// All that it printed.
    pub(crate) output: String,
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Suite::Models(package) => write!(f, "models of {package}"),
            Suite::EventIdx => write!(f, "event index"),
            Suite::Stress => write!(f, "stress"),
        }
    }
}

/// Where a suite is compiled, and how.
#[derive(Debug)]
pub(crate) struct Build {
    /// The root of the workspace.
    pub(crate) tree: PathBuf,
    /// For what cargo leaves behind.
    pub(crate) target: PathBuf,
    /// With `cfg(loom)`, as models need it.
    pub(crate) loom: bool,
    /// As it is shipped, and not as it is tested.
    pub(crate) release: bool,
}

impl Build {
    fn workspace(release: bool) -> Self {
        Build { tree: workspace().to_owned(), target: target(), loom: false, release }
    }
}

impl Suite {
    /// Compiles it and returns the executable.
    ///
    /// # Errors
    /// When it doesn't compile, with what the compiler says.
    pub(crate) fn build(self, build: &Build) -> Result<PathBuf> {
        let mut command = crate::cargo();
        command.current_dir(&build.tree).env("CARGO_TARGET_DIR", &build.target);
        command.args(["test", "--no-run", "--message-format=json-render-diagnostics", "--quiet"]);
        match self {
            Suite::Models(package) => command.args(["--package", package, "--lib"]),
            Suite::EventIdx => command.args(["--package", "testbed", "--test", "event_idx"]),
            Suite::Stress => command.args(["--package", "testbed", "--test", "stress"]),
        };
        if build.release {
            command.arg("--release");
        }
        if build.loom {
            let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
            command.env("RUSTFLAGS", format!("{flags} --cfg loom"));
        }
        if build.tree != workspace() {
            // Compiled often and never debugged.
            command.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_PROFILE_RELEASE_LTO", "off");
        }
        let output = command.output().context("cannot run cargo")?;
        ensure!(output.status.success(), "{self}: does not compile:\n{}", String::from_utf8_lossy(&output.stderr));
        let messages = String::from_utf8_lossy(&output.stdout);
        let mut executables = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            message.get("executable")?.as_str().map(PathBuf::from)
        });
        executables.next_back().with_context(|| format!("{self}: cargo has built no test"))
    }

    /// Runs it, to its end or its first sign that it has none.
    ///
    /// # Errors
    /// When it can't be started, or has no test that it should have.
    pub(crate) fn run(self, executable: &Path, environment: &[(&str, String)]) -> Result<Outcome> {
        let start = Instant::now();
        let dir = tempfile::tempdir().context("cannot make a directory for the output")?;
        let log = dir.path().join("output");
        let output = File::create(&log).context("cannot write the output")?;
        let mut command = Command::new(executable);
        match self {
            Suite::Models(_) => command.arg("model::"),
            Suite::EventIdx => &mut command,
            Suite::Stress => command.arg("--nocapture"),
        };
        command.env("RUST_BACKTRACE", "0").envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child = command.spawn().with_context(|| format!("cannot run {}", executable.display()))?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if start.elapsed() > LIMIT {
                child.kill()?;
                child.wait()?;
                break None;
            }
            thread::sleep(Duration::from_millis(10));
        };
        let took = start.elapsed();
        let output = std::fs::read(&log).context("cannot read the output")?;
        let output = String::from_utf8_lossy(&output).into_owned();
        let failed: Vec<String> = match status {
            None => vec![format!("no end after {LIMIT:?}")],
            Some(status) if status.success() => {
                ensure!(!output.contains("running 0 tests"), "{self}: there is no such test");
                Vec::new()
            }
            Some(status) => {
                let failed: Vec<String> = failures(&output).map(str::to_owned).collect();
                if failed.is_empty() { vec![format!("ended by {status}")] } else { failed }
            }
        };
        Ok(Outcome { failed, took, output })
    }
}

/// The names of the tests that failed: libtest lists them at the end, indented by four.
fn failures(output: &str) -> impl Iterator<Item = &str> {
    let (_, list) = output.rsplit_once("\nfailures:\n").unwrap_or_default();
    list.lines().map_while(|line| line.strip_prefix("    "))
}

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// The folder for what is built.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// `cargo xtask models`.
pub(crate) fn run() -> Result<ExitCode> {
    let tree = Tree::copy()?;
    for suite in ALL {
        let build = if let Suite::Models(_) = suite { tree.models() } else { Build::workspace(false) };
        let outcome = suite.run(&suite.build(&build)?, &[])?;
        println!("{suite}: {} in {:.1} s", if outcome.failed.is_empty() { "ok" } else { "FAILED" }, seconds(&outcome));
        if !outcome.failed.is_empty() {
            bail!("{}", outcome.output);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask stress`.
pub(crate) fn stress(rounds: u64) -> Result<ExitCode> {
    let executable = Suite::Stress.build(&Build::workspace(true))?;
    let outcome = Suite::Stress.run(&executable, &[("STRESS_ROUNDS", rounds.to_string())])?;
    print!("{}", outcome.output);
    Ok(if outcome.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long a suite ran.
pub(crate) fn seconds(outcome: &Outcome) -> f64 {
    outcome.took.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_named() {
        let output = "running 2 tests\ntest a ... FAILED\ntest b ... ok\n\nfailures:\n\n---- a stdout ----\nfailures:\n\
                      \n\nfailures:\n    a\n    c::d\n\ntest result: FAILED. 1 passed\n";
        assert_eq!(failures(output).collect::<Vec<_>>(), ["a", "c::d"]);
        assert_eq!(failures("killed").count(), 0);
    }
}
