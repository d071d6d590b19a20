//! Who may connect to a device's socket.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The permissions of a socket, as chmod's octal digits: `0660`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(u32);

/// Why a word is no [`SocketMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: it must be octal digits such as \"0660\", at most 0777")]
pub struct SocketModeError(String);

impl SocketMode {
    /// For the owner and the group: what a socket with a group has if nothing else is said.
    pub(crate) const GROUP: Self = Self(0o660);

    /// For the owner alone.
    pub(crate) const OWNER: Self = Self(0o600);

    /// The permission bits.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }
}

impl FromStr for SocketMode {
    type Err = SocketModeError;

    fn from_str(text: &str) -> Result<Self, SocketModeError> {
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let bits = u32::from_str_radix(text, 8).ok().filter(|bits| octal && *bits <= 0o777);
        bits.map(Self).ok_or_else(|| SocketModeError(text.to_owned()))
    }
}

impl TryFrom<String> for SocketMode {
    type Error = SocketModeError;

    fn try_from(text: String) -> Result<Self, SocketModeError> {
        text.parse()
    }
}

impl From<SocketMode> for String {
    fn from(mode: SocketMode) -> Self {
        mode.to_string()
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_three_or_four_octal_digits() {
        for (text, bits) in [("0660", 0o660), ("660", 0o660), ("0777", 0o777), ("000", 0)] {
            assert_eq!(text.parse(), Ok(SocketMode(bits)), "{text}");
        }
        for text in ["", "6", "66", "06600", "1777", "0888", "+660", "0o660", "rw-rw----", " 660"] {
            assert_eq!(text.parse::<SocketMode>(), Err(SocketModeError(text.to_owned())));
        }
        assert_eq!(SocketMode(0o60).to_string(), "0060");
    }
}
