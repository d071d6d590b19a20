//! What goes wrong between a server and us, and what can be done about it.

use std::io;
use std::path::PathBuf;

use super::tls::TlsError;

/// An export that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{uri}: {reason}")]
pub struct NbdError {
    pub(super) uri: String,
    pub(super) reason: Box<HandshakeError>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("cannot look its host up: {0}")]
    Resolve(#[source] io::Error),
    #[error("its host has no address")]
    NoAddress,
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    #[error("the connection failed during the handshake: {0}")]
    Io(#[source] io::Error),
    #[error("the server did not finish the handshake in time")]
    Timeout,
    #[error("what answers there is no NBD server, or one of before 2011 (it does not say NBDMAGIC and IHAVEOPT)")]
    NoServer,
    #[error("the server has no fixed newstyle handshake, which every server has had since 2012")]
    Old,
    #[error("the server breaks the protocol in the handshake: {0}")]
    Nonsense(&'static str),
    #[error("the server sent more than a handshake has")]
    TooMuch,
    #[error("the server does not know NBD_OPT_GO, which nbdkit (1.2), qemu-nbd (2.9) and nbd-server (3.16) do")]
    NoGo,
    #[error("the server has no export of this name{}", told(.0))]
    NoExport(String),
    #[error("the server wants TLS: write nbds:// or nbds+unix://, and see nbd_tls_dir")]
    WantsTls,
    #[error("the server has no TLS{}: write nbd:// or nbd+unix:// if the connection may be read and changed by others", told(.0))]
    NoTls(String),
    #[error("the server refuses (error {code:#x}){}", told(.message))]
    Refused { code: u32, message: String },
    #[error("the export's size is 0")]
    Empty,
    #[error("the export's size of {size} bytes is no multiple of its block of {block} bytes")]
    Size { size: u64, block: u32 },
    #[error("block sizes that make no sense, or are of no use: {minimum} to {maximum} bytes, {preferred} preferred")]
    BlockSizes { minimum: u32, preferred: u32, maximum: u32 },
    #[error("the export has changed: its size is another, or it can do less than before; start this server anew")]
    Changed,
    #[error(
        "nbds:// needs the folder of its certificates (nbd_tls_dir), or the file of a pre-shared key (nbd_tls_psk_file)"
    )]
    NoCredentials,
    #[cfg(not(feature = "psk"))]
    #[error("this program was built without pre-shared keys: see psk in docs/stores.md")]
    NoPsk,
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    #[error("{}: {why}", path.display())]
    Credentials { path: PathBuf, why: String },
    #[error("{0:?} is no name that a certificate could have been issued for")]
    HostName(String),
}

/// What a server adds, in words.
fn told(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message:?}") }
}

impl From<TlsError> for HandshakeError {
    fn from(error: TlsError) -> Self {
        io::Error::from(error).into()
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Timeout,
            // What TLS does not like, see `TlsError`.
            io::ErrorKind::InvalidData => Self::Tls(error),
            _ => Self::Io(error),
        }
    }
}
