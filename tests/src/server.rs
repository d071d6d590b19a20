//! The server under test: the binary `vfio-user-blk`, as an operator runs it.

use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Error, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Process;
use crate::process::output;

/// How long the server may take to listen or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// A running `vfio-user-blk serve`, killed when this is dropped.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

impl Server {
    /// Builds the server if need be, runs `vfio-user-blk serve` with `arguments`, and waits until it listens.
    ///
    /// # Errors
    /// When it can't be built or does not listen: with what cargo or the server printed.
    pub fn start<S: AsRef<str>>(arguments: &[S]) -> Result<Self> {
        let mut command = Command::new(binary()?);
        command.arg("serve").args(arguments.iter().map(AsRef::as_ref)).env("RUST_LOG", "info");
        let process = Process::spawn("vfio-user-blk", &command, Stdio::null(), Arc::default())?;
        process.wait_for(&["listening on"], LIMIT)?;
        Ok(Self { process })
    }

    /// Builds the server, if it has not been built yet.
    ///
    /// # Errors
    /// What cargo says.
    pub fn build() -> Result<()> {
        binary().map(drop)
    }

    /// Asks the server to end, as an operator does (SIGTERM), and waits until it has.
    ///
    /// # Errors
    /// When it has not ended in time: with the end of its log.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(LIMIT)
    }

    /// The process and its log.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// The path of the binary `vfio-user-blk`: the one that `$VFIO_USER_BLK` names, or else it is built once, in the profile
/// that we are built in. A build that failed is not tried again.
///
/// # Errors
/// What cargo says.
pub fn binary() -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("VFIO_USER_BLK").filter(|binary| !binary.is_empty()) {
        return Ok(std::path::absolute(binary)?);
    }
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BINARY.get_or_init(|| build().map_err(|error| format!("{error:#}"))).clone().map_err(Error::msg)
}

fn build() -> Result<PathBuf> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["build", "--package", "vfio-user-blk", "--bin", "vfio-user-blk"])
        .args(["--message-format", "json-render-diagnostics"])
        .args(if cfg!(debug_assertions) { &[] } else { &["--release"][..] })
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let messages = output(&command).context("cannot build the server")?;
    let executable =
        |line: &str| serde_json::from_str::<Value>(line).ok()?.get("executable")?.as_str().map(PathBuf::from);
    messages.lines().filter_map(executable).next_back().context("cargo built no binary vfio-user-blk")
}
