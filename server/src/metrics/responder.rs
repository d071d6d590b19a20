//! As much of HTTP/1.0 as it takes to be read by Prometheus, `curl` and the like.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use super::export;
use crate::config::SocketMode;
use crate::devices::Devices;
use crate::listener::{Access, Arrival, ListenError, Listener};
use crate::sandbox::{Sandbox, ThreadKind};
use crate::session::Stop;

/// The longest head of a request, in bytes.
const MOST: usize = 8192;
/// How long one may take with its request and its answer. Others wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait after a connection that could not be accepted, in milliseconds.
const RETRY_PAUSE: u16 = 100;

/// Listens on a UNIX socket, for the server's own user.
///
/// # Errors
/// As [`Listener::bind`].
pub(crate) fn bind(path: &Path) -> Result<Listener, ListenError> {
    Listener::bind_at(path, Access { mode: Some(SocketMode::OWNER), ..Access::default() })
}

/// Where it listens.
pub(crate) enum Place {
    Tcp(TcpListener),
    Unix(Listener),
}

impl Place {
    /// A TCP address.
    ///
    /// # Errors
    /// If it cannot be had.
    pub(crate) fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(listener))
    }
}

/// The thread that answers, one after the other.
pub(crate) struct Responder(JoinHandle<()>);

impl Responder {
    /// Answers until the server stops.
    ///
    /// # Errors
    /// If there can be no thread for it.
    pub(crate) fn start(place: Place, devices: Arc<Devices>, stop: Arc<Stop>, sandbox: &Sandbox) -> io::Result<Self> {
        let sandbox = sandbox.clone();
        let thread = thread::Builder::new().name("metrics".into()).spawn(move || {
            sandbox.enter_as(ThreadKind::Metrics);
            if let Err(error) = serve(&place, &devices, &stop) {
                log::error!("metrics are not served any more: {error}");
            }
        })?;
        Ok(Self(thread))
    }

    /// Waits until the server has been told to stop.
    pub(crate) fn join(self) {
        if self.0.join().is_err() {
            log::error!("the metrics thread panicked");
        }
    }
}

fn serve(place: &Place, devices: &Arc<Devices>, stop: &Stop) -> io::Result<()> {
    while let Some(stream) = accept(place, stop)? {
        if let Err(error) = answer(&stream, devices) {
            log::debug!("whoever asked for metrics has not got them: {error}");
        }
    }
    Ok(())
}

fn accept(place: &Place, stop: &Stop) -> io::Result<Option<OwnedFd>> {
    let listener = match place {
        Place::Unix(listener) => {
            return Ok(match listener.accept([stop.as_fd()])? {
                Arrival::Client(stream) => Some(stream.into()),
                Arrival::Woken(_) => None,
            });
        }
        Place::Tcp(listener) => listener,
    };
    loop {
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [stopped, _] = fds;
        if stopped.any() == Some(true) {
            return Ok(None);
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream.into())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It went away, or there are no descriptors just now.
            Err(error) => {
                log::debug!("metrics: cannot accept: {error}");
                let _stopped = poll(&mut [PollFd::new(stop.as_fd(), PollFlags::POLLIN)], RETRY_PAUSE);
            }
        }
    }
}

fn answer(stream: &OwnedFd, devices: &Arc<Devices>) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        ready(stream, PollFlags::POLLIN, deadline)?;
        let mut bytes = [0; 1024];
        match recv(stream.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => head.extend_from_slice(bytes.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if head.len() > MOST {
            return write(stream, &response("431 Request Header Fields Too Large", "text/plain", ""), deadline);
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<_> = line.split(|byte| *byte == b' ').collect();
    let reply = match words.as_slice() {
        [b"GET", b"/metrics" | b"/", _] => match export::text(devices) {
            Ok(text) => response("200 OK", "application/openmetrics-text; version=1.0.0; charset=utf-8", &text),
            Err(_) => response("500 Internal Server Error", "text/plain", ""),
        },
        [b"GET", ..] => response("404 Not Found", "text/plain", "the metrics are at /metrics\n"),
        _ => response("405 Method Not Allowed", "text/plain", "GET /metrics\n"),
    };
    write(stream, &reply, deadline)
}

fn response(status: &str, kind: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head =
        format!("HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body.as_bytes()].concat()
}

fn ready(stream: &OwnedFd, what: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(stream.as_fd(), what)], timeout) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn write(stream: &OwnedFd, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        ready(stream, PollFlags::POLLOUT, deadline)?;
        match send(stream.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
