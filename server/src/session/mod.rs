//! One device's side of its socket: one client at a time.
//!
//! Each device has a thread of its own here, which does all that is not a request: it answers the client's messages, maps its
//! memory, starts and stops queues. It sleeps whenever the client is silent, and nothing it waits for is waited for without
//! an end. How a message becomes an [`Effect`](pci::Effect) is the function's business, what follows from it is in
//! [`attendance`].

mod attendance;
mod data_path;
mod dma;
mod events;
mod irqs;
mod negotiation;
mod watcher;

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use vfio_user::{Connection, ConnectionError, Limits, Received, Request};

use crate::device::Device;
use crate::listener::Listener;
use crate::worker::Pool;
use attendance::Attendance;
use events::Event;
pub(crate) use events::Events;
pub(crate) use watcher::Stop;
use watcher::{Source, Watcher};

/// How many messages are answered before anything else is looked at again.
const MESSAGES_AT_ONCE: usize = 64;
/// How long a message may wait for requests in flight: QEMU waits 5 s for its reply and then drops the device.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);
/// How often a wait for requests of a client that has gone is reported.
const DRAIN_REPORT: Duration = Duration::from_secs(10);

/// A device, its socket, and the workers that serve it.
pub(crate) struct Session {
    name: String,
    device: Device,
    listener: Listener,
    pool: Arc<Pool>,
    stop: Arc<Stop>,
}

/// Why a session with one client ended.
enum End {
    /// The client went, or had to go.
    Client,
    /// The server stops.
    Server,
}

impl Session {
    pub(crate) fn new(device: Device, listener: Listener, pool: Arc<Pool>, stop: Arc<Stop>) -> Self {
        Self { name: listener.path().display().to_string(), device, listener, pool, stop }
    }

    /// Serves one client after the other until the server stops; then everything that was completed is on stable storage.
    ///
    /// # Errors
    /// If the system refuses something without which no client can be served, or the storage fails at the end.
    pub(crate) fn run(mut self) -> std::io::Result<()> {
        loop {
            let Some(stream) = self.listener.accept(&self.stop)? else { break };
            info!("{}: a client has connected", self.name);
            let end = match Connection::new(stream, Limits::default()) {
                Ok(connection) => self.attend(connection),
                Err(error) => {
                    error!("{}: {error}", self.name);
                    Ok(End::Client)
                }
            };
            match end? {
                End::Client => info!("{}: the client has gone; waiting for the next", self.name),
                End::Server => break,
            }
        }
        self.device.service.flush()
    }

    /// Serves one client from its first message until it has gone and nothing of it is left.
    fn attend(&mut self, mut connection: Connection) -> std::io::Result<End> {
        let events = Arc::new(Events::new()?);
        let watcher = Watcher::new(&connection, &events, &self.stop)?;
        let mut attendance =
            Attendance::new(&self.name, &mut self.device, Arc::clone(&self.pool), Arc::clone(&events), watcher);
        let end = loop {
            match serve_once(&self.name, &mut connection, &mut attendance, &events) {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(error) => {
                    warn!("{}: {error}", self.name);
                    break End::Client;
                }
            }
        };
        // The client learns that it is over at once; what it has in flight ends before the next one is served, so
        // that no late write of the one overtakes a write of the other.
        drop(connection);
        while !attendance.leave(Instant::now() + DRAIN_REPORT) {
            warn!("{}: requests are still in flight; waiting for the storage", self.name);
        }
        Ok(end)
    }
}

/// Waits for whatever comes next and deals with it.
fn serve_once(
    name: &str,
    connection: &mut Connection,
    attendance: &mut Attendance<'_>,
    events: &Events,
) -> Result<Option<End>, ConnectionError> {
    // A client that does not read its replies is not read from either.
    let sources = attendance
        .watcher
        .wait(connection, connection.sender.has_pending())
        .map_err(|source| ConnectionError::Socket { action: "wait for", source })?;
    for source in sources {
        match source {
            Source::Stop => return Ok(Some(End::Server)),
            Source::Socket => {
                connection.sender.flush()?;
                if let Some(end) = receive(name, connection, attendance)? {
                    return Ok(Some(end));
                }
            }
            Source::Events => {
                events.drain();
                while let Some(event) = events.pop() {
                    match event {
                        Event::Fault { queue, error } => {
                            error!("{name}: queue {queue}: {error}; the device needs a reset");
                            attendance.needs_reset();
                        }
                        Event::BlankRing { queue } => error!(
                            "{name}: queue {queue} was kicked, but its ring is blank: the guest's RAM is not shared with \
                             this server. Start QEMU with -object memory-backend-memfd,id=mem,size=...,share=on and \
                             -machine memory-backend=mem"
                        ),
                    }
                }
            }
            Source::Doorbell(queue) => attendance.doorbell(queue),
            Source::MaskIntx => attendance.mask_intx(),
            Source::UnmaskIntx => attendance.unmask_intx(),
        }
    }
    Ok(None)
}

/// Answers the messages that have arrived, some at most.
fn receive(
    name: &str,
    connection: &mut Connection,
    attendance: &mut Attendance<'_>,
) -> Result<Option<End>, ConnectionError> {
    let Connection { receiver, sender, .. } = connection;
    for _ in 0..MESSAGES_AT_ONCE {
        if sender.has_pending() {
            break;
        }
        match receiver.receive()? {
            Received::Command { command, reply_to, payload, fds } => match Request::decode(command, payload) {
                Ok(request) => {
                    attendance.answer(sender, reply_to, request, payload.len(), fds)?;
                }
                Err(errno) => {
                    debug!("{name}: command {command} refused: {errno}");
                    sender.refuse(reply_to, errno)?;
                }
            },
            Received::Refused { reply_to, errno } => {
                warn!("{name}: a message (command {}) was refused: {errno}", reply_to.command());
                sender.refuse(reply_to, errno)?;
            }
            // We send no commands.
            Received::Reply { .. } => debug!("{name}: a reply to nothing was ignored"),
            Received::WouldBlock => break,
            Received::Closed => return Ok(Some(End::Client)),
        }
    }
    Ok(None)
}
