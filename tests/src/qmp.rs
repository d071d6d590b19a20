//! A client of QEMU's machine protocol (QMP): JSON objects, one a line.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for a command or an event.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT)).context("QMP")?;
        let mut qmp = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        qmp.read().context("no greeting from QEMU's monitor")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes `command` and returns what QEMU answers.
    ///
    /// # Errors
    /// QEMU's error, or that it is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}").with_context(|| format!("QMP {command}"))?;
        loop {
            let mut message = self.read().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QMP {command}: {error}");
            }
            match message.get_mut("return") {
                Some(answer) => return Ok(answer.take()),
                None => self.events.push_back(message),
            }
        }
    }

    /// Waits for the next event of this name (such as `DEVICE_DELETED`), and returns its data.
    ///
    /// # Errors
    /// When it does not come within two minutes, or QEMU is gone.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            let mut message = match self.events.pop_front() {
                Some(message) => message,
                None => self.read().with_context(|| format!("waiting for QMP event {name}"))?,
            };
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(message.get_mut("data").map(Value::take).unwrap_or_default());
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
