//! One queue's connection, on the thread of its worker: from link to link.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::{io, mem};

use nix::sys::socket::{Shutdown, shutdown};

use super::handshake::Agreement;
use super::link::Link;
use super::reconnect::Port;
use super::replies::{Event, Replies, Violation};
use super::request::Payload;
use super::requests::Requests;
use super::store::Shared;
use super::tls::{Plain, Session, TlsError};
use super::transfer::{Incoming, Outgoing, Transfer};
use super::wire::{CHUNK_LEN, SIMPLE_REPLY_LEN};
use crate::backend::uring::{Client, Uring};
use crate::backend::{Backend, Completion, Full, Io};

/// Requests of one message.
const BATCH: usize = 64;
/// Bytes of data that are encrypted at a time.
const TLS_BATCH: usize = 256 << 10;
/// Messages of one call, however fast a server answers: others wait for the worker too.
const ROUNDS: usize = 16;
/// Bytes of data that are decrypted at a time.
const PLAIN: usize = 16 << 10;

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum Loss {
    #[error("the server has closed it")]
    Closed,
    #[error(transparent)]
    System(#[from] io::Error),
    #[error("the server breaks the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("TLS: {0}")]
    Tls(TlsError),
    #[error("no answer for {0} seconds")]
    Silence(u64),
}

impl From<TlsError> for Loss {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Io(error) => Self::System(error),
            error => Self::Tls(error),
        }
    }
}

/// A link, with what it has in the ring.
struct Up {
    client: Client<Transfer>,
    socket: Rc<OwnedFd>,
    tls: Option<Session>,
    agreement: Agreement,
    replies: Replies,
    /// Whether the kernel has the one or the other.
    sending: bool,
    receiving: bool,
    /// Messages that are made, and found no room in the ring.
    unsent: Option<Transfer>,
    unreceived: Option<Transfer>,
    /// What was used before, to be used again.
    outgoing: Option<Outgoing>,
    incoming: Option<Incoming>,
}

enum State {
    Up(Box<Up>),
    /// It is given up; the kernel has not given all back.
    Closing(Box<Up>),
    /// There is none, and one was asked for.
    Down,
}

/// One queue's access to an export.
pub(super) struct Connection {
    shared: Arc<Shared>,
    ring: Rc<Uring>,
    port: Arc<Port>,
    requests: Requests,
    state: State,
    landed: Vec<Transfer>,
    /// Requests have waited for too long: those that there are fail when the connection is closed.
    failing: bool,
    stopping: bool,
}

impl Connection {
    /// Uses a link that is free, or asks for one.
    pub(super) fn new(shared: &Arc<Shared>, ring: &Rc<Uring>) -> io::Result<Self> {
        if !ring.has_kernel() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this store needs io_uring, which is not available",
            ));
        }
        let port = shared.port(ring.waker());
        let requests = Requests::new(&port);
        let (shared, ring) = (Arc::clone(shared), Rc::clone(ring));
        let (landed, state) = (Vec::new(), State::Down);
        let mut connection = Self { shared, ring, port, requests, state, landed, failing: false, stopping: false };
        match connection.shared.take_link() {
            Some(link) => connection.up(link),
            None => connection.port.connect(),
        }
        Ok(connection)
    }

    fn up(&mut self, link: Link) {
        let Link { socket, tls, mut agreement } = link;
        let socket = Rc::new(socket);
        if tls.is_some() {
            let export = &mut agreement.export;
            export.max_transfer = export.max_transfer.min(TLS_BATCH as u32 / export.block * export.block);
        }
        match Client::new(&self.ring, Rc::clone(&socket)) {
            Ok(client) => {
                self.state = State::Up(Box::new(Up {
                    client,
                    socket,
                    tls,
                    agreement,
                    replies: Replies::new(agreement.structured),
                    sending: false,
                    receiving: false,
                    unsent: None,
                    unreceived: None,
                    outgoing: Some(Outgoing::new()),
                    incoming: Some(Incoming::new()),
                }));
            }
            Err(error) => {
                log::error!("{}: {error}", self.shared.uri());
                self.port.connect();
            }
        }
    }

    /// Gives the connection up: what the kernel has of it comes back soon.
    fn lose(&mut self, loss: &Loss) {
        let up = match mem::replace(&mut self.state, State::Down) {
            State::Up(up) => up,
            // Send and receive fail one after the other.
            other => {
                self.state = other;
                return;
            }
        };
        log::warn!(
            "{}: the connection is lost: {loss}; {} requests have no answer",
            self.shared.uri(),
            self.requests.unanswered()
        );
        // Fails where the other side was faster.
        let _closed = shutdown(up.socket.as_raw_fd(), Shutdown::Both);
        self.state = State::Closing(up);
    }

    /// The kernel has nothing of the connection any more.
    fn closed(&mut self) {
        let State::Closing(mut up) = mem::replace(&mut self.state, State::Down) else { return };
        for transfer in [up.unsent.take(), up.unreceived.take()].into_iter().flatten() {
            self.take_back(transfer);
        }
        drop(up);
        self.requests.connection_lost(self.shared.deadline());
        if self.failing || self.stopping {
            self.failing = false;
            self.requests.fail_waiting();
        }
        if !self.stopping {
            self.port.connect();
        }
    }

    /// Requests that a message holds.
    fn take_back(&mut self, transfer: Transfer) {
        match transfer {
            Transfer::Send(outgoing) => outgoing.lent.into_iter().for_each(|lent| self.requests.give_back(lent)),
            Transfer::Receive(incoming) => incoming.lent.into_iter().for_each(|lent| self.requests.give_back(lent)),
        }
    }

    /// What the store's thread has to say.
    fn hear(&mut self) {
        if !self.port.take_news() {
            return;
        }
        if self.port.take_expired() && self.requests.pending() > 0 {
            self.failing = true;
            self.lose(&Loss::Silence(self.shared.deadline().as_secs()));
            if matches!(self.state, State::Down) {
                log::error!("{}: there is no server: {} requests fail", self.shared.uri(), self.requests.pending());
                self.failing = false;
                self.requests.fail_waiting();
            }
        }
        if let (Some(link), State::Down) = (self.port.take_link(), &self.state) {
            log::info!("{}: connected again", self.shared.uri());
            self.up(link);
        }
    }

    /// Takes what has come back from the kernel.
    fn landed(&mut self, transfer: Transfer) -> Result<(), Loss> {
        match transfer {
            Transfer::Send(outgoing) => self.sent(outgoing),
            Transfer::Receive(incoming) => self.received(incoming),
        }
    }

    fn sent(&mut self, mut outgoing: Outgoing) -> Result<(), Loss> {
        if outgoing.errno == Some(libc::EFAULT) {
            self.requests.unreachable(&mut outgoing);
        }
        outgoing.lent.drain(..).for_each(|lent| self.requests.give_back(lent));
        let errno = outgoing.errno;
        if let State::Up(up) | State::Closing(up) = &mut self.state {
            up.sending = false;
            up.outgoing = Some(outgoing);
        }
        errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno).into()))
    }

    fn received(&mut self, mut incoming: Incoming) -> Result<(), Loss> {
        let lent = incoming.lent.take();
        if let (Some(lent), Some(libc::EFAULT)) = (&lent, incoming.result.checked_neg()) {
            self.requests.faulty(lent.slot);
        }
        lent.into_iter().for_each(|lent| self.requests.give_back(lent));
        let State::Up(up) = &mut self.state else {
            if let State::Closing(up) = &mut self.state {
                up.receiving = false;
            }
            return Ok(());
        };
        up.receiving = false;
        let result = match incoming.result {
            0 => Err(Loss::Closed),
            ..0 => Err(io::Error::from_raw_os_error(incoming.result.saturating_neg()).into()),
            _ => {
                let (data, rest) = incoming.received();
                up.take_data(data, &mut self.requests).and_then(|()| up.take_rest(rest, &mut self.requests))
            }
        };
        up.incoming = Some(incoming);
        result
    }

    /// Sends and receives, where there is something to be sent or received and neither is under way. Whether anything was
    /// started.
    fn pump(&mut self) -> Result<bool, Loss> {
        match &mut self.state {
            State::Up(up) => up.pump(&mut self.requests),
            State::Closing(up) => {
                if up.client.in_flight() == 0 {
                    self.closed();
                }
                Ok(false)
            }
            State::Down => {
                if self.stopping {
                    self.requests.fail_waiting();
                }
                Ok(false)
            }
        }
    }

    fn round(&mut self) -> bool {
        let mut landed = mem::take(&mut self.landed);
        if let State::Up(up) | State::Closing(up) = &mut self.state {
            up.client.reap(|transfer| landed.push(transfer));
        }
        let any = !landed.is_empty();
        for transfer in landed.drain(..) {
            if let Err(loss) = self.landed(transfer) {
                self.lose(&loss);
            }
        }
        self.landed = landed;
        let started = self.pump().unwrap_or_else(|loss| {
            self.lose(&loss);
            false
        });
        if started && let State::Up(up) = &self.state {
            up.client.commit();
        }
        any || started
    }
}

impl Up {
    /// Data that went straight to the buffers.
    fn take_data(&mut self, bytes: u32, requests: &mut Requests) -> Result<(), Loss> {
        if let Some((cookie, _, _)) = self.replies.data().filter(|_| bytes > 0) {
            requests.covered(cookie, bytes.into())?;
            self.replies.skip(bytes);
        }
        Ok(())
    }

    /// What came besides.
    fn take_rest(&mut self, mut bytes: &[u8], requests: &mut Requests) -> Result<(), Loss> {
        let Some(tls) = &mut self.tls else { return Ok(parse(&mut self.replies, bytes, requests)?) };
        let mut plain = [0; PLAIN];
        while !bytes.is_empty() {
            tls.receive(&mut bytes)?;
            loop {
                match tls.read(&mut plain)? {
                    Plain::Bytes(len) => parse(&mut self.replies, plain.get(..len).unwrap_or_default(), requests)?,
                    Plain::Nothing => break,
                    Plain::Closed => return Err(Loss::Closed),
                }
            }
        }
        Ok(())
    }

    fn pump(&mut self, requests: &mut Requests) -> Result<bool, Loss> {
        let mut started = false;
        if !self.sending {
            if self.unsent.is_none() {
                self.unsent = self.message(requests)?.map(Transfer::Send);
            }
            self.sending = Self::start(&mut self.client, &mut self.unsent);
            started |= self.sending;
        }
        // Nothing is received while nothing is asked: a queue that is set aside must have nothing in the ring.
        if !self.receiving && requests.unanswered() > 0 {
            if self.unreceived.is_none() {
                self.unreceived = self.room(requests).map(Transfer::Receive);
            }
            self.receiving = Self::start(&mut self.client, &mut self.unreceived);
            started |= self.receiving;
        }
        Ok(started)
    }

    /// Starts a transfer, if there is one and there is room.
    fn start(client: &mut Client<Transfer>, transfer: &mut Option<Transfer>) -> bool {
        let Some(ready) = transfer.take() else { return false };
        *transfer = client.start(ready).err();
        transfer.is_none()
    }

    /// The next message; `None` if there is nothing to be sent.
    fn message(&mut self, requests: &mut Requests) -> Result<Option<Outgoing>, Loss> {
        let speaks = self.tls.as_ref().is_some_and(|tls| tls.wants_write());
        if !speaks && !requests.has_to_send() {
            return Ok(None);
        }
        let mut outgoing = self.outgoing.take().unwrap_or_else(Outgoing::new);
        outgoing.clear();
        match &mut self.tls {
            None => fill(&mut outgoing, requests, &self.agreement),
            Some(tls) => encrypt(&mut outgoing, tls, requests, &self.agreement)?,
        }
        if outgoing.is_empty() {
            self.outgoing = Some(outgoing);
            return Ok(None);
        }
        outgoing.seal();
        Ok(Some(outgoing))
    }

    /// Room for what is to come.
    fn room(&mut self, requests: &mut Requests) -> Option<Incoming> {
        let mut incoming = self.incoming.take().unwrap_or_else(Incoming::new);
        // Where data may follow, no more than what a reply begins with: else the data would have to be copied.
        let staging = match (&self.tls, requests.expects_data(), self.agreement.structured) {
            (Some(_), _, _) | (None, false, _) => Incoming::STAGING,
            (None, true, true) => CHUNK_LEN + size_of::<u64>(),
            (None, true, false) => SIMPLE_REPLY_LEN,
        };
        let data = self.replies.data().filter(|_| self.tls.is_none()).and_then(|(cookie, at, left)| {
            let from = requests.request(cookie)?.done().saturating_add(at.into());
            Some((requests.lend(cookie as u16)?, from, left.into()))
        });
        incoming.prepare(data, staging);
        Some(incoming)
    }

    /// Whether another queue may go on with it.
    fn is_at_rest(&self, requests: &Requests) -> bool {
        self.client.in_flight() == 0
            && requests.unanswered() == 0
            && self.unsent.is_none()
            && self.replies.is_between_replies()
            && self.tls.as_ref().is_none_or(|tls| !tls.wants_write())
    }
}

/// Fills a message with requests, whose buffers go as they lie.
fn fill(outgoing: &mut Outgoing, requests: &mut Requests, agreement: &Agreement) {
    for count in 0..BATCH {
        let alone = requests.next_is_alone();
        if !outgoing.has_room() || alone && count > 0 {
            break;
        }
        let Some((slot, cookie, command, payload)) = requests.next(&agreement.export) else { break };
        outgoing.append(|bytes| command.encode(cookie, bytes));
        match payload {
            Payload::Nothing => {}
            Payload::Zeroes => outgoing.append_zeroes(command.len as usize),
            Payload::Buffers { from } => {
                let lent = requests.lend(slot);
                lent.into_iter().for_each(|lent| outgoing.append_buffers(lent, from, command.len.into()));
            }
        }
        if alone {
            break;
        }
    }
}

/// Fills a message with requests, encrypted.
fn encrypt(
    outgoing: &mut Outgoing,
    tls: &mut Session,
    requests: &mut Requests,
    agreement: &Agreement,
) -> Result<(), Loss> {
    let (mut plain, mut piece) = (Vec::new(), vec![0; PLAIN]);
    let mut written = 0;
    while written < TLS_BATCH {
        let Some((_, cookie, command, payload)) = requests.next(&agreement.export) else { break };
        plain.clear();
        command.encode(cookie, &mut plain);
        tls.write(&plain)?;
        written += plain.len();
        let mut left = if payload == Payload::Nothing { 0 } else { command.len as usize };
        written += left;
        let mut place = if let Payload::Buffers { from } = payload { from } else { 0 };
        piece.fill(0);
        while left > 0 {
            let (bytes, _) = piece.split_at_mut(left.min(PLAIN));
            if let (Payload::Buffers { .. }, Some(request)) = (payload, requests.request(cookie)) {
                request.io.buffers.copy_to_slice(place, bytes);
            }
            tls.write(bytes)?;
            (place, left) = (place.saturating_add(bytes.len() as u64), left - bytes.len());
        }
    }
    let mut result = Ok(());
    outgoing.append(|bytes| result = tls.send(bytes));
    Ok(result?)
}

/// Understands what a server has sent.
fn parse(replies: &mut Replies, mut bytes: &[u8], requests: &mut Requests) -> Result<(), Violation> {
    while let Some(event) = replies.next(&mut bytes, requests)? {
        match event {
            Event::Data { cookie, at, bytes } => requests.copy(cookie, at, bytes)?,
            Event::Zeroes { cookie, at, len } => requests.zero(cookie, at, len)?,
            Event::Error { cookie, error } => requests.failed(cookie, error),
            Event::End { cookie } => requests.end(cookie)?,
        }
    }
    Ok(())
}

impl Backend for Connection {
    /// Only notes it: what a round has taken goes in one message, when the worker looks for what has completed.
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        self.requests.submit(io)
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.hear();
        for _ in 0..ROUNDS {
            if !self.round() {
                break;
            }
        }
        self.port.report(self.requests.pending() > 0, self.requests.progress());
        done.append(self.requests.done());
    }

    fn in_flight(&self) -> usize {
        self.requests.in_flight()
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.port.stop();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.port.close();
        let (State::Up(up) | State::Closing(up)) = mem::replace(&mut self.state, State::Down) else { return };
        if !up.is_at_rest(&self.requests) {
            // Has the kernel give back what it has.
            let _closed = shutdown(up.socket.as_raw_fd(), Shutdown::Both);
            return;
        }
        let Up { client, socket, tls, agreement, .. } = *up;
        drop(client);
        if let Some(socket) = Rc::into_inner(socket) {
            self.shared.give_back(Link { socket, tls, agreement });
        }
    }
}
