//! Sockets before they belong to a ring: connecting, and talking with a time limit, on threads that may wait.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, UnixAddr, connect, getsockopt, send, setsockopt,
    socket, sockopt,
};

use super::error::HandshakeError;
use super::handshake::Answers;
use super::uri::Address;

/// Where a server listens, as numbers: names are looked up once, before the sandbox closes.
#[derive(Clone, Debug)]
pub(super) enum Resolved {
    /// Each is tried until one answers.
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

impl Resolved {
    pub(super) fn of(address: &Address) -> Result<Self, HandshakeError> {
        Ok(match address {
            Address::Unix(path) => Self::Unix(path.clone()),
            Address::Tcp { host, port } => {
                let all: Vec<_> = (host.as_str(), *port).to_socket_addrs().map_err(HandshakeError::Resolve)?.collect();
                if all.is_empty() {
                    return Err(HandshakeError::NoAddress);
                }
                Self::Tcp(all)
            }
        })
    }

    /// How reads are answered best by a server there: on a network a hole is not to travel. On this machine it costs less
    /// than chunks do, each part of which is written alone by most servers, and wakes us.
    pub(super) fn answers(&self) -> Answers {
        match self {
            Self::Tcp(_) => Answers::Structured,
            Self::Unix(_) => Answers::Simple,
        }
    }

    /// A connected socket, in blocking mode.
    pub(super) fn connect(&self, deadline: Instant) -> Result<OwnedFd, HandshakeError> {
        let mut last = HandshakeError::NoAddress;
        match self {
            Self::Unix(path) => {
                let address = UnixAddr::new(path).map_err(|error| HandshakeError::Connect(error.into()))?;
                connect_one(AddressFamily::Unix, &address, deadline).map_err(HandshakeError::Connect)
            }
            Self::Tcp(addresses) => {
                for address in addresses {
                    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
                    match connect_one(family, &SockaddrStorage::from(*address), deadline).and_then(|socket| {
                        // Requests are small, and each is waited for; a network that is gone is noticed while idle.
                        setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
                        setsockopt(&socket, sockopt::KeepAlive, &true)?;
                        Ok(socket)
                    }) {
                        Ok(socket) => return Ok(socket),
                        Err(error) => last = HandshakeError::Connect(error),
                    }
                }
                Err(last)
            }
        }
    }
}

fn connect_one(
    family: AddressFamily,
    address: &dyn nix::sys::socket::SockaddrLike,
    deadline: Instant,
) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), address) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            wait(socket.as_fd(), PollFlags::POLLOUT, deadline)?;
            let error = getsockopt(&socket, sockopt::SocketError)?;
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
        }
        Err(error) => return Err(error.into()),
    }
    // In nonblocking mode a ring would not wait for data, but say that there is none.
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(socket)
}

/// Waits until the socket is ready, or broken.
fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match poll(&mut [PollFd::new(socket, events)], timeout) {
            Ok(1..) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connected socket until a deadline.
pub(super) struct Stream<'a> {
    pub(super) socket: &'a OwnedFd,
    pub(super) deadline: Instant,
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        wait(self.socket.as_fd(), PollFlags::POLLIN, self.deadline)?;
        Ok(nix::unistd::read(self.socket, into)?)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            wait(self.socket.as_fd(), PollFlags::POLLOUT, self.deadline)?;
            match send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => return Ok(sent),
                Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
