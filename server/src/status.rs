//! What can be seen of a device from outside of its session.

use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde::Serialize;

use crate::config::{FabricChoice, RateLimits};
use crate::session::Observation;

/// The process at the other end of a device's socket, as the kernel knew it when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Peer {
    pub(crate) pid: i32,
    pub(crate) uid: u32,
}

impl Peer {
    /// Who has connected; `None` if the system does not say.
    pub(crate) fn of(stream: &UnixStream) -> Option<Self> {
        let peer = getsockopt(stream, PeerCredentials).ok()?;
        Some(Self { pid: peer.pid(), uid: peer.uid() })
    }
}

/// How a device is, at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Status {
    /// Bytes.
    pub(crate) size: u64,
    /// Whether an operator has stopped its queues.
    pub(crate) paused: bool,
    /// Its client, if there is one.
    pub(crate) client: Option<Peer>,
    /// How fast it may be used.
    pub(crate) limits: Option<RateLimits>,
    /// What lies before its store.
    pub(crate) fabric: Option<FabricChoice>,
}

/// The status of a device, which its session keeps up to date. Nothing on the way of a request touches it.
#[derive(Debug, Default)]
pub(crate) struct SharedStatus {
    status: Mutex<Status>,
    /// What its session knew of the client when it was asked last.
    observation: Mutex<Option<Observation>>,
}

impl SharedStatus {
    /// As it is now.
    pub(crate) fn get(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What the session was told to tell.
    pub(crate) fn observation(&self) -> Option<Observation> {
        self.observation.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells it; `None` if there is no client.
    pub(crate) fn observe(&self, observation: Option<Observation>) {
        *self.observation.lock().unwrap_or_else(PoisonError::into_inner) = observation;
    }
}
