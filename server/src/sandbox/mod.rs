//! What the server's threads give up once every store is open and every socket bound.
//!
//! Whoever finds a way to run code in this process holds the memory of all guests and the descriptors of all stores; nothing
//! here takes that back. What it takes is the rest of the machine: other files, programs, processes, the network.
//!
//! - [`syscalls`]: which system calls each kind of thread makes; [`seccomp`] has the kernel hold it to them.
//! - [`filesystem`]: no file can be opened, and none removed but in the folders of the sockets; where devices may be added, the
//!   thread that does it can open what the operator has named for that.
//! - [`privileges`]: no capability is left, and none comes back.
//!
//! Each thread enters by itself, since the kernel keeps all of this by thread; so a process that has a [`Server`](crate::Server)
//! among other things keeps its own threads as they are. What io_uring does is no system call: what a ring may do is in
//! `backend/uring/setup.rs`.

mod entrance;
mod filesystem;
mod privileges;
mod seccomp;
mod syscalls;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::config::SandboxMode;
pub(crate) use entrance::Entrance;
use filesystem::Files;
use seccomp::Filters;

/// What a thread is for, which says what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThreadKind {
    /// Waits for signals, or for the others to end.
    Main,
    /// Serves a device's client, see [`session`](crate::session).
    Session,
    /// Serves queues, see [`worker`](crate::worker), or has the cache of a store, which takes the same.
    Worker,
    /// Does the operations of a store that blocks.
    Store,
    /// Connects to the server of a store.
    Connector,
    /// Serves operators, see [`control`](crate::control): opens devices, and starts the sessions that serve them.
    Control,
    /// Tells of what the others have done, see [`metrics`](crate::metrics).
    Metrics,
    /// Asks how large block devices are, see [`growing`](crate::growing).
    Sizes,
}

impl ThreadKind {
    const ALL: [Self; 8] = [
        Self::Main,
        Self::Session,
        Self::Worker,
        Self::Store,
        Self::Connector,
        Self::Control,
        Self::Metrics,
        Self::Sizes,
    ];
}

/// A part of the sandbox that the kernel has and that cannot be set up all the same.
#[derive(Debug, thiserror::Error)]
#[error("cannot enter the sandbox ({part}): {source}; --sandbox off does without")]
pub struct SandboxError {
    part: &'static str,
    source: Box<dyn Error + Send + Sync>,
}

impl SandboxError {
    fn of<E: Into<Box<dyn Error + Send + Sync>>>(part: &'static str) -> impl Fn(E) -> Self {
        move |source| Self { part, source: source.into() }
    }
}

/// What threads enter, each for itself and for ever. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Sandbox(Option<Arc<Parts>>);

/// What it consists of, besides what is the same for all.
#[derive(Debug)]
struct Parts {
    files: Files,
    /// The same for threads that connect to servers.
    connecting: Files,
    /// Those of [`ThreadKind::Control`].
    control_files: Files,
    /// `None` if the kernel has no seccomp.
    filters: Option<Filters>,
}

impl Sandbox {
    /// A sandbox in which names can be removed from `folders`, and stores' threads connect to TCP `ports`; says in the log what the kernel has of it.
    ///
    /// # Errors
    /// If a thread that tries it cannot enter.
    #[cfg(test)]
    pub(crate) fn new(mode: SandboxMode, folders: &[&Path], ports: &[u16]) -> Result<Self, SandboxError> {
        Self::with_control(mode, folders, ports, &[])
    }

    /// As [`new`](Self::new), where operators may have devices added that use what is below `allowed`.
    ///
    /// # Errors
    /// If a thread that tries it cannot enter, or something that is allowed does not exist.
    pub(crate) fn with_control(
        mode: SandboxMode,
        folders: &[&Path],
        ports: &[u16],
        allowed: &[PathBuf],
    ) -> Result<Self, SandboxError> {
        if mode == SandboxMode::Off {
            log::info!("sandbox: off");
            return Ok(Self(None));
        }
        // The socket of a device that is added goes with it.
        let folders: Vec<_> = folders.iter().copied().chain(allowed.iter().map(PathBuf::as_path)).collect();
        let mut parts = Parts {
            files: Files::new(&folders, &[])?,
            connecting: Files::new(&[], ports)?,
            control_files: Files::for_control(&folders, allowed)?,
            filters: Filters::new()?,
        };
        // What a kernel has, what it was booted with, and what a container lets through of it: it is learnt by trying.
        if !parts.tried(|parts| parts.filter(ThreadKind::Main))? {
            parts.filters = None;
            log::warn!(
                "sandbox: this kernel has no seccomp filters: the server may make any system call. It takes a kernel \
                 with CONFIG_SECCOMP_FILTER"
            );
        }
        let landlock = parts.tried(|parts| parts.files.restrict())?;
        if landlock.is_none() {
            log::warn!(
                "sandbox: this kernel has no landlock: the server may open any file that its user may. It takes Linux \
                 5.13 or newer with CONFIG_SECURITY_LANDLOCK, and landlock among its security modules (lsm=)"
            );
        }
        for kind in ThreadKind::ALL {
            parts.tried(|parts| parts.enter(kind))?;
        }
        let seccomp = if parts.filters.is_some() { "seccomp, " } else { "" };
        let landlock = landlock.map(|abi| format!("landlock (ABI {abi}), ")).unwrap_or_default();
        log::info!("sandbox: on: {seccomp}{landlock}no capabilities, no new privileges");
        Ok(Self(Some(Arc::new(parts))))
    }

    /// Whether it takes anything.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Puts the calling thread in, which is to do nothing but wait from now on. Where that fails, although it went well
    /// before, the process ends.
    pub fn enter(&self) {
        self.enter_as(ThreadKind::Main);
    }

    /// Puts the calling thread in, or ends the process: nothing is served outside.
    pub(crate) fn enter_as(&self, kind: ThreadKind) {
        if let Some(parts) = &self.0
            && let Err(error) = parts.enter(kind)
        {
            log::error!("{error}");
            std::process::exit(1);
        }
    }
}

impl Parts {
    /// Does it in a thread that ends then.
    fn tried<T: Send>(&self, attempt: impl FnOnce(&Self) -> Result<T, SandboxError> + Send) -> Result<T, SandboxError> {
        thread::scope(|scope| {
            let trial = thread::Builder::new().name("sandbox".into()).spawn_scoped(scope, || attempt(self));
            let ended = trial.map_err(SandboxError::of("its trial"))?.join();
            ended.unwrap_or_else(|_| Err(SandboxError::of("its trial")("the thread panicked")))
        })
    }

    fn enter(&self, kind: ThreadKind) -> Result<(), SandboxError> {
        match kind {
            ThreadKind::Control => self.control_files.restrict()?,
            ThreadKind::Connector => self.connecting.restrict()?,
            _ => self.files.restrict()?,
        };
        privileges::drop_all()?;
        // The last: what was done so far is not among the calls that it leaves.
        self.filter(kind).map(drop)
    }

    /// Whether the kernel can.
    fn filter(&self, kind: ThreadKind) -> Result<bool, SandboxError> {
        self.filters.as_ref().map_or(Ok(false), |filters| filters.apply(kind))
    }
}
