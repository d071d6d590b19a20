//! NBD URIs, as the NBD project's specification of them has them (doc/uri.md), with libnbd's `tls-psk-file`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The port that has been assigned to NBD.
const DEFAULT_PORT: u16 = 10809;
/// Bytes of an export's name: the protocol's limit for strings.
const MAX_EXPORT: usize = 4096;

/// Where an export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, with `nbds` in place of `nbd` for
/// TLS. For a pre-shared key of TLS, `USERNAME@` before the host says whose, and the parameter `tls-psk-file=PATH` which file
/// it is in. Names and paths may be percent-encoded.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct NbdUri {
    text: String,
    pub(super) address: Address,
    pub(super) export: String,
    pub(super) tls: bool,
    username: Option<String>,
    psk_file: Option<PathBuf>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Why a text is no NBD URI, or none that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no NBD URI that can be used: {why}")]
pub struct InvalidUri {
    text: String,
    why: Flaw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Flaw {
    #[error("it must start with nbd://, nbds://, nbd+unix:// or nbds+unix://")]
    Scheme,
    #[error("there is no host: nbd://HOST[:PORT]/EXPORT")]
    NoHost,
    #[error("the port must be a number from 1 to 65535")]
    Port,
    #[error("what stands before @ must be a user's name, without a password")]
    User,
    #[error("an address between brackets must be one of IPv6")]
    Brackets,
    #[error("a UNIX socket has no host: nbd+unix:///EXPORT?socket=PATH")]
    HostOfUnix,
    #[error("?socket=PATH, from the root, must say where the socket is")]
    NoSocket,
    #[error(
        "the parameters are socket=PATH, for nbd+unix and nbds+unix only, and tls-psk-file=PATH, each at most once; \
             certificates are named by nbd_tls_dir"
    )]
    Parameter,
    #[error("tls-psk-file must be a path from the root")]
    RelativeFile,
    #[error("% must be followed by two hexadecimal digits, not 00, and what they make must be UTF-8")]
    Percent,
    #[error("the export's name has more than 4096 bytes")]
    LongExport,
    #[error("a URI has no fragment (#): write %23")]
    Fragment,
}

impl NbdUri {
    /// Whether the connection is to be encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Whose pre-shared key is meant.
    pub fn username(&self) -> Option<&str> {
        self.username.as_deref()
    }

    /// The file of the pre-shared key.
    pub fn psk_file(&self) -> Option<&Path> {
        self.psk_file.as_deref()
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<NbdUri> for String {
    fn from(uri: NbdUri) -> Self {
        uri.text
    }
}

impl TryFrom<String> for NbdUri {
    type Error = InvalidUri;

    fn try_from(text: String) -> Result<Self, InvalidUri> {
        text.parse()
    }
}

impl FromStr for NbdUri {
    type Err = InvalidUri;

    fn from_str(text: &str) -> Result<Self, InvalidUri> {
        parse(text).map_err(|why| InvalidUri { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<NbdUri, Flaw> {
    let (scheme, rest) = text.split_once("://").ok_or(Flaw::Scheme)?;
    let (unix, tls) = match scheme {
        "nbd" => (false, false),
        "nbds" => (false, true),
        "nbd+unix" => (true, false),
        "nbds+unix" => (true, true),
        _ => return Err(Flaw::Scheme),
    };
    if rest.contains('#') {
        return Err(Flaw::Fragment);
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(export)?;
    if export.len() > MAX_EXPORT {
        return Err(Flaw::LongExport);
    }
    let (username, authority) = match authority.rsplit_once('@') {
        Some((username, authority)) => (Some(user(username)?), authority),
        None => (None, authority),
    };
    let (mut socket, mut psk_file) = (None, None);
    for parameter in query.into_iter().flat_map(|query| query.split('&')) {
        let place = match parameter.split_once('=') {
            Some(("socket", path)) if unix => (&mut socket, path),
            Some(("tls-psk-file", path)) => (&mut psk_file, path),
            _ => return Err(Flaw::Parameter),
        };
        if place.0.replace(PathBuf::from(decode(place.1)?)).is_some() {
            return Err(Flaw::Parameter);
        }
    }
    if psk_file.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(Flaw::RelativeFile);
    }
    let address = if unix {
        if !authority.is_empty() {
            return Err(Flaw::HostOfUnix);
        }
        socket.filter(|path| path.is_absolute()).map(Address::Unix).ok_or(Flaw::NoSocket)?
    } else {
        tcp(authority)?
    };
    Ok(NbdUri { text: text.to_owned(), address, export, tls, username, psk_file })
}

fn user(text: &str) -> Result<String, Flaw> {
    if text.contains([':', '@']) {
        return Err(Flaw::User);
    }
    decode(text).ok().filter(|name| !name.is_empty()).ok_or(Flaw::User)
}

fn tcp(authority: &str) -> Result<Address, Flaw> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or(Flaw::Brackets)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| Flaw::Brackets)?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(Flaw::Brackets)?) })
        }
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err(Flaw::NoHost);
    }
    let number = |port: &str| port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(Flaw::Port);
    Ok(Address::Tcp { host: host.to_owned(), port: port.map_or(Ok(DEFAULT_PORT), number)? })
}

/// Replaces `%41` by `A`.
fn decode(text: &str) -> Result<String, Flaw> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        bytes.push(match byte {
            b'%' => {
                let (high, low) = (digit(rest.next()).ok_or(Flaw::Percent)?, digit(rest.next()).ok_or(Flaw::Percent)?);
                (high << 4 | low) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0')).ok_or(Flaw::Percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms() {
        let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
        for (text, address, export, tls) in [
            ("nbd://host", tcp("host", 10809), "", false),
            ("nbd://host/", tcp("host", 10809), "", false),
            ("nbds://host:1/a", tcp("host", 1), "a", true),
            ("nbd://10.0.0.1:65535/a/b%20%C3%A4%2f", tcp("10.0.0.1", 65535), "a/b ä/", false),
            ("nbd://[::1]/x", tcp("::1", 10809), "x", false),
            ("nbd://[fe80::1]:77/x", tcp("fe80::1", 77), "x", false),
            ("nbd+unix:///?socket=/run/a.sock", Address::Unix("/run/a.sock".into()), "", false),
            ("nbds+unix:///disk?socket=/run/a%26b", Address::Unix("/run/a&b".into()), "disk", true),
            ("nbds://alice@host/a?tls-psk-file=/k", tcp("host", 10809), "a", true),
            ("nbds+unix://a@/?tls-psk-file=/k&socket=/s", Address::Unix("/s".into()), "", true),
        ] {
            let uri: NbdUri = text.parse().unwrap();
            assert_eq!((uri.address.clone(), uri.export.as_str(), uri.is_tls()), (address, export, tls), "{text}");
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn a_key_and_whose_it_is() {
        let uri = |text: &str| text.parse::<NbdUri>().unwrap();
        let both = uri("nbds+unix://al%20ice@/disk?socket=/s&tls-psk-file=/etc/%6beys");
        assert_eq!((both.username(), both.psk_file()), (Some("al ice"), Some(Path::new("/etc/keys"))));
        let file = uri("nbds://host?tls-psk-file=/k");
        assert_eq!((file.username(), file.psk_file()), (None, Some(Path::new("/k"))));
        let user = uri("nbds://alice@[::1]:7/");
        assert_eq!((user.username(), user.psk_file()), (Some("alice"), None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = format!("nbd://h/{}", "x".repeat(MAX_EXPORT + 1));
        for (text, why) in [
            ("", Flaw::Scheme),
            ("http://host", Flaw::Scheme),
            ("nbd:host:10809", Flaw::Scheme),
            ("nbd:///export", Flaw::NoHost),
            ("nbd://:7/export", Flaw::NoHost),
            ("nbd://host:/", Flaw::Port),
            ("nbd://host:0/", Flaw::Port),
            ("nbd://host:65536/", Flaw::Port),
            ("nbd://::1/", Flaw::NoHost),
            ("nbd://[::1", Flaw::Brackets),
            ("nbd://[host]/", Flaw::Brackets),
            ("nbd://[::1]7/", Flaw::Brackets),
            ("nbds://@host/", Flaw::User),
            ("nbds://alice:secret@host/", Flaw::User),
            ("nbds://a%00@host/", Flaw::User),
            ("nbds://host/?tls-psk-file=keys.psk", Flaw::RelativeFile),
            ("nbds://host/?tls-psk-file=/a&tls-psk-file=/b", Flaw::Parameter),
            ("nbds://host/?", Flaw::Parameter),
            ("nbd+unix:///?socket=/a&socket=/b", Flaw::Parameter),
            ("nbds://a@b@host/", Flaw::User),
            ("nbd://host/?socket=/a", Flaw::Parameter),
            ("nbd+unix:///", Flaw::NoSocket),
            ("nbd+unix:///?socket=a", Flaw::NoSocket),
            ("nbd+unix:///?path=/a", Flaw::Parameter),
            ("nbd+unix:///?socket=/a&b=c", Flaw::Parameter),
            ("nbd+unix://host/?socket=/a", Flaw::HostOfUnix),
            ("nbd://host/a%2", Flaw::Percent),
            ("nbd://host/a%zz", Flaw::Percent),
            ("nbd://host/%00", Flaw::Percent),
            ("nbd://host/%ff", Flaw::Percent),
            ("nbd://host/#a", Flaw::Fragment),
            (long.as_str(), Flaw::LongExport),
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap_err().why, why, "{text}");
        }
    }
}
