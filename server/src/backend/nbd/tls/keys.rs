//! Files of pre-shared keys, as GnuTLS's `psktool` writes them and nbdkit and QEMU read them: `USERNAME:KEY` in each line, the
//! key in hexadecimal digits.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::error::HandshakeError;

/// Bytes of a file, at most.
const MAX_FILE: usize = 1 << 20;
/// Bytes of a key, at most: what every OpenSSL takes.
const MAX_KEY: usize = 256;

/// A key, which is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Key(Box<[u8]>);

impl Key {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
enum Flaw {
    #[error("cannot read it: {0}")]
    Unreadable(#[from] io::Error),
    #[error("it has more than 1 MiB: it must be a file of pre-shared keys, USERNAME:KEY in each line")]
    Huge,
    #[error("there is no USERNAME:KEY in it: `psktool --username {0} --pskfile FILE` writes one")]
    Empty(String),
    #[error(
        "there is no key of {0:?} in it: nbd_tls_username, or USERNAME@ in nbd_uri, says whose is meant, and \
         `psktool --username {0} --pskfile FILE` adds one"
    )]
    Missing(String),
    #[error("line {0}: after the colon there must be a key of 1 to 256 bytes, in two hexadecimal digits each")]
    Digits(usize),
}

/// Reads a user's key.
pub(super) fn load(file: &Path, username: &str) -> Result<Key, HandshakeError> {
    let key = read(file).and_then(|text| find(&text, username));
    key.map_err(|flaw| HandshakeError::Credentials { path: file.to_owned(), why: flaw.to_string() })
}

fn read(path: &Path) -> Result<Vec<u8>, Flaw> {
    let file = File::open(path)?;
    if file.metadata()?.mode() & 0o007 != 0 {
        log::warn!("{}: all users of this machine can get at the keys in it; chmod o= takes that away", path.display());
    }
    let mut text = Vec::new();
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut text)?;
    if text.len() > MAX_FILE { Err(Flaw::Huge) } else { Ok(text) }
}

/// The first line of the user counts, as with GnuTLS; what others have is not looked at.
fn find(text: &[u8], username: &str) -> Result<Key, Flaw> {
    let mut any = false;
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (user, digits) = line.split_at(colon);
        any = true;
        if user == username.as_bytes() {
            return key(digits.get(1..).unwrap_or_default()).ok_or(Flaw::Digits(number));
        }
    }
    Err(if any { Flaw::Missing(username.to_owned()) } else { Flaw::Empty(username.to_owned()) })
}

fn key(digits: &[u8]) -> Option<Key> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.is_empty() || pairs.len() > MAX_KEY || !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |[high, low]: &[u8; 2]| Some((digit(*high)? << 4 | digit(*low)?) as u8);
    pairs.iter().map(byte).collect::<Option<_>>().map(Key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &[u8]) -> Option<Vec<u8>> {
        find(text, "alice").ok().map(|key| key.bytes().to_vec())
    }

    #[test]
    fn a_users_key_is_found() {
        for text in [
            &b"alice:00fFa0"[..],
            b"alice:00fFa0\n",
            b"alice:00fFa0\r\n",
            b"\n\r\nbob:zz\nno key\nalice:00fFa0\nalice:11\n",
            b"ALICE:11\nalic:12\nalice2:13\n\xff:14\nalice:00ffa0",
        ] {
            assert_eq!(found(text).as_deref(), Some(&[0, 0xff, 0xa0][..]), "{}", String::from_utf8_lossy(text));
        }
        let long = format!("alice:{}", "5a".repeat(MAX_KEY));
        assert_eq!(found(long.as_bytes()), Some(vec![0x5a; MAX_KEY]));
    }

    #[test]
    fn what_is_no_key_is_told_by_its_line() {
        let long = format!("alice:{}", "5a".repeat(MAX_KEY + 1));
        for text in [
            "alice:",
            "alice:0",
            "alice:012",
            "alice:0g",
            "alice:01 ",
            "alice: 01",
            "alice:+1",
            "alice:01:02",
            "alice:\u{e4}",
            &long,
            "alice:\r",
            "alice:01\r\r\n",
        ] {
            let text = format!("bob:01\n{text}\nalice:01\n");
            assert!(matches!(find(text.as_bytes(), "alice"), Err(Flaw::Digits(2))), "{text:?}");
        }
        for text in ["", "\n\n", "alice", "alice\n01\n"] {
            assert!(matches!(find(text.as_bytes(), "alice"), Err(Flaw::Empty(_))), "{text:?}");
        }
        assert!(matches!(find(b"bob:01\n:02\n", "alice"), Err(Flaw::Missing(_))));
    }

    #[test]
    fn no_more_is_read_than_a_file_of_keys_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.psk");
        let mut text = b"alice:01\n".to_vec();
        text.resize(MAX_FILE, b'\n');
        std::fs::write(&path, &text).unwrap();
        assert_eq!(load(&path, "alice").unwrap().bytes(), [1]);
        text.push(b'\n');
        std::fs::write(&path, &text).unwrap();
        for (path, why) in [(&*path, "more than 1 MiB"), (Path::new("/dev/zero"), "more than 1 MiB")] {
            let error = load(path, "alice").unwrap_err().to_string();
            assert!(error.contains(why) && error.starts_with(path.to_str().unwrap()), "{error}");
        }
        let error = load(folder.path(), "alice").unwrap_err().to_string();
        assert!(error.contains("cannot read it"), "{error}");
    }

    #[test]
    fn a_key_is_never_shown() {
        let key = find(b"alice:5a5a", "alice").unwrap();
        assert_eq!(format!("{key:?}"), "Key");
    }
}
