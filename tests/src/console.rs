//! A running machine that is spoken to by its serial port, as a person does: for firmware that has a prompt.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::process::{Log, Process};
use crate::{Machine, Testbed};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(300);

/// How long an unanswered key is given.
const BETWEEN_KEYS: Duration = Duration::from_millis(200);

/// A machine and its QEMU, which is killed when this is dropped.
#[derive(Debug)]
pub struct Console {
    port: UnixStream,
    log: Arc<Log>,
    /// How much of the log has been read.
    cursor: usize,
    process: Process,
    /// What QEMU loads is here.
    _dir: TempDir,
}

impl Console {
    pub(crate) fn start(testbed: &Testbed, machine: &Machine) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        let start = testbed.start(machine, "", dir.path())?;
        let (port, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let mut command = testbed.qemu(machine)?.command();
        command.args(machine.arguments(&start)).args([
            "-chardev",
            "socket,id=console,fd=0",
            "-serial",
            "chardev:console",
        ]);
        let log = Arc::new(Log::default());
        log.follow("", port.try_clone().context("cannot duplicate a socket")?);
        let process = Process::spawn("QEMU", &command, OwnedFd::from(theirs), Arc::clone(&log))?;
        Ok(Self { port, log, cursor: 0, process, _dir: dir })
    }

    /// Types `line` and presses Return.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.port.write_all(format!("{line}\r").as_bytes()).context("cannot type on the console")
    }

    /// Presses the keys `keys` again and again, until `prompt` has been shown: a prompt that comes after a count-down.
    ///
    /// # Errors
    /// When it does not come within five minutes, or QEMU is gone: with the end of the log.
    pub fn answer(&mut self, keys: &str, prompt: &str) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            self.port
                .write_all(keys.as_bytes())
                .with_context(|| format!("cannot type on the console of {}", self.log.tail()))?;
            // A key that a prompt answers with another one ends the line that it was in.
            let found = |line: &str| line.contains(prompt).then_some(());
            match self.log.wait(&mut self.cursor, BETWEEN_KEYS, found) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error.context(format!("no {prompt:?}"))),
                Err(_) => {}
            }
        }
    }

    /// Waits for the next whole line that contains `words`, behind the last one that was waited for, and returns it.
    ///
    /// # Errors
    /// When it does not come within five minutes, or QEMU is gone: with the end of the log.
    pub fn line(&mut self, words: &str) -> Result<String> {
        let found = |line: &str| line.contains(words).then(|| line.to_owned());
        self.log.wait(&mut self.cursor, LIMIT, found).with_context(|| format!("no line {words:?} on the console"))
    }

    /// The QEMU that runs the machine.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
