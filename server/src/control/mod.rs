//! The control socket: where an operator looks at the devices of a running server and changes them.
//!
//! JSON-RPC 2.0, one object a line; docs/control.md has the methods. [`rpc`] is the wire, [`methods`] what the words do, and
//! [`client`] the other end, for `vfio-user-blk ctl`. Each operator has a thread, so that one who waits for a device to come
//! to rest keeps nobody else waiting.

mod client;
mod connection;
mod faults;
mod methods;
mod rpc;
mod snapshot;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::{io, mem};

pub use client::{CallError, ControlClient};
pub use snapshot::{DeviceSnapshot, QueueSnapshot, Snapshot};

use crate::config::{ServerConfig, SocketMode};
use crate::devices::Devices;
pub use crate::diagnosis::{Finding, Level};
use crate::listener::{Access, Arrival, ListenError, Listener};
pub use crate::metrics::{Latencies, Stages, Statistics};
use crate::sandbox::{Sandbox, ThreadKind};
use crate::session::Stop;

/// Operators at the same time; the next finds the connection closed.
const MOST_OPERATORS: usize = 16;
/// A stack for JSON as deep as serde_json goes, and a store that is opened.
const STACK: usize = 1 << 20;

/// Listens on the control socket.
///
/// # Errors
/// As [`Listener::bind`].
pub(crate) fn bind(path: &Path, config: &ServerConfig) -> Result<Listener, ListenError> {
    let mode = Some(config.control_mode.unwrap_or(SocketMode::OWNER));
    Listener::bind_at(path, Access { mode, ..Access::default() })
}

/// The thread that waits for operators.
pub(crate) struct Control(JoinHandle<()>);

impl Control {
    /// Serves operators until the server stops.
    ///
    /// # Errors
    /// If there can be no thread for it.
    pub(crate) fn start(
        listener: Listener,
        devices: Arc<Devices>,
        stop: Arc<Stop>,
        sandbox: &Sandbox,
    ) -> io::Result<Self> {
        let sandbox = sandbox.clone();
        let thread = thread::Builder::new().name("control".into()).stack_size(STACK).spawn(move || {
            // Those that it starts are in it too.
            sandbox.enter_as(ThreadKind::Control);
            if let Err(error) = listen(&listener, &devices, &stop) {
                log::error!("{}: nobody is listened to any more: {error}", listener.path().display());
            }
        })?;
        Ok(Self(thread))
    }

    /// Waits until the server has been told to stop and the last operator has gone.
    pub(crate) fn join(self) {
        if self.0.join().is_err() {
            log::error!("the control thread panicked");
        }
    }
}

fn listen(listener: &Listener, devices: &Arc<Devices>, stop: &Arc<Stop>) -> io::Result<()> {
    let mut operators: Vec<JoinHandle<()>> = Vec::new();
    while let Arrival::Client(stream) = listener.accept([stop.as_fd()])? {
        for over in operators.extract_if(.., |operator| operator.is_finished()) {
            join(over);
        }
        if operators.len() >= MOST_OPERATORS {
            log::warn!("{}: an operator was refused: there are {MOST_OPERATORS}", listener.path().display());
            continue;
        }
        let (devices, stop) = (Arc::clone(devices), Arc::clone(stop));
        let operator = thread::Builder::new().name("operator".into()).stack_size(STACK);
        operators.push(operator.spawn(move || connection::serve(&stream, &devices, &stop))?);
    }
    mem::take(&mut operators).into_iter().for_each(join);
    Ok(())
}

fn join(operator: JoinHandle<()>) {
    if operator.join().is_err() {
        log::error!("the thread of an operator panicked");
    }
}
