//! A connection that is ready for requests, and how it comes to be.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::error::HandshakeError;
use super::handshake::{self, Agreement};
use super::replies::{Asked, Event, Outstanding, Replies, Violation};
use super::socket::{Resolved, Stream};
use super::tls::{Encrypted, Session, Tls};
use super::wire::{self, Command, CommandType};

/// How to reach an export.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    pub(super) address: Resolved,
    pub(super) export: String,
    pub(super) tls: Option<Tls>,
}

/// A connection after its handshake, with nothing in flight.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: OwnedFd,
    pub(super) tls: Option<Session>,
    pub(super) agreement: Agreement,
}

impl Dialer {
    /// Connects and agrees on the export, or fails before `limit` is over.
    pub(super) fn dial(&self, limit: Duration) -> Result<Link, HandshakeError> {
        let deadline = Instant::now() + limit;
        let socket = self.address.connect(deadline)?;
        let mut stream = Stream { socket: &socket, deadline };
        let answers = self.address.answers();
        handshake::greet(&mut stream)?;
        let (tls, agreement) = match &self.tls {
            None => (None, handshake::negotiate(&mut stream, &self.export, answers)?),
            Some(tls) => {
                handshake::start_tls(&mut stream)?;
                let mut session = tls.session()?;
                session.handshake(&mut stream)?;
                let mut encrypted = Encrypted { session: &mut session, stream: &mut stream };
                let agreement = handshake::negotiate(&mut encrypted, &self.export, answers)?;
                (Some(session), agreement)
            }
        };
        Ok(Link { socket, tls, agreement })
    }
}

/// The one request of a flush.
struct Flush;

const COOKIE: u64 = u64::from_be_bytes(*b"theflush");

impl Outstanding for Flush {
    fn asked(&self, cookie: u64) -> Option<Asked> {
        (cookie == COOKIE).then_some(Asked::Other)
    }
}

impl Link {
    /// Puts what was written on stable storage, and waits for that.
    pub(super) fn flush(&mut self, limit: Duration) -> std::io::Result<()> {
        let Self { socket, tls, agreement } = self;
        if !agreement.export.features.flush {
            return Ok(());
        }
        let mut stream = Stream { socket, deadline: Instant::now() + limit };
        match tls {
            None => flush(&mut stream, agreement.structured),
            Some(session) => flush(&mut Encrypted { session, stream: &mut stream }, agreement.structured),
        }
    }
}

fn flush(stream: &mut (impl Read + Write), structured: bool) -> std::io::Result<()> {
    let mut request = Vec::new();
    Command { kind: CommandType::Flush, flags: 0, offset: 0, len: 0 }.encode(COOKIE, &mut request);
    stream.write_all(&request)?;
    stream.flush()?;
    let broken = |violation: Violation| std::io::Error::new(std::io::ErrorKind::InvalidData, violation);
    let (mut replies, mut byte, mut failed) = (Replies::new(structured), [0], 0);
    loop {
        stream.read_exact(&mut byte)?;
        let mut input = &byte[..];
        while let Some(event) = replies.next(&mut input, &Flush).map_err(broken)? {
            match event {
                Event::Error { error, .. } => failed = wire::errno(error),
                Event::End { .. } if failed != 0 => return Err(std::io::Error::from_raw_os_error(failed)),
                Event::End { .. } => return Ok(()),
                Event::Data { .. } | Event::Zeroes { .. } => {}
            }
        }
    }
}
