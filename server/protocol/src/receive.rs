//! Cutting the incoming bytes into messages.
//!
//! The kernel hands out the bytes of two messages in one read when only the second carries file
//! descriptors, and gives those descriptors with the first byte. Reading ahead would therefore give
//! them to the wrong message. So the receiver asks for exactly the 16 bytes of a header, then for
//! exactly the payload that the header announces: what comes with a read belongs to that message.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;

use crate::fds::{self, ControlBuffer};
use crate::{ConnectionError, Header, Limits, MessageType, ReplyTo};

/// The payload buffer that is kept between messages; a larger one is given back.
const KEPT_BUFFER: usize = 64 << 10;
/// How much of refused messages one call discards before it lets others run.
const DISCARDED_AT_ONCE: usize = 64 << 10;

/// What came in.
#[derive(Debug)]
pub enum Received<'a> {
    /// A command.
    Command {
        /// The command number, see [`Request::decode`](crate::Request::decode).
        command: u16,
        /// The right to answer.
        reply_to: ReplyTo,
        /// What follows the header.
        payload: &'a [u8],
        /// The file descriptors that came with the message, close-on-exec.
        fds: Vec<OwnedFd>,
    },
    /// A reply to a command that this side sent.
    Reply {
        /// The header, with the identifier of the command and the error.
        header: Header,
        /// What follows the header.
        payload: &'a [u8],
        /// The file descriptors that came with the message, close-on-exec.
        fds: Vec<OwnedFd>,
    },
    /// A message that cannot be taken. It has been read to its end and its file descriptors are
    /// closed, so answering with the errno keeps both sides in step.
    Refused {
        /// The right to answer.
        reply_to: ReplyTo,
        /// EMSGSIZE: larger than the limit. E2BIG: more file descriptors than the limit. EMFILE: more
        /// than this process may open. EINVAL: neither a command nor a reply.
        errno: Errno,
    },
    /// No whole message yet: call again when the socket is readable (level-triggered).
    WouldBlock,
    /// The peer closed the connection between two messages.
    Closed,
}

/// The incoming half of a [`Connection`](crate::Connection).
pub struct Receiver {
    stream: Arc<UnixStream>,
    limits: Limits,
    control: ControlBuffer,
    /// The header being read, and how much of it is there.
    header: [u8; Header::SIZE],
    header_len: usize,
    /// How much of the payload is there.
    payload_len: usize,
    /// Payloads are read into the front of this; only ever grows within the limit.
    buffer: Vec<u8>,
    /// The file descriptors of the message being read.
    fds: Vec<OwnedFd>,
    /// Why the message being read will be refused.
    refusal: Option<Errno>,
}

impl Receiver {
    pub(crate) fn new(stream: Arc<UnixStream>, limits: Limits) -> Receiver {
        Receiver {
            stream,
            limits,
            control: ControlBuffer::new(),
            header: [0; Header::SIZE],
            header_len: 0,
            payload_len: 0,
            buffer: Vec::new(),
            fds: Vec::new(),
            refusal: None,
        }
    }

    /// Takes the next message, as far as it has come. A message that is there in part stays for the
    /// next call.
    ///
    /// A server stops calling this while [`Sender::has_pending`](crate::Sender::has_pending), so
    /// that a client which sends and never reads cannot make it store replies.
    ///
    /// # Errors
    /// Any error ends the connection.
    pub fn receive(&mut self) -> Result<Received<'_>, ConnectionError> {
        let mut discarded = 0_usize;
        while self.header_len < Header::SIZE {
            match self.read_header()? {
                Progress::Bytes(_) => {}
                Progress::WouldBlock => return Ok(Received::WouldBlock),
                Progress::End if self.header_len == 0 => return Ok(Received::Closed),
                Progress::End => return Err(ConnectionError::Truncated),
            }
        }

        let header = Header::decode(&self.header);
        let expected = (header.size as usize).saturating_sub(Header::SIZE);
        while self.payload_len < expected {
            if self.refusal.is_some() && discarded >= DISCARDED_AT_ONCE {
                return Ok(Received::WouldBlock);
            }
            match self.read_payload(expected)? {
                Progress::Bytes(len) => discarded = discarded.saturating_add(len),
                Progress::WouldBlock => return Ok(Received::WouldBlock),
                Progress::End => return Err(ConnectionError::Truncated),
            }
        }

        self.header_len = 0;
        self.payload_len = 0;
        let fds = std::mem::take(&mut self.fds);
        let reply_to = ReplyTo::new(&header);
        if let Some(errno) = self.refusal.take() {
            return Ok(Received::Refused { reply_to, errno });
        }
        let payload = self.buffer.get(..expected).unwrap_or_default();
        Ok(match header.message_type() {
            Ok(MessageType::Command) => Received::Command { command: header.command, reply_to, payload, fds },
            Ok(MessageType::Reply) => Received::Reply { header, payload, fds },
            Err(errno) => Received::Refused { reply_to, errno },
        })
    }

    fn read_header(&mut self) -> Result<Progress, ConnectionError> {
        let window = self.header.get_mut(self.header_len..).unwrap_or_default();
        let progress = read(&self.stream, window, &mut self.control, &mut self.fds, &mut self.refusal, self.limits)?;
        if let Progress::Bytes(len) = progress {
            self.header_len = self.header_len.saturating_add(len);
            if self.header_len == Header::SIZE {
                self.prepare_payload()?;
            }
        }
        Ok(progress)
    }

    /// Judges the header that has just come and makes room for its payload.
    fn prepare_payload(&mut self) -> Result<(), ConnectionError> {
        let Header { id, command, size, .. } = Header::decode(&self.header);
        let Some(expected) = (size as usize).checked_sub(Header::SIZE) else {
            return Err(ConnectionError::MessageSize { id, command, size });
        };
        let mut room = expected;
        if size as usize > self.limits.max_message_size {
            self.refusal = Some(Errno::EMSGSIZE);
            room = KEPT_BUFFER;
        }
        if self.buffer.len() > KEPT_BUFFER && room <= KEPT_BUFFER {
            self.buffer.truncate(KEPT_BUFFER);
            self.buffer.shrink_to_fit();
        }
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        Ok(())
    }

    fn read_payload(&mut self, expected: usize) -> Result<Progress, ConnectionError> {
        let missing = expected.saturating_sub(self.payload_len);
        // What will be refused is read over and over into the front.
        let start = if self.refusal.is_some() { 0 } else { self.payload_len };
        let end = start.saturating_add(missing).min(self.buffer.len());
        let window = self.buffer.get_mut(start..end).unwrap_or_default();
        let progress = read(&self.stream, window, &mut self.control, &mut self.fds, &mut self.refusal, self.limits)?;
        if let Progress::Bytes(len) = progress {
            self.payload_len = self.payload_len.saturating_add(len);
        }
        Ok(progress)
    }
}

#[derive(Clone, Copy)]
enum Progress {
    /// This many bytes came, at least one.
    Bytes(usize),
    WouldBlock,
    End,
}

/// Reads into `window`, which is not empty, and adds the descriptors that come to the message's.
fn read(
    stream: &UnixStream,
    window: &mut [u8],
    control: &mut ControlBuffer,
    fds: &mut Vec<OwnedFd>,
    refusal: &mut Option<Errno>,
    limits: Limits,
) -> Result<Progress, ConnectionError> {
    let chunk = loop {
        match fds::receive(stream.as_fd(), window, control) {
            Ok(chunk) => break chunk,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(Progress::WouldBlock),
            // The peer is gone and left replies unread: the end of the stream like any other.
            Err(Errno::ECONNRESET) => return Ok(Progress::End),
            Err(errno) => return Err(ConnectionError::socket("read from", errno)),
        }
    };
    if chunk.truncated {
        refusal.get_or_insert(Errno::EMFILE);
    } else if fds.len().saturating_add(chunk.fds.len()) > limits.max_msg_fds {
        refusal.get_or_insert(Errno::E2BIG);
    }
    if refusal.is_none() {
        fds.extend(chunk.fds);
    }
    Ok(if chunk.len == 0 { Progress::End } else { Progress::Bytes(chunk.len) })
}
