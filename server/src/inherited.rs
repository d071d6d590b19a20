//! Listening sockets that a service manager has made and hands over, as sd_listen_fds(3) describes it.
//!
//! Clients can connect before the server is there, and while it starts anew: they wait in the socket, which is the service manager's
//! and stays. Which socket is whose, its name says (`FileDescriptorName=`), or else its path.

use std::env;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::AcceptConn;

/// What the socket of operators is called.
const CONTROL: &str = "control";
/// What that of Prometheus is called.
const METRICS: &str = "metrics";
/// What systemd calls those that have no name.
const UNNAMED: &str = "unknown";

/// Why sockets cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InheritedError {
    /// As many names as descriptors, or none at all.
    #[error("LISTEN_FDNAMES has {names} names for {descriptors} descriptors; whoever starts this server sets both")]
    Names {
        /// Those of LISTEN_FDNAMES.
        names: usize,
        /// Those of LISTEN_FDS.
        descriptors: usize,
    },
    /// No socket, or of another kind.
    #[error(
        "the descriptor {name:?} is no listening UNIX stream socket with a path: {source}; use ListenStream=/a/path"
    )]
    Unfit {
        /// What it is called.
        name: String,
        /// What is wrong.
        source: io::Error,
    },
    /// Nobody wants it.
    #[error(
        "the socket {name:?} ({}) is no device's: FileDescriptorName= must be the name of one, \"control\" or \"metrics\", or \
         ListenStream= the path of one's socket; there are: {known}", path.display()
    )]
    Unclaimed {
        /// What it is called.
        name: String,
        /// Where it is.
        path: PathBuf,
        /// The names and paths that there are.
        known: String,
    },
}

/// A socket of the service manager's.
#[derive(Debug)]
pub(crate) struct Inherited {
    name: String,
    pub(crate) path: PathBuf,
    pub(crate) socket: UnixListener,
}

/// The sockets that were handed over, until they are taken.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    sockets: Vec<Inherited>,
    /// Who has been asked for: what a message says of those that nobody wants.
    known: Vec<String>,
}

impl InheritedSockets {
    /// Those that the environment tells of, if it is this process that they are for. Call it before there is a second thread: the
    /// variables are taken out of the environment.
    ///
    /// # Errors
    /// If something else was handed over.
    pub fn of_environment() -> Result<Self, InheritedError> {
        let names = env::var("LISTEN_FDNAMES").ok();
        Self::take_over(ListenFd::from_env(), names.as_deref())
    }

    fn take_over(mut fds: ListenFd, names: Option<&str>) -> Result<Self, InheritedError> {
        let names = names_of(names, fds.len())?;
        let mut sockets = Vec::new();
        for (index, name) in names.into_iter().enumerate() {
            let fit = fds.take_unix_listener(index).and_then(|socket| fit(socket.ok_or(io::ErrorKind::NotFound)?));
            match fit {
                Ok((socket, path)) => sockets.push(Inherited { name, path, socket }),
                Err(source) => return Err(InheritedError::Unfit { name, source }),
            }
        }
        Ok(Self { sockets, known: Vec::new() })
    }

    /// The one for a device.
    pub(crate) fn device(&mut self, name: Option<&str>, path: &Path) -> Option<Inherited> {
        self.take(name, path)
    }

    /// The one for operators.
    pub(crate) fn control(&mut self, path: &Path) -> Option<Inherited> {
        self.take(Some(CONTROL), path)
    }

    /// The one for Prometheus.
    pub(crate) fn metrics(&mut self, path: &Path) -> Option<Inherited> {
        self.take(Some(METRICS), path)
    }

    fn take(&mut self, name: Option<&str>, path: &Path) -> Option<Inherited> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let known = name.map(|name| format!("{name:?}")).into_iter().chain([path.display().to_string()]);
        self.known.push(known.collect::<Vec<_>>().join(" or "));
        let named = self.sockets.iter().position(|socket| Some(socket.name.as_str()) == name);
        let at = named.or_else(|| self.sockets.iter().position(|socket| socket.path == path))?;
        Some(self.sockets.remove(at))
    }

    /// Nobody else wants any.
    ///
    /// # Errors
    /// If some are left: clients would wait there for ever.
    pub(crate) fn all_taken(self) -> Result<(), InheritedError> {
        let known = self.known.join(", ");
        match self.sockets.into_iter().next() {
            Some(Inherited { name, path, .. }) => Err(InheritedError::Unclaimed { name, path, known }),
            None => Ok(()),
        }
    }
}

fn names_of(names: Option<&str>, descriptors: usize) -> Result<Vec<String>, InheritedError> {
    let Some(names) = names.filter(|_| descriptors > 0) else { return Ok(vec![UNNAMED.to_owned(); descriptors]) };
    let names: Vec<_> = names.split(':').map(str::to_owned).collect();
    if names.len() != descriptors {
        return Err(InheritedError::Names { names: names.len(), descriptors });
    }
    Ok(names)
}

/// A socket that listens, and where.
fn fit(socket: UnixListener) -> io::Result<(UnixListener, PathBuf)> {
    if !getsockopt(&socket.as_fd(), AcceptConn)? {
        return Err(io::Error::other("it does not listen"));
    }
    let path = socket.local_addr()?.as_pathname().map(Path::to_owned);
    // Whoever waits for clients looks first.
    socket.set_nonblocking(true)?;
    Ok((socket, path.ok_or_else(|| io::Error::other("it has no path"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_over(folder: &Path, names: &[&str]) -> InheritedSockets {
        let sockets = names.iter().enumerate().map(|(index, name)| {
            let (socket, path) = fit(UnixListener::bind(folder.join(index.to_string())).unwrap()).unwrap();
            Inherited { name: (*name).to_owned(), path, socket }
        });
        InheritedSockets { sockets: sockets.collect(), known: Vec::new() }
    }

    #[test]
    fn a_name_goes_before_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = |index: u32| folder.path().join(index.to_string());
        let mut sockets = handed_over(folder.path(), &[UNNAMED, "vm1", "control"]);
        // The first is another's by path, but the second its own by name.
        assert_eq!(sockets.device(Some("vm1"), &path(0)).unwrap().path, path(1));
        assert_eq!(sockets.device(None, &path(0)).unwrap().path, path(0));
        assert!(sockets.device(Some("vm2"), &path(1)).is_none(), "taken");
        assert!(sockets.metrics(&path(9)).is_none());
        assert_eq!(sockets.control(&path(9)).unwrap().path, path(2));
        sockets.all_taken().unwrap();
    }

    #[test]
    fn what_nobody_wants_is_refused_with_what_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut sockets = handed_over(folder.path(), &["vm3"]);
        assert!(sockets.device(Some("vm1"), Path::new("/run/vm1.sock")).is_none());
        let error = sockets.all_taken().unwrap_err().to_string();
        assert!(error.contains("\"vm3\"") && error.contains("\"vm1\" or /run/vm1.sock"), "{error}");
    }

    #[test]
    fn there_is_a_name_for_each_or_none() {
        assert_eq!(names_of(None, 2).unwrap(), [UNNAMED, UNNAMED]);
        assert_eq!(names_of(Some("a:b"), 2).unwrap(), ["a", "b"]);
        assert!(matches!(names_of(Some("a"), 2), Err(InheritedError::Names { names: 1, descriptors: 2 })));
        // Those of somebody else.
        assert_eq!(names_of(Some("a:b"), 0).unwrap(), [""; 0]);
    }

    #[test]
    fn a_socket_without_a_path_is_none_to_listen_on() {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(format!("inherited-{}", std::process::id()));
        assert!(fit(UnixListener::bind_addr(&address.unwrap()).unwrap()).unwrap_err().to_string().contains("no path"));
    }
}
