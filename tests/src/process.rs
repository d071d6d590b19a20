//! Child processes that die with us, and the log of what they print.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How many lines of a log an error quotes.
const TAIL: usize = 40;

/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(30);

/// `command`, killed when the thread that spawns it ends. util-linux's `setpriv` asks the kernel for that, and then
/// becomes the command.
fn leashed(command: &Command) -> Command {
    let mut leashed = Command::new("setpriv");
    leashed.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => leashed.env(name, value),
            None => leashed.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        leashed.current_dir(dir);
    }
    leashed
}

/// Runs `command` to its end, hands each line of its standard output to `line`, and fails with what it printed on
/// standard error if it fails.
pub(crate) fn run(command: &Command, mut line: impl FnMut(&str)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = leashed(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name} (by setpriv, of util-linux)"))?;
    let stderr = child.stderr.take().map(|mut pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes); // what could be read is better than nothing
            String::from_utf8_lossy(&bytes).into_owned()
        })
    });
    if let Some(stdout) = child.stdout.take() {
        each_line(stdout, &mut line);
    }
    let status = child.wait().with_context(|| format!("cannot wait for {name}"))?;
    let stderr = stderr.and_then(|reader| reader.join().ok()).unwrap_or_default();
    if !status.success() {
        let lines: Vec<&str> = stderr.lines().collect();
        bail!("{name}: {status}\n{}", lines[lines.len().saturating_sub(TAIL)..].join("\n"));
    }
    Ok(())
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When it can't be run or fails: with the end of what it printed on standard error.
pub fn output(command: &Command) -> Result<String> {
    let mut text = String::new();
    run(command, |line| {
        let _ = writeln!(text, "{line}"); // writing to a String cannot fail
    })?;
    Ok(text)
}

fn each_line(pipe: impl Read, line: &mut impl FnMut(&str)) {
    let mut reader = BufReader::new(pipe);
    let mut bytes = Vec::new();
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
        line(String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']));
        bytes.clear();
    }
}

/// A child process in the background, killed at the latest when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Arc<Log>,
}

impl Process {
    /// Starts `command`; its standard output and error go to [`Process::log`].
    pub(crate) fn spawn(name: &str, command: &Command, stdin: impl Into<Stdio>, log: Arc<Log>) -> Result<Self> {
        let mut child = leashed(command)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name} (by setpriv, of util-linux)"))?;
        if let Some(stdout) = child.stdout.take() {
            log.follow("", stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            log.follow("", stderr);
        }
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Starts `command` as `name`, with nothing on its standard input; it is killed when the thread that calls ends.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn start(name: &str, command: &Command) -> Result<Self> {
        Self::spawn(name, command, Stdio::null(), Arc::default())
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.state().lines.join("\n")
    }

    /// Waits for a line that contains all `words`, and returns it.
    ///
    /// # Errors
    /// When the time is over or the process has ended without that line: with the end of its log.
    pub fn wait_for(&self, words: &[&str], limit: Duration) -> Result<String> {
        let found = |line: &str| words.iter().all(|word| line.contains(word)).then(|| line.to_owned());
        self.log
            .wait(&mut 0, limit, found)
            .with_context(|| format!("{} did not print a line with {words:?}", self.name))
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When it still runs after `limit`: with the end of its log.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if !self.log.wait_closed(limit) {
            bail!("{} still runs after {limit:?}; its last lines:\n{}", self.name, self.log.tail());
        }
        self.child.wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Kills the process as `kill -9` does, and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.wait(DEATH).map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already, which is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines from one or more streams, in the order of their arrival.
#[derive(Debug, Default)]
pub(crate) struct Log {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    /// Streams that have not ended.
    open: usize,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects the lines of `stream` until it ends, each with `prefix` before it.
    pub(crate) fn follow(self: &Arc<Self>, prefix: &'static str, stream: impl Read + Send + 'static) {
        self.state().open += 1;
        let log = Arc::clone(self);
        thread::spawn(move || {
            each_line(stream, &mut |line| {
                log.state().lines.push(format!("{prefix}{line}"));
                log.changed.notify_all();
            });
            log.state().open -= 1;
            log.changed.notify_all();
        });
    }

    /// Waits for a line, from the line `cursor` on, for which `found` has an answer, and leaves `cursor` behind it.
    pub(crate) fn wait<T>(
        &self,
        cursor: &mut usize,
        limit: Duration,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        let mut state = self.state();
        loop {
            while let Some(line) = state.lines.get(*cursor) {
                *cursor += 1;
                if let Some(answer) = found(line) {
                    return Ok(answer);
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.open == 0 || left.is_zero() {
                let why = if left.is_zero() { format!("{limit:?} are over") } else { "it has ended".to_owned() };
                drop(state);
                return Err(anyhow!("{why}; its last lines:\n{}", self.tail()));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all streams have ended, and says whether they have.
    fn wait_closed(&self, limit: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), limit, |state| state.open > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.open == 0
    }

    pub(crate) fn tail(&self) -> String {
        let state = self.state();
        state.lines[state.lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failing_command_is_an_error_that_quotes_it() {
        let error = output(&sh("echo fine; echo wrong >&2; exit 3")).unwrap_err().to_string();
        assert!(error.contains("wrong") && error.contains('3'), "{error}");
        assert_eq!(output(&sh("echo one; echo two")).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn waiting_for_a_line_that_never_comes_ends_with_the_process() {
        let mut process = Process::spawn("sh", &sh("echo hello"), Stdio::null(), Arc::default()).unwrap();
        assert_eq!(process.wait_for(&["hel"], LIMIT).unwrap(), "hello");
        let error = format!("{:#}", process.wait_for(&["goodbye"], LIMIT).unwrap_err());
        assert!(error.contains("it has ended") && error.contains("hello"), "{error}");
        assert!(process.wait(LIMIT).unwrap().success());
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let process = Process::spawn("sh", &sh("echo $$; exec sleep 1000"), Stdio::null(), Arc::default()).unwrap();
        let pid: i32 = process.wait_for(&[], LIMIT).unwrap().parse().unwrap();
        assert!(kill(Pid::from_raw(pid), None).is_ok());
        drop(process);
        assert!(kill(Pid::from_raw(pid), None).is_err());
    }

    #[test]
    fn a_process_dies_with_the_thread_that_spawned_it() {
        let log = Arc::new(Log::default());
        let spawner = thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let process = Process::spawn("sh", &sh("echo up; exec sleep 1000"), Stdio::null(), log).unwrap();
                process.wait_for(&["up"], LIMIT).unwrap();
                std::mem::forget(process);
            }
        });
        spawner.join().unwrap();
        assert!(log.wait_closed(LIMIT));
    }
}
