//! A device's socket in the file system.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::unistd::{Gid, Group};

use crate::config::{DeviceConfig, SocketMode};
use crate::inherited::Inherited;

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody answers there.
    #[error("{0}: another server is listening there; stop it, or choose another path")]
    InUse(PathBuf),
    /// There is something else.
    #[error("{0}: exists and is not a socket; remove it, or choose another path")]
    NotASocket(PathBuf),
    /// Nobody knows the group.
    #[error("{path}: there is no group {group:?}; give --socket-group the name or the number of one")]
    NoGroup {
        /// The path of the socket.
        path: PathBuf,
        /// What was asked for.
        group: String,
    },
    /// The system refused.
    #[error("{path}: cannot listen there: {source}")]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// How long a client waits that could not be accepted, in milliseconds.
const RETRY_PAUSE: u16 = 100;

/// Who may connect.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access<'a> {
    /// The permissions of the socket; what the umask leaves if it is not said.
    pub(crate) mode: Option<SocketMode>,
    /// Its group, by name or number.
    pub(crate) group: Option<&'a str>,
    /// The users that are served; all that the socket lets in if it is not said.
    pub(crate) allow_uids: Option<&'a [u32]>,
}

/// What ended a wait for clients.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// One is there.
    Client(UnixStream),
    /// This descriptor, of those that were waited for too, is readable.
    Woken(usize),
}

/// A listening socket, removed from the file system with this.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of what we made there: another server may have replaced it. `None` if it is the service manager's.
    made: Option<(u64, u64)>,
    /// The users that are served; `None` for all that the socket lets in.
    allow_uids: Option<Vec<u32>>,
}

impl Listener {
    /// Listens where the device says, for whom it says. What a dead server left there is replaced.
    ///
    /// # Errors
    /// If a live server listens there, or something else lies there, or the system refuses.
    pub(crate) fn bind(device: &DeviceConfig) -> Result<Self, ListenError> {
        let access = Access {
            mode: device.socket_mode(),
            group: device.socket_group.as_deref(),
            allow_uids: device.allow_uids.as_deref(),
        };
        Self::bind_at(&device.socket_path, access)
    }

    /// As [`bind`](Self::bind), for whoever listens.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn bind_at(path: &Path, access: Access<'_>) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Io { path: path.to_owned(), source };
        let refused = |errno: Errno| failed(errno.into());
        let group = access.group.map(|group| find_group(path, group)).transpose()?;
        remove_stale(path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(refused)?;
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(path).map_err(refused)?).map_err(refused)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let listener = Self {
            socket: socket.into(),
            path: std::path::absolute(path).map_err(failed)?,
            made: Some((metadata.dev(), metadata.ino())),
            allow_uids: access.allow_uids.map(<[_]>::to_vec),
        };
        if let Some(group) = group {
            std::os::unix::fs::lchown(path, None, Some(group.as_raw())).map_err(failed)?;
        }
        if let Some(mode) = access.mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode.bits())).map_err(failed)?;
        }
        // Only now: until here nobody could connect, whatever the umask has left of the permissions.
        socket::listen(&listener.socket, Backlog::MAXCONN).map_err(refused)?;
        Ok(listener)
    }

    /// Listens on what the service manager has made: it decides who may connect, but for `allow_uids`, and its socket stays.
    pub(crate) fn inherit(inherited: Inherited, allow_uids: Option<&[u32]>) -> Self {
        let Inherited { socket, path, .. } = inherited;
        log::info!("{}: the socket is the service manager's", path.display());
        Self { socket, path, made: None, allow_uids: allow_uids.map(<[_]>::to_vec) }
    }

    /// Where it is, from the root.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a client, or until one of `others` is readable; the first of these comes first.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn accept<const N: usize>(&self, others: [BorrowedFd<'_>; N]) -> io::Result<Arrival> {
        loop {
            let mut fds: Vec<_> = others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            fds.push(PollFd::new(self.socket.as_fd(), PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if let Some(first) = fds.iter().take(N).position(|fd| fd.any() == Some(true)) {
                return Ok(Arrival::Woken(first));
            }
            match self.socket.accept() {
                Ok((stream, _)) if self.admits(&stream) => return Ok(Arrival::Client(stream)),
                Ok(_) => {}
                // It went away again, or there are no descriptors just now: the next may have more luck.
                Err(error) if transient(&error) => {
                    log::warn!("{}: cannot accept a client: {error}", self.path.display());
                    // It is still there, and would be found at once.
                    fds.truncate(N);
                    let _woken = poll(&mut fds, RETRY_PAUSE);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the user at the other end is served: the one who connected, whoever has the socket now.
    fn admits(&self, stream: &UnixStream) -> bool {
        let Some(allowed) = &self.allow_uids else { return true };
        match socket::getsockopt(stream, PeerCredentials) {
            Ok(peer) if allowed.contains(&peer.uid()) => true,
            Ok(peer) => {
                let (name, uid, pid) = (self.path.display(), peer.uid(), peer.pid());
                log::warn!("{name}: a client of uid {uid} (process {pid}) was refused: it is not among allow_uids");
                false
            }
            Err(error) => {
                log::warn!("{}: a client that does not say who it is was refused: {error}", self.path.display());
                false
            }
        }
    }
}

/// A group by its name, or else its number.
fn find_group(path: &Path, group: &str) -> Result<Gid, ListenError> {
    let number = || group.parse().ok().map(Gid::from_raw);
    let found = match Group::from_name(group) {
        Ok(found) => found.map(|group| group.gid),
        // In the sandbox there are no names.
        Err(_) if number().is_some() => None,
        Err(errno) => return Err(ListenError::Io { path: path.to_owned(), source: errno.into() }),
    };
    found.or_else(number).ok_or_else(|| ListenError::NoGroup { path: path.to_owned(), group: group.to_owned() })
}

fn transient(error: &io::Error) -> bool {
    let passing = [libc::ECONNABORTED, libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINTR];
    error.raw_os_error().is_some_and(|errno| passing.contains(&errno))
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| Some((now.dev(), now.ino())) == self.made);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: cannot be removed: {error}", self.path.display());
        }
        log::debug!("{}: closed (descriptor {})", self.path.display(), self.socket.as_raw_fd());
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(ListenError::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Err(ListenError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                log::info!("{}: replacing the socket of a server that has gone", path.display());
                fs::remove_file(path).map_err(failed)
            }
            // Alive, with as many clients waiting as fit.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(ListenError::InUse(path.to_owned())),
            Err(error) => Err(failed(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(path: &Path) -> Result<Listener, ListenError> {
        Listener::bind(&DeviceConfig::new(path))
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blk.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves it there, as a killed server does");
        let live = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(ListenError::InUse(_))));
        drop(live);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn another_servers_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blk.sock");
        let ours = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }
}
