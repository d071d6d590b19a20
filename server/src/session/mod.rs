//! One device's side of its socket: one client at a time.
//!
//! Each device has a thread of its own here, which does all that is not a request: it answers the client's messages, maps its
//! memory, starts and stops queues. It sleeps whenever the client is silent, and nothing it waits for is waited for without
//! an end. How a message becomes an [`Effect`](pci::Effect) is the function's business, what follows from it is in
//! [`attendance`].

mod allowance;
mod attendance;
mod client_log;
mod data_path;
mod dma;
mod events;
mod irqs;
mod negotiation;
mod obedience;
mod observation;
mod orders;
mod signal;
mod watcher;

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_user::{Connection, ConnectionError, Limits, Received, Request};

use crate::backend::faults::Breakdown;
use crate::config::ClientLimits;
use crate::device::Device;
use crate::listener::{Arrival, Listener};
use crate::status::Peer;
use crate::worker::Pool;
use attendance::Attendance;
use client_log::ClientLog;
use events::Event;
pub(crate) use events::Events;
use obedience::{Obey, Obeyed};
pub(crate) use observation::{Observation, ObservedQueue};
#[cfg(test)]
pub(crate) use observation::{ObservedFile, ObservedMemory, Protocol};
pub(crate) use orders::{Operator, Order, OrderError, Orders, orders};
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
    log: ClientLog,
    device: Device,
    listener: Listener,
    pool: Arc<Pool>,
    stop: Arc<Stop>,
    orders: Orders,
}

/// Why a session with one client ended.
enum End {
    /// The client went, or had to go.
    Client,
    /// The server stops, or the device is removed from it.
    Service,
}

impl Session {
    pub(crate) fn new(device: Device, listener: Listener, pool: Arc<Pool>, stop: Arc<Stop>, orders: Orders) -> Self {
        Self { log: ClientLog::new(listener.path().display()), device, listener, pool, stop, orders }
    }

    /// Serves one client after the other until the service ends; then everything that was completed is on stable storage.
    ///
    /// # Errors
    /// If no client can be listened for, or the storage fails at the end.
    pub(crate) fn run(mut self) -> std::io::Result<()> {
        loop {
            let stream = match self.listener.accept([self.stop.as_fd(), self.orders.as_fd()])? {
                Arrival::Client(stream) => stream,
                Arrival::Woken(1) => match self.device.obey(&self.orders) {
                    Obeyed::GoOn | Obeyed::Disconnected | Obeyed::Closed => continue,
                    Obeyed::Removed => break,
                },
                Arrival::Woken(_) => break,
            };
            self.log.info(format_args!("a client has connected"));
            self.device.status.update(|status| status.client = Peer::of(&stream));
            // What the system refuses, for want of descriptors perhaps, it refuses this client; the next may have more luck.
            let end = self.attend(stream).unwrap_or_else(|error| {
                self.log.error(format_args!("the client cannot be served: {error}"));
                End::Client
            });
            self.device.status.update(|status| status.client = None);
            match end {
                End::Client => self.log.info(format_args!("the client has gone; waiting for the next")),
                End::Service => break,
            }
        }
        self.device.service.flush()
    }

    /// Serves one client from its first message until it has gone and nothing of it is left.
    fn attend(&mut self, stream: UnixStream) -> Result<End, Box<dyn Error>> {
        let mut connection = Connection::new(stream, message_limits(&self.device.limits))?;
        let events = Arc::new(Events::new()?);
        let watcher = Watcher::new(&connection, &events, &self.stop, &self.orders)?;
        let mut attendance =
            Attendance::new(&self.log, &mut self.device, Arc::clone(&self.pool), Arc::clone(&events), watcher);
        let end = loop {
            match serve_once(&self.log, &mut connection, &mut attendance, &events, &self.orders) {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(error) => {
                    self.log.warn(format_args!("{error}"));
                    break End::Client;
                }
            }
        };
        // The client learns that it is over at once; what it has in flight ends before the next one is served, so
        // that no late write of the one overtakes a write of the other.
        drop(connection);
        while !attendance.leave(Instant::now() + DRAIN_REPORT) {
            self.log.warn(format_args!("requests are still in flight; waiting for the storage"));
        }
        Ok(end)
    }
}

/// The bounds of messages, with room for what surrounds the bytes of a region access. Two of the largest may wait.
fn message_limits(limits: &ClientLimits) -> Limits {
    let max_message_size = (limits.data_xfer_size as usize).saturating_add(4096);
    Limits { max_message_size, max_pending: max_message_size.saturating_mul(2), ..Limits::default() }
}

/// Waits for whatever comes next and deals with it.
fn serve_once(
    log: &ClientLog,
    connection: &mut Connection,
    attendance: &mut Attendance<'_>,
    events: &Events,
    orders: &Orders,
) -> Result<Option<End>, ConnectionError> {
    // A client that does not read its replies is not read from either.
    let sources = attendance
        .watcher
        .wait(connection, connection.sender.has_pending())
        .map_err(|source| ConnectionError::Socket { action: "wait for", source })?;
    // Before all else: what the queues have made of such memory is not the guest's doing.
    if events.loss().happened() {
        log.error(format_args!(
            "memory of the client's is gone while the device was using it: its file was made shorter, or there are no pages \
             for it. The session ends"
        ));
        return Ok(Some(End::Client));
    }
    for source in sources {
        match source {
            Source::Stop => return Ok(Some(End::Service)),
            Source::Orders => match attendance.obey(orders) {
                Obeyed::GoOn => {}
                Obeyed::Disconnected => return Ok(Some(End::Client)),
                Obeyed::Closed => return Ok(Some(closed(log))),
                Obeyed::Removed => return Ok(Some(End::Service)),
            },
            Source::Socket => {
                connection.sender.flush()?;
                if let Some(end) = receive(log, connection, attendance)? {
                    return Ok(Some(end));
                }
            }
            Source::Events => {
                events.drain();
                while let Some(event) = events.pop() {
                    match event {
                        Event::Fault { queue, error } => {
                            log.error(format_args!("queue {queue}: {error}; the device needs a reset"));
                            attendance.needs_reset(queue, &error);
                        }
                        Event::BlankRing { queue } => {
                            attendance.notes.found_blank = true;
                            log.error(format_args!(
                                "queue {queue} was kicked, but its ring is blank: the guest's RAM is not shared with \
                                 this server. Start QEMU with -object memory-backend-memfd,id=mem,size=...,share=on and \
                                 -machine memory-backend=mem"
                            ));
                        }
                        Event::Breakdown(Breakdown::NeedsReset) => attendance.break_down(),
                        Event::Breakdown(Breakdown::CloseSession) => return Ok(Some(closed(log))),
                    }
                }
            }
            Source::Doorbell(queue) => attendance.doorbell(queue),
            Source::MaskIntx => attendance.mask_intx(),
            Source::UnmaskIntx => attendance.unmask_intx(),
            // Looked at first.
            Source::MemoryLost => {}
        }
    }
    Ok(None)
}

/// The end of a session that nobody but an operator wants.
fn closed(log: &ClientLog) -> End {
    log.warn(format_args!("the session is closed on purpose"));
    End::Client
}

/// Answers the messages that have arrived, some at most.
fn receive(
    log: &ClientLog,
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
                    log.debug(format_args!("command {command} refused: {errno}"));
                    sender.refuse(reply_to, errno)?;
                }
            },
            Received::Refused { reply_to, errno } => {
                log.warn(format_args!("a message (command {}) was refused: {errno}", reply_to.command()));
                sender.refuse(reply_to, errno)?;
            }
            // We send no commands.
            Received::Reply { .. } => log.debug(format_args!("a reply to nothing was ignored")),
            Received::WouldBlock => break,
            Received::Closed => return Ok(Some(End::Client)),
        }
    }
    Ok(None)
}
