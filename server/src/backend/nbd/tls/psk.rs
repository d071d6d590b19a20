//! Pre-shared keys, by OpenSSL.
//!
//! The server proves that it has the key, and so do we: there is no certificate on either side. TLS 1.3 takes the key
//! together with a fresh exchange (`psk_dhe_ke`); TLS 1.2 does so by the suites of RFC 5489 and RFC 5487 whose data is authenticated as it
//! is encrypted. A server that answers by a certificate is refused.
//!
//! OpenSSL reads no configuration here, and gets at no file or socket: its bytes come from and go to memory.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::error::ErrorStack;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslSessionCacheMode, SslStream,
    SslVerifyMode, SslVersion,
};

use super::super::error::HandshakeError;
use super::keys::{self, Key};
use super::{Plain, TlsError};

/// Bytes that were received and not deciphered, at most: a record has 16 KiB, and what encryption adds.
const MAX_RECEIVED: usize = 20 << 10;
/// Bytes that are to be sent, at most; nobody writes as much at a time.
const MAX_SENT: usize = 1 << 20;

/// A key of this kind belongs to SHA-256 (RFC 8446, section 4.2.11): no other suite could use it.
const TLS13: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// The key alone, without a fresh exchange, is not among them: who learns it later could read what was recorded.
const TLS12: &str =
    "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES128-GCM-SHA256:DHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384";

/// Why OpenSSL has given up.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum PskError {
    #[error(
        "the server shows a certificate, and no pre-shared key: start it with the key (nbdkit --tls-psk=FILE, QEMU's \
         tls-creds-psk), or name the folder of certificates by nbd_tls_dir"
    )]
    Certificate,
    #[error(
        "the server does not take the key of {username:?} in {}: name and key must be as they are in its own file, and TLS \
         be 1.3, or 1.2 with ECDHE-PSK or DHE-PSK and authenticated encryption ({why})",
        file.display()
    )]
    Refused { username: String, file: PathBuf, why: String },
    #[error("{0}")]
    Broken(String),
    #[error(transparent)]
    OpenSsl(#[from] ErrorStack),
}

/// Whose key, and where it is from.
#[derive(Debug)]
struct Owner {
    username: String,
    file: PathBuf,
}

impl Owner {
    fn refused(&self, why: String) -> PskError {
        PskError::Refused { username: self.username.clone(), file: self.file.clone(), why }
    }
}

/// What sessions are made of.
#[derive(Clone, Debug)]
pub(in super::super) struct Psk {
    context: SslContext,
    owner: Arc<Owner>,
}

impl Psk {
    /// Reads the user's key.
    pub(super) fn load(file: &Path, username: &str) -> Result<Self, HandshakeError> {
        let key = keys::load(file, username)?;
        let owner = Arc::new(Owner { username: username.to_owned(), file: file.to_owned() });
        let context = context(key, &owner).map_err(|error| TlsError::from(PskError::from(error)))?;
        Ok(Self { context, owner })
    }

    /// A session that has not begun.
    pub(super) fn session(&self) -> Result<PskSession, PskError> {
        let buffers = Buffers { received: vec![0; MAX_RECEIVED], from: 0, to: 0, sent: Vec::new() };
        let stream = SslStream::new(Ssl::new(&self.context)?, buffers)?;
        Ok(PskSession { stream, owner: Arc::clone(&self.owner) })
    }
}

fn context(key: Key, owner: &Arc<Owner>) -> Result<SslContext, ErrorStack> {
    load_no_configuration();
    let mut builder = SslContextBuilder::new(SslMethod::tls_client())?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_ciphersuites(TLS13)?;
    builder.set_cipher_list(TLS12)?;
    builder.set_options(SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION | SslOptions::NO_COMPRESSION);
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    // In TLS 1.3 a server could answer by a certificate all the same: there is none that would do.
    builder.set_verify_callback(SslVerifyMode::PEER, |_, _| false);
    let owner = Arc::clone(owner);
    builder.set_psk_client_callback(move |_, _, identity, secret| {
        let (name, bytes) = (owner.username.as_bytes(), key.bytes());
        let Some((name_place, [end, ..])) = identity.split_at_mut_checked(name.len()) else { return Ok(0) };
        let Some(place) = secret.get_mut(..bytes.len()) else { return Ok(0) };
        name_place.copy_from_slice(name);
        *end = 0;
        place.copy_from_slice(bytes);
        Ok(bytes.len())
    });
    Ok(builder.build())
}

/// Has OpenSSL start without its configuration file, wherever the system or `OPENSSL_CONF` says that it is: it can
/// name modules to be loaded.
fn load_no_configuration() {
    // OPENSSL_init_crypto(3); the binding has no name for it.
    const OPENSSL_INIT_NO_LOAD_CONFIG: u64 = 0x80;
    let options = OPENSSL_INIT_NO_LOAD_CONFIG | openssl_sys::OPENSSL_INIT_NO_ATEXIT;
    // SAFETY: It may be called at any time, by any thread and more than once; it takes no settings. What it could not do shows in
    // the first call that needs it.
    unsafe { openssl_sys::OPENSSL_init_ssl(options, std::ptr::null()) };
}

/// What OpenSSL takes for a socket.
#[derive(Debug)]
struct Buffers {
    received: Vec<u8>,
    /// The part of `received` that was not read yet.
    from: usize,
    to: usize,
    sent: Vec<u8>,
}

impl Read for Buffers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.received.get(self.from..self.to).unwrap_or_default().read(into)?;
        self.from = self.from.saturating_add(len);
        if len == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
    }
}

impl Write for Buffers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What a server provokes counts too, such as answers to new keys that it takes no more.
        if self.sent.len().saturating_add(bytes.len()) > MAX_SENT {
            return Err(io::Error::other("the server does not take what it has asked for"));
        }
        self.sent.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One connection's encryption.
#[derive(Debug)]
pub(in super::super) struct PskSession {
    stream: SslStream<Buffers>,
    owner: Arc<Owner>,
}

impl PskSession {
    pub(super) fn receive(&mut self, from: &mut dyn Read) -> Result<usize, TlsError> {
        let buffers = self.stream.get_mut();
        if buffers.from == buffers.to {
            (buffers.from, buffers.to) = (0, 0);
        }
        let room = buffers.received.get_mut(buffers.to..).unwrap_or_default();
        if room.is_empty() {
            return Err(PskError::Broken("what was received is not read".to_owned()).into());
        }
        let len = from.read(room)?;
        buffers.to = buffers.to.saturating_add(len);
        Ok(len)
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<Plain, TlsError> {
        match self.stream.ssl_read(into) {
            Ok(0) => Ok(Plain::Nothing),
            Ok(len) => Ok(Plain::Bytes(len)),
            Err(error) => match error.code() {
                ErrorCode::WANT_READ => Ok(Plain::Nothing),
                ErrorCode::ZERO_RETURN => Ok(Plain::Closed),
                _ => Err(broken(error)),
            },
        }
    }

    pub(super) fn write(&mut self, mut plain: &[u8]) -> Result<(), TlsError> {
        while !plain.is_empty() {
            let written = self.stream.ssl_write(plain).map_err(broken)?;
            plain = plain.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    pub(super) fn wants_write(&self) -> bool {
        !self.stream.get_ref().sent.is_empty()
    }

    pub(super) fn send(&mut self, into: &mut dyn Write) -> io::Result<()> {
        let sent = &mut self.stream.get_mut().sent;
        into.write_all(sent)?;
        sent.clear();
        Ok(())
    }

    /// Goes on with the handshake: whether it is done.
    pub(super) fn advance(&mut self) -> Result<bool, TlsError> {
        if let Err(error) = self.stream.connect() {
            return match error.code() {
                ErrorCode::WANT_READ => Ok(false),
                _ => Err(self.refused(error)),
            };
        }
        // The key is taken as a session that was before.
        let ssl = self.stream.ssl();
        let by_key = ssl.session_reused() || ssl.version2() == Some(SslVersion::TLS1_2);
        if by_key && ssl.peer_certificate().is_none() { Ok(true) } else { Err(PskError::Certificate.into()) }
    }

    /// Why a handshake has ended.
    fn refused(&self, error: openssl::ssl::Error) -> TlsError {
        let reasons = error.ssl_error().map(reasons).unwrap_or_default();
        if reasons.is_empty() {
            return broken(error);
        }
        if reasons.iter().any(|reason| reason == "certificate verify failed") {
            return PskError::Certificate.into();
        }
        self.owner.refused(reasons.join(", ")).into()
    }

    /// The server has ended the connection in the handshake: nbdkit and QEMU say no word about keys that they do not know.
    pub(super) fn hung_up(&self, error: TlsError) -> TlsError {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error {
            TlsError::Io(error) if matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe) => {
                self.owner.refused("it ended the connection".to_owned()).into()
            }
            error => error,
        }
    }
}

fn reasons(stack: &ErrorStack) -> Vec<String> {
    stack.errors().iter().map(|error| error.reason().unwrap_or("an error without a name").to_owned()).collect()
}

/// Why a session has ended.
fn broken(error: openssl::ssl::Error) -> TlsError {
    match error.into_io_error() {
        Ok(error) => TlsError::Io(error),
        Err(error) => {
            let reasons = error.ssl_error().map(reasons).unwrap_or_default();
            PskError::Broken(if reasons.is_empty() { error.to_string() } else { reasons.join(", ") }).into()
        }
    }
}

#[cfg(test)]
mod tests;
