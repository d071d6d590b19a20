//! The operator's end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::rpc::{self, Reply};

/// The longest reply that is taken, in bytes: a list of some ten thousand devices.
const MOST: u64 = 16 << 20;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The server says no.
    #[error("{message}")]
    Refused {
        /// Which kind of no; docs/control.md has the list.
        code: i32,
        /// Why, and what to do.
        message: String,
    },
    /// The server has gone.
    #[error("the server has closed the connection; its log says why")]
    Closed,
    /// The server lets us wait.
    #[error("the server does not answer; is it stopped, or its machine overloaded?")]
    Silent,
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is no control socket.
    #[error("that is no control socket: {0}")]
    Nonsense(String),
}

/// A connection to a server's control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
    last_id: u64,
}

impl ControlClient {
    /// Connects.
    ///
    /// # Errors
    /// The system's.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(path)?), last_id: 0 })
    }

    /// Waits no longer than this for each answer; for ever if it was never called. Afterwards nothing more can be called.
    ///
    /// # Errors
    /// The system's.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(timeout))
    }

    /// Calls a method and waits for its result.
    ///
    /// # Errors
    /// If the server refuses, or does not answer as one.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value, CallError> {
        self.last_id = self.last_id.wrapping_add(1);
        self.stream.get_mut().write_all(&rpc::request(self.last_id, method, params))?;
        let mut line = Vec::new();
        (&mut self.stream).take(MOST).read_until(b'\n', &mut line).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => CallError::Silent,
            _ => error.into(),
        })?;
        if line.is_empty() {
            return Err(CallError::Closed);
        }
        let nonsense = |why: &dyn ToString| CallError::Nonsense(why.to_string());
        let reply: Reply = serde_json::from_slice(&line).map_err(|error| nonsense(&error))?;
        match reply {
            Reply { error: Some(error), .. } => Err(CallError::Refused { code: error.code, message: error.message }),
            Reply { id, result: Some(result), .. } if id == self.last_id => Ok(result),
            _ => Err(nonsense(&"a reply to something else")),
        }
    }
}
