//! One end of a connection.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use thiserror::Error;

use crate::{DEFAULT_MAX_DATA_XFER_SIZE, Header, Receiver, Sender};

/// What one message may bring and how much may wait to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The largest message to take or to send, header included, in bytes.
    pub max_message_size: usize,
    /// The most file descriptors to take with one message (`max_msg_fds`).
    pub max_msg_fds: usize,
    /// The most bytes that wait until the peer reads.
    pub max_pending: usize,
}

impl Default for Limits {
    /// The default data transfer of 1 MiB and a page for what surrounds it, the 16 file descriptors
    /// that QEMU takes at most, and two of the largest messages waiting.
    fn default() -> Limits {
        const MAX_MESSAGE_SIZE: usize = DEFAULT_MAX_DATA_XFER_SIZE as usize + 4096;
        Limits { max_message_size: MAX_MESSAGE_SIZE, max_msg_fds: 16, max_pending: 2 * MAX_MESSAGE_SIZE }
    }
}

/// Why a connection is over.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// A message whose size is below that of its header: where the next one starts is unknown.
    #[error("message {id} (command {command}) claims {size} bytes, less than a header; disconnecting")]
    MessageSize {
        /// The identifier in the header.
        id: u16,
        /// The command in the header.
        command: u16,
        /// The size in the header.
        size: u32,
    },
    /// The peer went away in the middle of a message.
    #[error("the peer closed the connection in the middle of a message")]
    Truncated,
    /// The peer went away; what was to be sent is lost.
    #[error("the peer closed the connection before it took what was sent to it")]
    Closed,
    /// The peer does not read what is sent to it.
    #[error("the peer leaves more than {limit} bytes unread; disconnecting")]
    Backlog {
        /// [`Limits::max_pending`].
        limit: usize,
    },
    /// A message to send is larger than agreed.
    #[error("a message of {size} bytes is to be sent, but {limit} is the most; read less at once")]
    TooLarge {
        /// The size of the message.
        size: usize,
        /// [`Limits::max_message_size`].
        limit: usize,
    },
    /// The socket failed.
    #[error("cannot {action} the socket of the connection")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl ConnectionError {
    pub(crate) fn socket(action: &'static str, errno: Errno) -> ConnectionError {
        ConnectionError::Socket { action, source: errno.into() }
    }
}

/// One end of a connection over a UNIX socket, on the server's side or on the client's.
///
/// Nothing here waits: watch the socket ([`AsFd`]) for input, and for output while
/// [`Sender::has_pending`]. The two halves are public so that a message still borrowed from the
/// receiver can be answered with the sender.
pub struct Connection {
    /// The messages that come in.
    pub receiver: Receiver,
    /// The messages that go out.
    pub sender: Sender,
    stream: Arc<UnixStream>,
}

impl Connection {
    /// Takes a connected socket and makes it non-blocking.
    ///
    /// # Errors
    /// [`ConnectionError::Socket`] when that fails.
    pub fn new(stream: UnixStream, limits: Limits) -> Result<Connection, ConnectionError> {
        stream.set_nonblocking(true).map_err(|source| ConnectionError::Socket { action: "configure", source })?;
        // A header alone must always go through, and lengths must fit their fields.
        let max_message_size = limits.max_message_size.clamp(Header::SIZE, u32::MAX as usize);
        let limits = Limits { max_message_size, ..limits };
        let stream = Arc::new(stream);
        Ok(Connection {
            receiver: Receiver::new(Arc::clone(&stream), limits),
            sender: Sender::new(Arc::clone(&stream), limits),
            stream,
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
