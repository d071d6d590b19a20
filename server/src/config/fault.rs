//! What is to go wrong with a device's store, on purpose.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// The longest latency.
const MAX_LATENCY: Duration = crate::backend::faults::MAX_LATENCY;

/// One `[[device.fault]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultConfig {
    /// What goes wrong.
    pub fault: FaultKind,
    /// Which operations it may strike; all that it can if there is none.
    #[serde(default)]
    pub on: Vec<FaultOn>,
    /// Sectors of 512 bytes, one of which the operation has to touch.
    pub sectors: Option<Sectors>,
    /// How probable it is for each of these operations, from 0 to 1.
    pub probability: Option<Decimal>,
    /// It strikes the first of each so many of these operations.
    pub every: Option<u64>,
    /// How long operations wait.
    pub latency: Option<Wait>,
    /// The deviation of the logarithm of a latency that is distributed log-normally, with `latency` for its median.
    pub sigma: Option<Decimal>,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// The operation waits first.
    Latency,
    /// It fails with EIO.
    Eio,
    /// It fails with ENOSPC.
    Enospc,
    /// A part of it is done, and it is answered as if all were.
    Torn,
    /// It is answered and not done.
    Lost,
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultOn {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Writes of zeroes.
    WriteZeroes,
}

impl fmt::Display for FaultOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        })
    }
}

/// A number from 0 to 1000, to nine places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decimal(u64);

impl Decimal {
    const ONE: Self = Self(1_000_000_000);

    /// The number.
    pub fn get(self) -> f64 {
        self.0 as f64 / Self::ONE.0 as f64
    }
}

impl<'de> Deserialize<'de> for Decimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        if !(0.0..=1000.0).contains(&number) {
            return Err(de::Error::custom(format_args!("{number} must be from 0 to 1000")));
        }
        Ok(Self((number * Self::ONE.0 as f64).round() as u64))
    }
}

/// Sectors from the first to the last: `2048-4095`, or one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sectors(pub RangeInclusive<u64>);

/// How long, or from how long to how long: `5ms`, `100us-2s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// So long.
    Fixed(Duration),
    /// Anything in between.
    Between(Duration, Duration),
}

fn duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    let duration = match unit {
        "us" => Duration::from_micros(number),
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        _ => return None,
    };
    (duration <= MAX_LATENCY).then_some(duration)
}

impl FromStr for Wait {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.split_once('-') {
            None => duration(text).map(Self::Fixed),
            Some((least, most)) => match (duration(least), duration(most)) {
                (Some(least), Some(most)) if least <= most => Some(Self::Between(least, most)),
                _ => None,
            },
        };
        parsed.ok_or_else(|| {
            format!("{text:?} is no latency: write a number with us, ms or s, up to 60s, or two, such as \"100us-2ms\"")
        })
    }
}

impl FromStr for Sectors {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err(format!("{text:?} are no sectors: write the first and the last, such as \"2048-4095\"")),
        }
    }
}

impl<'de> Deserialize<'de> for Wait {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Sectors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Why a fault cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidFault {
    /// A latency without one.
    #[error("fault = \"latency\" needs latency, such as \"5ms\" or \"1ms-5ms\"")]
    NoLatency,
    /// A latency for something else.
    #[error("latency and sigma are for fault = \"latency\"; leave them out")]
    LatencyUnused,
    /// Two distributions.
    #[error("sigma is for a latency of one number, which is the median; leave one of them out")]
    TwoDistributions,
    /// Two ways to say when.
    #[error("probability and every do not go together; leave one of them out")]
    TwoChances,
    /// More than always.
    #[error("probability must be from 0 to 1")]
    Probability,
    /// Less than never.
    #[error("every is 0; it must be 1 or more")]
    Every,
    /// It can't go wrong like that.
    #[error("fault = \"{fault}\" is not for on = \"{on}\"")]
    Impossible {
        /// What was to go wrong.
        fault: &'static str,
        /// With what.
        on: FaultOn,
    },
}

impl FaultConfig {
    /// The operations that it may strike.
    pub fn on(&self) -> Vec<FaultOn> {
        if self.on.is_empty() { self.possible().1.to_vec() } else { self.on.clone() }
    }

    /// The operations that it can strike, and its name.
    fn possible(&self) -> (&'static str, &'static [FaultOn]) {
        use FaultOn::{Discard, Flush, Read, Write, WriteZeroes};
        match self.fault {
            FaultKind::Latency => ("latency", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::Eio => ("eio", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::Enospc => ("enospc", &[Write, Flush, Discard, WriteZeroes]),
            FaultKind::Torn => ("torn", &[Write, Discard, WriteZeroes]),
            FaultKind::Lost => ("lost", &[Write, Flush, Discard, WriteZeroes]),
        }
    }

    /// Checks that the words make sense together.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), InvalidFault> {
        let (fault, possible) = self.possible();
        let late = self.fault == FaultKind::Latency;
        if late && self.latency.is_none() {
            return Err(InvalidFault::NoLatency);
        }
        if !late && (self.latency.is_some() || self.sigma.is_some()) {
            return Err(InvalidFault::LatencyUnused);
        }
        if self.sigma.is_some() && matches!(self.latency, Some(Wait::Between(..))) {
            return Err(InvalidFault::TwoDistributions);
        }
        if self.probability.is_some() && self.every.is_some() {
            return Err(InvalidFault::TwoChances);
        }
        if self.probability.is_some_and(|probability| probability > Decimal::ONE) {
            return Err(InvalidFault::Probability);
        }
        if self.every == Some(0) {
            return Err(InvalidFault::Every);
        }
        match self.on.iter().find(|on| !possible.contains(on)) {
            Some(on) => Err(InvalidFault::Impossible { fault, on: *on }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(toml: &str) -> Result<FaultConfig, String> {
        let fault: FaultConfig = toml::from_str(toml).map_err(|error| error.to_string())?;
        fault.check().map(|()| fault).map_err(|error| error.to_string())
    }

    #[test]
    fn faults_are_understood() {
        let fault = parse("fault = 'latency'\nlatency = '100us-2s'\non = ['read', 'write-zeroes']\nevery = 3").unwrap();
        assert_eq!(fault.latency, Some(Wait::Between(Duration::from_micros(100), Duration::from_secs(2))));
        assert_eq!((fault.on(), fault.every), (vec![FaultOn::Read, FaultOn::WriteZeroes], Some(3)));
        let fault = parse("fault = 'eio'\nsectors = '7'\nprobability = 0.25").unwrap();
        assert_eq!((fault.sectors, fault.probability.unwrap().get()), (Some(Sectors(7..=7)), 0.25));
        assert!(parse("fault = 'latency'\nlatency = '60s'\nsigma = 0.5").is_ok());
        let all = parse("fault = 'torn'\nsectors = '0-18446744073709551615'").unwrap().on();
        assert_eq!(all, [FaultOn::Write, FaultOn::Discard, FaultOn::WriteZeroes]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_says_why() {
        for (toml, told) in [
            ("fault = 'gone'", "expected one of"),
            ("fault = 'latency'", "needs latency"),
            ("fault = 'latency'\nlatency = '5'", "us, ms or s"),
            ("fault = 'latency'\nlatency = '61s'", "up to 60s"),
            ("fault = 'latency'\nlatency = '5ms-1ms'", "no latency"),
            ("fault = 'latency'\nlatency = '1ms-5ms'\nsigma = 1.0", "median"),
            ("fault = 'eio'\nlatency = '1ms'", "leave them out"),
            ("fault = 'eio'\nsectors = '8-7'", "the first and the last"),
            ("fault = 'eio'\nprobability = 1.5", "from 0 to 1"),
            ("fault = 'eio'\nprobability = -0.5", "from 0 to 1000"),
            ("fault = 'eio'\nprobability = nan", "from 0 to 1000"),
            ("fault = 'eio'\nprobability = 0.5\nevery = 2", "do not go together"),
            ("fault = 'eio'\nevery = 0", "1 or more"),
            ("fault = 'torn'\non = ['read']", "\"torn\" is not for on = \"read\""),
            ("fault = 'lost'\non = ['write', 'read']", "\"lost\" is not for on = \"read\""),
            ("fault = 'eio'\nhow = 1", "unknown field"),
        ] {
            let error = parse(toml).unwrap_err();
            assert!(error.contains(told), "{toml}: {error}");
        }
    }
}
