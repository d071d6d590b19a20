//! What can go wrong.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use thiserror::Error;
use vfio_user::{Command, ConnectionError};

/// Why a call failed.
#[derive(Debug, Error)]
pub enum Error {
    /// No server listens there.
    #[error("cannot connect to {}; is the server running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection is over.
    #[error("the connection to the server failed")]
    Connection(#[from] ConnectionError),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Disconnected,
    /// The server answered with an error.
    #[error("the server refused {command:?}: {errno}")]
    Refused {
        /// What was asked.
        command: Command,
        /// The server's answer.
        errno: Errno,
    },
    /// The server did not answer, or the device did not do what it was told, in time.
    #[error("no {what} within {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// The server's answer breaks the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The device breaks the virtio specification, or lacks what was asked of it.
    #[error("the device cannot be driven: {0}")]
    Device(&'static str),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// The guest memory has no room for an allocation.
    #[error("no room for {size} bytes in the guest memory; make it larger")]
    OutOfMemory {
        /// The size of the allocation.
        size: usize,
    },
    /// An access outside of a buffer, or not aligned for its width.
    #[error("no {len} bytes at offset {offset} in a buffer of {size} bytes, or not aligned")]
    OutOfRange {
        /// Where the access starts.
        offset: usize,
        /// Its size.
        len: usize,
        /// The size of the buffer.
        size: usize,
    },
    /// The queue has no room for the request until others complete.
    #[error("the queue is full; take completions first")]
    QueueFull,
    /// A call that waits for its own request found others in flight.
    #[error("{0} requests are in flight; take their completions first")]
    Busy(usize),
    /// The device completed a request with another status than OK (virtio 1.3 section 5.2.6).
    #[error("the device completed the request with status {0}")]
    Status(u8),
}

impl Error {
    /// The errno that the server answered with, if that is what failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    pub(crate) fn system(action: &'static str) -> impl FnOnce(Errno) -> Error {
        move |source| Error::System { action, source }
    }
}
