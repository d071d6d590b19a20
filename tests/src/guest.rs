//! A running guest, its script and the facts that it tells.
//!
//! The script is a shell script, run with `set -eux`; `guest/prelude.sh` has the functions that it may use. When it
//! ends, the guest tells the fact `exit` and powers off.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::process::{Log, Process};
use crate::{Machine, Qmp, Testbed};

/// What facts begin with in the guest's log.
const MARK: &str = "@@ ";

/// How long to wait for a fact: a boot takes seconds, but another machine may be slow or busy.
const LIMIT: Duration = Duration::from_secs(300);

/// A guest and its QEMU, which is killed when this is dropped.
#[derive(Debug)]
pub struct Guest {
    log: Arc<Log>,
    /// How much of the log has been read.
    cursor: usize,
    process: Process,
    monitor: UnixListener,
    qmp: Option<Qmp>,
    dir: TempDir,
}

impl Guest {
    pub(crate) fn boot(testbed: &Testbed, machine: &Machine, script: &str) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        let start = testbed.start(machine, script, dir.path())?;
        let monitor = UnixListener::bind(dir.path().join("monitor")).context("cannot listen for QEMU's monitor")?;
        // QEMU gets the facts' serial port as its standard input: nothing to name, and it ends with QEMU.
        let (facts, theirs) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let mut command = testbed.qemu(machine)?.command();
        command
            .args(machine.arguments(&start))
            .args(["-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console"])
            .args(["-chardev", "socket,id=facts,fd=0", "-serial", "chardev:facts"])
            .args(["-qmp", "unix:monitor"])
            .current_dir(dir.path());
        let log = Arc::new(Log::default());
        log.follow(MARK, facts);
        let process = Process::spawn("QEMU", &command, OwnedFd::from(theirs), Arc::clone(&log))?;
        Ok(Self { log, cursor: 0, process, monitor, qmp: None, dir })
    }

    /// Waits for the next fact with this key, behind the last one that was waited for, and returns its value.
    ///
    /// # Errors
    /// When it does not come, or the script ends before: with the end of the guest's log.
    pub fn fact(&mut self, key: &str) -> Result<String> {
        let fact = self.log.wait(&mut self.cursor, LIMIT, |line| {
            let (name, value) = fact(line)?;
            (name == key || name == "exit").then(|| (name == key).then(|| value.to_owned()))
        });
        match fact {
            Ok(Some(value)) => Ok(value),
            Ok(None) => bail!("the guest's script ended before it told {key:?}; its last lines:\n{}", self.log.tail()),
            Err(error) => Err(error.context(format!("the guest did not tell {key:?}"))),
        }
    }

    /// The values of all facts with this key that the guest has told until now.
    #[must_use]
    pub fn facts(&self, key: &str) -> Vec<String> {
        let log = self.process.log();
        log.lines().filter_map(fact).filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).collect()
    }

    /// Waits until the script has ended, which must be well, and the guest has powered itself off.
    ///
    /// # Errors
    /// When it does not, or a command of the script has failed: with the end of the guest's log.
    pub fn finish(&mut self) -> Result<()> {
        let status = self.fact("exit")?;
        ensure!(status == "0", "the guest's script ended with {status}; its last lines:\n{}", self.log.tail());
        let status = self.process.wait(LIMIT)?;
        ensure!(status.success(), "QEMU ended with {status}; its last lines:\n{}", self.log.tail());
        Ok(())
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn qmp(&mut self) -> Result<&mut Qmp> {
        if self.qmp.is_none() {
            // QEMU has connected while it started. If it did not, this connection ends the wait.
            drop(UnixStream::connect(self.dir.path().join("monitor")));
            let (stream, _) = self.monitor.accept().context("no connection from QEMU's monitor")?;
            self.qmp = Some(Qmp::new(stream)?);
        }
        self.qmp.as_mut().context("no monitor")
    }

    /// Resets the machine as its reset button does: the guest boots again and runs the script once more.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn reset(&mut self) -> Result<()> {
        let qmp = self.qmp()?;
        // Otherwise a reset, like a kernel that panics, ends QEMU.
        qmp.execute("set-action", json!({ "reboot": "reset" }))?;
        qmp.execute("system_reset", json!({})).map(drop)
    }

    /// The QEMU that runs the guest.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn fact(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix(MARK)?;
    Some(line.split_once(' ').unwrap_or((line, "")))
}

/// What a guest's initramfs has beside its user space.
pub(crate) fn files(script: &str) -> [(&'static str, u32, &str); 4] {
    [
        ("init", 0o755, include_str!("guest/init.sh")),
        ("run.sh", 0o755, include_str!("guest/run.sh")),
        ("prelude.sh", 0o644, include_str!("guest/prelude.sh")),
        ("script", 0o644, script),
    ]
}

pub(crate) fn shell_command(testbed: &Testbed, machine: &Machine, dir: &Path) -> Result<String> {
    let start = testbed.start(machine, "set +eux; setsid cttyhack sh", dir)?;
    let mut command: Command = testbed.qemu(machine)?.command();
    command.args(machine.arguments(&start)).args(["-serial", "mon:stdio", "-serial", "null"]);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    Ok(words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" "))
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
