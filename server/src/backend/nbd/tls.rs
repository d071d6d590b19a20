//! TLS, as QEMU and nbdkit have it: by certificates, or by keys that both sides know before.
//!
//! - `certificates`: by rustls.
//! - `psk`, `keys`: by OpenSSL, since rustls has no keys that come from outside; only with the feature `psk`.
//!
//! A session here has no socket: what was received is put into it, and what is to be sent is taken out.

mod certificates;
#[cfg(feature = "psk")]
mod keys;
#[cfg(feature = "psk")]
mod psk;

use std::io::{self, Read, Write};
use std::path::PathBuf;

use rustls::ClientConnection;

use super::error::HandshakeError;
use super::uri::Address;
use certificates::Certificates;

/// By what a server and we know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// Certificates.
    Certificates {
        /// The folder with `ca-cert.pem` and, if the server wants to know us, `client-cert.pem` and `client-key.pem`.
        dir: PathBuf,
        /// The name in the server's certificate, if it is another than the URI's host.
        hostname: Option<String>,
    },
    /// A key that both have, for which the program must be built with the feature `psk`.
    PreSharedKey {
        /// A file as GnuTLS's `psktool` makes it: `USERNAME:KEY` in each line, the key in hexadecimal digits.
        file: PathBuf,
        /// Whose key of those in the file.
        username: String,
    },
}

/// What sessions are made of.
#[derive(Clone, Debug)]
pub(super) enum Tls {
    Certificates(Certificates),
    #[cfg(feature = "psk")]
    PreSharedKey(psk::Psk),
}

impl Tls {
    /// Reads what there is in files.
    pub(super) fn load(credentials: &Credentials, address: &Address) -> Result<Self, HandshakeError> {
        match credentials {
            Credentials::Certificates { dir, hostname } => {
                Certificates::load(dir, hostname.as_deref(), address).map(Self::Certificates)
            }
            #[cfg(feature = "psk")]
            Credentials::PreSharedKey { file, username } => psk::Psk::load(file, username).map(Self::PreSharedKey),
            #[cfg(not(feature = "psk"))]
            Credentials::PreSharedKey { .. } => Err(HandshakeError::NoPsk),
        }
    }

    /// A session that has not begun.
    pub(super) fn session(&self) -> Result<Session, TlsError> {
        Ok(match self {
            Self::Certificates(certificates) => Session::Certificates(Box::new(certificates.session()?)),
            #[cfg(feature = "psk")]
            Self::PreSharedKey(psk) => Session::PreSharedKey(Box::new(psk.session()?)),
        })
    }
}

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    /// Nothing of TLS's: what its bytes go through.
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Certificates(#[from] rustls::Error),
    #[cfg(feature = "psk")]
    #[error(transparent)]
    PreSharedKey(#[from] psk::PskError),
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Io(error) => error,
            error => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// What was deciphered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    /// So many bytes, more than none.
    Bytes(usize),
    /// None before more is received.
    Nothing,
    /// None any more: the server has said so.
    Closed,
}

/// One connection's encryption.
#[derive(Debug)]
pub(super) enum Session {
    Certificates(Box<ClientConnection>),
    #[cfg(feature = "psk")]
    PreSharedKey(Box<psk::PskSession>),
}

impl Session {
    /// Takes in bytes that the server has sent, as many as it has room for: how many those are. All that there is to be
    /// [read](Self::read) must have been read before.
    pub(super) fn receive(&mut self, from: &mut dyn Read) -> Result<usize, TlsError> {
        match self {
            Self::Certificates(session) => {
                let received = session.read_tls(from)?;
                session.process_new_packets()?;
                Ok(received)
            }
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.receive(from),
        }
    }

    /// Deciphers.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Plain, TlsError> {
        match self {
            Self::Certificates(session) => match session.reader().read(into) {
                Ok(0) => Ok(Plain::Closed),
                Ok(len) => Ok(Plain::Bytes(len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Plain::Nothing),
                Err(error) => Err(error.into()),
            },
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.read(into),
        }
    }

    /// Enciphers all of it. How much that is at a time is bounded by the caller.
    pub(super) fn write(&mut self, plain: &[u8]) -> Result<(), TlsError> {
        match self {
            Self::Certificates(session) => Ok(session.writer().write_all(plain)?),
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.write(plain),
        }
    }

    /// Whether there is something to be sent.
    pub(super) fn wants_write(&self) -> bool {
        match self {
            Self::Certificates(session) => session.wants_write(),
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.wants_write(),
        }
    }

    /// Gives out all that is to be sent.
    pub(super) fn send(&mut self, into: &mut dyn Write) -> io::Result<()> {
        while self.wants_write() {
            match self {
                Self::Certificates(session) => session.write_tls(into).map(drop)?,
                #[cfg(feature = "psk")]
                Self::PreSharedKey(session) => session.send(into)?,
            }
        }
        Ok(())
    }

    /// Goes on with the handshake: whether it is done.
    fn advance(&mut self) -> Result<bool, TlsError> {
        match self {
            Self::Certificates(session) => Ok(!session.is_handshaking()),
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.advance(),
        }
    }

    /// The handshake, over a stream that waits.
    pub(super) fn handshake(&mut self, stream: &mut (impl Read + Write)) -> Result<(), TlsError> {
        loop {
            let outcome = match self.advance() {
                Ok(false) if !self.wants_write() => match self.receive(stream) {
                    Ok(0) => Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into())),
                    received => received.map(|_| false),
                },
                outcome => outcome,
            };
            // What is there to be sent after an error tells the server of it.
            let sent = self.send(stream).and_then(|()| stream.flush()).map_err(TlsError::Io);
            if outcome.and_then(|done| sent.map(|()| done)).map_err(|error| self.hung_up(error))? {
                return Ok(());
            }
        }
    }

    /// Says what it means that a server ends the connection in the handshake.
    fn hung_up(&self, error: TlsError) -> TlsError {
        match self {
            Self::Certificates(_) => error,
            #[cfg(feature = "psk")]
            Self::PreSharedKey(session) => session.hung_up(error),
        }
    }
}

/// A stream that waits, with what goes through it encrypted. Nothing is kept here: what was not read is the session's.
pub(super) struct Encrypted<'a, S> {
    pub(super) session: &'a mut Session,
    pub(super) stream: &'a mut S,
}

impl<S: Read + Write> Read for Encrypted<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            match self.session.read(into)? {
                Plain::Bytes(len) => return Ok(len),
                Plain::Closed => return Ok(0),
                Plain::Nothing => self.flush()?,
            }
            if self.session.receive(self.stream)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<S: Read + Write> Write for Encrypted<'_, S> {
    fn write(&mut self, plain: &[u8]) -> io::Result<usize> {
        self.session.write(plain)?;
        Ok(plain.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.session.send(self.stream)?;
        self.stream.flush()
    }
}
