//! Certificates as QEMU and nbdkit lay them out in a folder: `ca-cert.pem` of the authority that has signed the server's, and
//! `client-cert.pem` with `client-key.pem` where the server wants to know who we are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::super::error::HandshakeError;
use super::super::uri::Address;

/// What sessions are made of.
#[derive(Clone, Debug)]
pub(in super::super) struct Certificates {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Certificates {
    /// Reads the certificates; the server's must be for `name`, or for the address's host if there is no such name.
    pub(super) fn load(dir: &Path, name: Option<&str>, address: &Address) -> Result<Self, HandshakeError> {
        let authority = dir.join("ca-cert.pem");
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&authority)? {
            roots.add(certificate).map_err(|error| refused(&authority, &error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = versions.map_err(|error| refused(dir, &error))?.with_root_certificates(roots);
        let (certificate, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
        let config = if certificate.exists() || key.exists() {
            let own = PrivateKeyDer::from_pem_file(&key).map_err(|error| refused(&key, &error))?;
            let chain = certificates(&certificate)?;
            builder.with_client_auth_cert(chain, own).map_err(|error| refused(&certificate, &error))?
        } else {
            builder.with_no_client_auth()
        };
        let name = match (name, address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            (None, Address::Unix(_)) => "localhost",
        };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| HandshakeError::HostName(name.to_owned()))?;
        Ok(Self { config: Arc::new(config), name })
    }

    /// A session that has not begun.
    pub(super) fn session(&self) -> Result<ClientConnection, rustls::Error> {
        let mut session = ClientConnection::new(Arc::clone(&self.config), self.name.clone())?;
        // What is written to it at a time is bounded by its user.
        session.set_buffer_limit(None);
        Ok(session)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HandshakeError> {
    let all = CertificateDer::pem_file_iter(path).map_err(|error| refused(path, &error))?;
    let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|error| refused(path, &error))?;
    if all.is_empty() {
        return Err(refused(path, &"there is no certificate in it"));
    }
    Ok(all)
}

fn refused(path: &Path, why: &dyn std::fmt::Display) -> HandshakeError {
    HandshakeError::Credentials { path: PathBuf::from(path), why: why.to_string() }
}
