//! Everything that a session waits for, in one epoll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_user::Connection;

use super::{Events, Orders};

/// Who has something for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The server is to stop.
    Stop,
    /// An operator.
    Orders,
    /// The client's socket.
    Socket,
    /// A worker.
    Events,
    /// Whoever found the client's memory gone.
    MemoryLost,
    /// The eventfd that a client uses as a queue's doorbell.
    Doorbell(u16),
    /// The eventfd by which a client masks INTx.
    MaskIntx,
    /// The eventfd by which a client unmasks INTx.
    UnmaskIntx,
}

impl Source {
    const DOORBELLS: u64 = 0x1_0000;

    fn to_data(self) -> u64 {
        match self {
            Self::Stop => 0,
            Self::Socket => 1,
            Self::Events => 2,
            Self::MaskIntx => 3,
            Self::UnmaskIntx => 4,
            Self::MemoryLost => 5,
            Self::Orders => 6,
            Self::Doorbell(queue) => Self::DOORBELLS | u64::from(queue),
        }
    }

    fn from_data(data: u64) -> Option<Self> {
        Some(match data {
            0 => Self::Stop,
            1 => Self::Socket,
            2 => Self::Events,
            3 => Self::MaskIntx,
            4 => Self::UnmaskIntx,
            5 => Self::MemoryLost,
            6 => Self::Orders,
            _ => Self::Doorbell(u16::try_from(data ^ Self::DOORBELLS).ok()?),
        })
    }
}

/// Tells all sessions that the server is to stop.
pub(crate) struct Stop(EventFd);

impl Stop {
    /// Not yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Now, and from now on: nobody reads it empty.
    pub(crate) fn now(&self) {
        if let Err(error) = self.0.write(1) {
            log::error!("cannot tell the sessions to stop: {error}");
        }
    }
}

impl Stop {
    /// Whether it is.
    pub(crate) fn is_now(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An epoll over what a session waits for. Closing a descriptor takes it out.
pub(super) struct Watcher {
    epoll: Epoll,
    /// Whether the socket is watched for output, rather than for input.
    output: bool,
}

impl Watcher {
    pub(super) fn new(connection: &Connection, events: &Events, stop: &Stop, orders: &Orders) -> io::Result<Self> {
        let watcher = Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, output: false };
        watcher.add(stop.as_fd(), Source::Stop)?;
        watcher.add(orders.as_fd(), Source::Orders)?;
        watcher.add(connection.as_fd(), Source::Socket)?;
        watcher.add(events.fd(), Source::Events)?;
        watcher.add(events.loss().as_fd(), Source::MemoryLost)?;
        Ok(watcher)
    }

    /// Watches one more.
    pub(super) fn add(&self, fd: BorrowedFd<'_>, source: Source) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.to_data()))?)
    }

    /// Forgets one, if it was watched.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        let _unknown = self.epoll.delete(fd);
    }

    /// Waits until at least one of them is ready; of the socket, for output if `output`.
    pub(super) fn wait(
        &mut self,
        connection: &Connection,
        output: bool,
    ) -> io::Result<impl Iterator<Item = Source> + use<>> {
        if output != self.output {
            let flags = if output { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            self.epoll.modify(connection, &mut EpollEvent::new(flags, Source::Socket.to_data()))?;
            self.output = output;
        }
        let mut ready = [EpollEvent::empty(); 16];
        let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        Ok(ready.into_iter().take(count).filter_map(|event| Source::from_data(event.data())))
    }
}
