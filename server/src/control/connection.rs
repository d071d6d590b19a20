//! One operator.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::{methods, rpc};
use crate::devices::Devices;
use crate::session::Stop;

/// The longest request, in bytes.
const MOST: usize = 64 << 10;
/// How long an operator may leave an answer unread, in milliseconds.
const READ_PATIENCE: u16 = 5000;

/// Answers until the operator goes, or has to, or the server stops.
pub(super) fn serve(stream: &UnixStream, devices: &Devices, stop: &Stop) {
    if let Err(error) = answer_all(stream, devices, stop) {
        log::debug!("an operator's connection has ended: {error}");
    }
}

fn answer_all(stream: &UnixStream, devices: &Devices, stop: &Stop) -> io::Result<()> {
    let mut lines = Lines::default();
    loop {
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [stopped, _] = fds;
        if stopped.any() == Some(true) {
            return Ok(());
        }
        let mut bytes = [0; 4096];
        match recv(stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Ok(()),
            Ok(count) => lines.add(bytes.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        while let Some(line) = lines.next() {
            let reply = rpc::answer(&line, |method, params| methods::call(devices, method, params));
            if let Some(reply) = reply {
                write(stream, &reply)?;
            }
        }
        if lines.is_too_long() {
            write(stream, &rpc::too_long(MOST))?;
            return Ok(());
        }
    }
}

fn write(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match send(stream.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EAGAIN) => {
                if poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)], READ_PATIENCE)? == 0 {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Bytes as they come, line by line.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// How many of them are known to hold no end of a line.
    seen: usize,
}

impl Lines {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The oldest whole line, without its end.
    fn next(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.bytes.iter().skip(self.seen).position(|byte| *byte == b'\n') else {
            self.seen = self.bytes.len();
            return None;
        };
        let rest = self.bytes.split_off(self.seen + end + 1);
        let mut line = std::mem::replace(&mut self.bytes, rest);
        self.seen = 0;
        line.truncate(line.len().saturating_sub(1));
        Some(line)
    }

    /// Whether what has come of a line is more than is taken.
    fn is_too_long(&self) -> bool {
        self.bytes.len() > MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_pieces() {
        let mut lines = Lines::default();
        lines.add(b"on");
        assert_eq!(lines.next(), None);
        lines.add(b"e\ntwo\n\nth");
        let mut next = || lines.next().map(|line| String::from_utf8(line).unwrap());
        assert_eq!([next(), next(), next(), next()], [Some("one".into()), Some("two".into()), Some("".into()), None]);
        lines.add(b"ree\n");
        assert_eq!(lines.next(), Some(b"three".to_vec()));
        lines.add(&[b' '; MOST]);
        assert!(lines.next().is_none() && !lines.is_too_long());
        lines.add(b" ");
        assert!(lines.is_too_long());
    }
}
