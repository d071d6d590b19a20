//! Sending messages, and keeping what the peer has not yet taken.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::{ConnectionError, Header, Limits, Reply, ReplyTo, Request};

/// The buffer that is kept between messages; a larger one is given back.
const KEPT_BUFFER: usize = 64 << 10;

/// The outgoing half of a [`Connection`](crate::Connection).
///
/// Each message goes out at once as far as the socket takes it. The rest waits, in order, together
/// with the file descriptors whose message has not begun.
pub struct Sender {
    stream: Arc<UnixStream>,
    limits: Limits,
    /// The message being built.
    buffer: Vec<u8>,
    pending: VecDeque<Unsent>,
    pending_len: usize,
}

/// What is left of a message. Its file descriptors go with its first byte.
struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Sender {
    pub(crate) fn new(stream: Arc<UnixStream>, limits: Limits) -> Sender {
        Sender { stream, limits, buffer: Vec::new(), pending: VecDeque::new(), pending_len: 0 }
    }

    /// Answers a command with success. Nothing goes out when the command asked for no reply.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn reply(&mut self, to: ReplyTo, reply: &Reply<'_>) -> Result<(), ConnectionError> {
        self.reply_with_fds(to, reply, &[])
    }

    /// Like [`reply`](Sender::reply), with file descriptors. They are duplicated when they have to
    /// wait.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn reply_with_fds(
        &mut self,
        to: ReplyTo,
        reply: &Reply<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        if !to.expected() {
            return Ok(());
        }
        self.message(to.header(), |out| reply.encode(out), fds)
    }

    /// Answers a command with an error. Nothing goes out when the command asked for no reply.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn refuse(&mut self, to: ReplyTo, errno: Errno) -> Result<(), ConnectionError> {
        if !to.expected() {
            return Ok(());
        }
        self.message(to.error_header(errno), |_| {}, &[])
    }

    /// Sends a command, for a client. `id` comes back in the reply.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn command(
        &mut self,
        id: u16,
        no_reply: bool,
        request: &Request<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let header = Header::command(id, request.command(), no_reply);
        self.message(header, |out| request.encode(out), fds)
    }

    /// Whether something waits until the peer reads: watch the socket for output and
    /// [`flush`](Sender::flush).
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while let Some(unsent) = self.pending.front_mut() {
            let bytes = unsent.bytes.get(unsent.sent..).unwrap_or_default();
            let fds: Vec<RawFd> = unsent.fds.iter().map(AsRawFd::as_raw_fd).collect();
            let sent = send(&self.stream, bytes, &fds)?;
            self.pending_len = self.pending_len.saturating_sub(sent);
            unsent.sent = unsent.sent.saturating_add(sent);
            if sent > 0 {
                unsent.fds.clear();
            }
            if unsent.sent < unsent.bytes.len() {
                break;
            }
            self.pending.pop_front();
        }
        Ok(())
    }

    fn message(
        &mut self,
        header: Header,
        payload: impl FnOnce(&mut Vec<u8>),
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        if self.buffer.capacity() > KEPT_BUFFER {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        self.buffer.extend_from_slice(&[0; Header::SIZE]);
        payload(&mut self.buffer);

        let (size, limit) = (self.buffer.len(), self.limits.max_message_size);
        let header = match u32::try_from(size) {
            Ok(wire_size) if size <= limit => Header { size: wire_size, ..header },
            _ => return Err(ConnectionError::TooLarge { size, limit }),
        };
        if let Some(front) = self.buffer.first_chunk_mut() {
            *front = header.encode();
        }

        let sent = if self.has_pending() {
            0
        } else {
            let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
            send(&self.stream, &self.buffer, &fds)?
        };
        if sent == size { Ok(()) } else { self.keep(sent, fds) }
    }

    /// Keeps the message in the buffer, of which `sent` bytes are gone.
    fn keep(&mut self, sent: usize, fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        let bytes = self.buffer.get(sent..).unwrap_or_default().to_vec();
        let limit = self.limits.max_pending;
        let pending_len = self.pending_len.saturating_add(bytes.len());
        if pending_len > limit {
            return Err(ConnectionError::Backlog { limit });
        }
        let fds = if sent == 0 { fds } else { &[] };
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<Result<_, _>>()
            .map_err(|source| ConnectionError::Socket { action: "pass a descriptor over", source })?;
        self.pending_len = pending_len;
        self.pending.push_back(Unsent { bytes, sent: 0, fds });
        Ok(())
    }
}

/// Sends the front of `bytes`, which is not empty, and with it the descriptors. Gives how many bytes
/// the socket took: 0 when it is full, and then no descriptor has gone either.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> Result<usize, ConnectionError> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let socket = stream.as_fd().as_raw_fd();
    loop {
        match sendmsg::<()>(socket, &[IoSlice::new(bytes)], control, flags, None) {
            Ok(sent) => return Ok(sent),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ConnectionError::Closed),
            Err(errno) => return Err(ConnectionError::socket("write to", errno)),
        }
    }
}
