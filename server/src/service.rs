//! What a service manager is told: the protocol of sd_notify(3), for units of `Type=notify`.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::{env, io};

/// A way to the service manager, if there is one who listens.
pub(crate) struct ServiceManager(Option<UnixDatagram>);

impl ServiceManager {
    /// The one that has started us and says where it listens. Connected to it before the sandbox, which makes no sockets.
    pub(crate) fn of_environment() -> Self {
        let Some(address) = env::var_os("NOTIFY_SOCKET") else { return Self(None) };
        let connected = connect(&address);
        if let Err(error) = &connected {
            log::warn!("the service manager cannot be told anything: NOTIFY_SOCKET={}: {error}", address.display());
        }
        Self(connected.ok())
    }

    /// The devices are served.
    pub(crate) fn ready(&self, devices: usize) {
        let s = if devices == 1 { "" } else { "s" };
        self.tell(&format!("READY=1\nSTATUS=serving {devices} device{s}\n"));
    }

    /// What is in flight ends.
    pub(crate) fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=ending what is in flight\n");
    }

    fn tell(&self, text: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(text.as_bytes())
        {
            log::warn!("the service manager does not hear: {error}");
        }
    }
}

fn connect(address: &OsString) -> io::Result<UnixDatagram> {
    let bytes = address.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(OsStr::from_bytes(bytes))?,
    };
    let socket = UnixDatagram::unbound()?;
    // It is not worth waiting for.
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
