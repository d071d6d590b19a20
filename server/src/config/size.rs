//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};

/// A number of bytes, written plain or with a unit of 1024: `512M`, `1G`, `4GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Size(pub u64);

/// A size that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no size: write bytes or a number with K, M, G, T or P, such as 512M or 1G")]
pub struct SizeError(String);

const UNITS: [char; 5] = ['K', 'M', 'G', 'T', 'P'];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.to_owned());
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at_checked(digits).ok_or_else(error)?;
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit.trim_start();
        let mut letters = unit.chars();
        let shift = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
            None => 0,
            Some('B') if letters.as_str().is_empty() => 0,
            Some(letter) => {
                let power = UNITS.iter().position(|unit| *unit == letter).ok_or_else(error)?;
                if !["", "iB", "ib"].contains(&letters.as_str()) {
                    return Err(error());
                }
                10 * (power as u32 + 1)
            }
        };
        let factor = 1u64.checked_shl(shift).ok_or_else(error)?;
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (power, unit) in (1..).zip(UNITS).collect::<Vec<_>>().into_iter().rev() {
            let factor = 1u64 << (10 * power);
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{} {unit}iB", self.0 / factor);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"1G\", or a number of bytes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("1G", 1 << 30),
            ("2GiB", 2 << 30),
            ("3 TiB", 3 << 40),
            ("15P", 15 << 50),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1X", "1GB", "1Gi", "99999999999999999999", "16384P", "1G ", "1é"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written() {
        for (bytes, text) in [(1 << 30, "1 GiB"), (1536 << 20, "1536 MiB"), (512, "512 bytes"), (0, "0 bytes")] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
