//! By what a device and its NBD server know each other.

use super::device::DeviceConfig;
use crate::backend::nbd::Credentials;

/// Whose key is meant where nobody is named, as with QEMU's clients.
const DEFAULT_USERNAME: &str = "qemu";
/// Bytes of a name, at most: more than that OpenSSL has not always taken.
const MAX_USERNAME: usize = 128;

/// Why TLS with an NBD server cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidNbdTls {
    /// Nothing to be encrypted.
    #[error("nbd_tls_*, and USERNAME@ and tls-psk-file in nbd_uri, are for nbds:// and nbds+unix:// only")]
    Unencrypted,
    /// Encryption with nobody knows whom.
    #[error(
        "nbds:// and nbds+unix:// need nbd_tls_dir, the folder of certificates, or nbd_tls_psk_file, the file of a pre-shared key"
    )]
    NoCredentials,
    /// The one thing said in two places.
    #[error("nbd_uri says by {0} what {1} says; leave one of them out")]
    Twice(&'static str, &'static str),
    /// Certificates and a key.
    #[error("{0} is for certificates, and there is a pre-shared key; leave one of them out")]
    OfCertificates(&'static str),
    /// A user without a key.
    #[error(
        "a username (nbd_tls_username, or USERNAME@ in nbd_uri) is that of a pre-shared key: add nbd_tls_psk_file, or leave it out"
    )]
    OfPreSharedKey,
    /// A name that no key can have.
    #[error("nbd_tls_username must have 1 to 128 bytes, none of them a colon or a control character")]
    Username,
    /// A program that has no pre-shared keys.
    #[error(
        "this vfio-user-blk was built without pre-shared keys: build it with `cargo build --release --features psk`, which \
         needs libssl-dev and pkg-config (docs/stores.md says more), or use certificates (nbd_tls_dir)"
    )]
    NotBuilt,
}

impl DeviceConfig {
    /// Whether a key says anything of TLS.
    pub(super) fn has_nbd_tls(&self) -> bool {
        self.nbd_tls_dir.is_some()
            || self.nbd_tls_hostname.is_some()
            || self.nbd_tls_psk_file.is_some()
            || self.nbd_tls_username.is_some()
    }

    /// By what its NBD server and it know each other; `None` without TLS.
    ///
    /// # Errors
    /// The first thing that makes no sense, or that this program cannot do.
    pub fn nbd_credentials(&self) -> Result<Option<Credentials>, InvalidNbdTls> {
        let credentials = self.described_credentials()?;
        match credentials {
            Some(Credentials::PreSharedKey { .. }) if !cfg!(feature = "psk") => Err(InvalidNbdTls::NotBuilt),
            credentials => Ok(credentials),
        }
    }

    /// The same, whatever this program can do.
    fn described_credentials(&self) -> Result<Option<Credentials>, InvalidNbdTls> {
        let uri = self.nbd_uri.as_ref();
        let (uri_file, uri_username) = (uri.and_then(|uri| uri.psk_file()), uri.and_then(|uri| uri.username()));
        if !uri.is_some_and(|uri| uri.is_tls()) {
            let any = self.has_nbd_tls() || uri_file.is_some() || uri_username.is_some();
            return if any { Err(InvalidNbdTls::Unencrypted) } else { Ok(None) };
        }
        if uri_file.is_some() && self.nbd_tls_psk_file.is_some() {
            return Err(InvalidNbdTls::Twice("tls-psk-file", "nbd_tls_psk_file"));
        }
        if uri_username.is_some() && self.nbd_tls_username.is_some() {
            return Err(InvalidNbdTls::Twice("USERNAME@", "nbd_tls_username"));
        }
        let username = self.nbd_tls_username.as_deref().or(uri_username);
        let Some(file) = self.nbd_tls_psk_file.as_deref().or(uri_file) else {
            let dir = self.nbd_tls_dir.clone().ok_or(InvalidNbdTls::NoCredentials);
            return match username {
                Some(_) => Err(InvalidNbdTls::OfPreSharedKey),
                None => Ok(Some(Credentials::Certificates { dir: dir?, hostname: self.nbd_tls_hostname.clone() })),
            };
        };
        if self.nbd_tls_dir.is_some() {
            return Err(InvalidNbdTls::OfCertificates("nbd_tls_dir"));
        }
        if self.nbd_tls_hostname.is_some() {
            return Err(InvalidNbdTls::OfCertificates("nbd_tls_hostname"));
        }
        let username = username.unwrap_or(DEFAULT_USERNAME);
        let is_odd = |char: char| char == ':' || char.is_control();
        if username.is_empty() || username.len() > MAX_USERNAME || username.contains(is_odd) {
            return Err(InvalidNbdTls::Username);
        }
        Ok(Some(Credentials::PreSharedKey { file: file.to_owned(), username: username.to_owned() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device by its URI and by `key=value` in words.
    fn device(uri: &str, keys: &str) -> DeviceConfig {
        let mut device = DeviceConfig::new("blk.sock");
        device.nbd_uri = Some(uri.parse().unwrap());
        for (key, value) in keys.split_whitespace().map(|word| word.split_once('=').unwrap()) {
            match key {
                "dir" => device.nbd_tls_dir = Some(value.into()),
                "hostname" => device.nbd_tls_hostname = Some(value.into()),
                "file" => device.nbd_tls_psk_file = Some(value.into()),
                "username" => device.nbd_tls_username = Some(value.into()),
                _ => panic!("{key}"),
            }
        }
        device
    }

    #[test]
    fn a_key_or_certificates_from_wherever_they_are_said() {
        let key =
            |file: &str, username: &str| Credentials::PreSharedKey { file: file.into(), username: username.into() };
        let dir = |hostname: Option<&str>| Credentials::Certificates {
            dir: "/c".into(),
            hostname: hostname.map(str::to_owned),
        };
        for (uri, keys, credentials) in [
            ("nbd://h/", "", None),
            ("nbds://h/", "dir=/c", Some(dir(None))),
            ("nbds://h/", "dir=/c hostname=x", Some(dir(Some("x")))),
            ("nbds://h/", "file=/k", Some(key("/k", "qemu"))),
            ("nbds://h/", "file=/k username=alice", Some(key("/k", "alice"))),
            ("nbds://alice@h/", "file=/k", Some(key("/k", "alice"))),
            ("nbds://h/?tls-psk-file=/u", "username=bob", Some(key("/u", "bob"))),
            ("nbds+unix://alice@/?socket=/s&tls-psk-file=/u", "", Some(key("/u", "alice"))),
        ] {
            assert_eq!(device(uri, keys).described_credentials(), Ok(credentials), "{uri} {keys}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let long = format!("file=/k username={}", "x".repeat(129));
        for (uri, keys, error) in [
            ("nbd://h/", "dir=/c", InvalidNbdTls::Unencrypted),
            ("nbd://h/", "file=/k", InvalidNbdTls::Unencrypted),
            ("nbd://alice@h/", "", InvalidNbdTls::Unencrypted),
            ("nbd://h/?tls-psk-file=/u", "", InvalidNbdTls::Unencrypted),
            ("nbds://h/", "", InvalidNbdTls::NoCredentials),
            ("nbds://h/", "hostname=x", InvalidNbdTls::NoCredentials),
            ("nbds://alice@h/", "dir=/c", InvalidNbdTls::OfPreSharedKey),
            ("nbds://h/", "username=alice", InvalidNbdTls::OfPreSharedKey),
            ("nbds://h/", "file=/k dir=/c", InvalidNbdTls::OfCertificates("nbd_tls_dir")),
            ("nbds://h/", "file=/k hostname=x", InvalidNbdTls::OfCertificates("nbd_tls_hostname")),
            ("nbds://h/?tls-psk-file=/u", "file=/k", InvalidNbdTls::Twice("tls-psk-file", "nbd_tls_psk_file")),
            ("nbds://a@h/", "file=/k username=a", InvalidNbdTls::Twice("USERNAME@", "nbd_tls_username")),
            ("nbds://h/", "file=/k username=a:b", InvalidNbdTls::Username),
            ("nbds://h/", "file=/k username=", InvalidNbdTls::Username),
            ("nbds://a%0ab@h/", "file=/k", InvalidNbdTls::Username),
            ("nbds://h/", &long, InvalidNbdTls::Username),
        ] {
            assert_eq!(device(uri, keys).described_credentials(), Err(error), "{uri} {keys}");
        }
    }

    #[test]
    fn a_program_without_keys_says_so() {
        let described = device("nbds://h/", "file=/k").check();
        let can = if cfg!(feature = "psk") { Ok(()) } else { Err(InvalidNbdTls::NotBuilt.into()) };
        assert_eq!(described, can);
        assert_eq!(device("nbds://h/", "dir=/c").check(), Ok(()));
    }
}
