//! What is to go wrong with a device, on purpose.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest latency.
const MAX_LATENCY: Duration = crate::backend::faults::MAX_LATENCY;

/// One `[[device.fault]]`; on the command line, what comes after `ctl fault add DEVICE`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct FaultConfig {
    /// What goes wrong
    #[arg(value_enum)]
    pub fault: FaultKind,

    /// Operations that it may strike, separated by commas [default: all that it can]
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub on: Vec<FaultOn>,

    /// Sectors of 512 bytes, one of which the operation has to touch, from the first to the last: 2048-4095
    #[arg(long, value_name = "FIRST-LAST")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sectors: Option<Sectors>,

    /// How probable it is each time, from 0 to 1
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probability: Option<Decimal>,

    /// It strikes the first of each so many
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,

    /// How long what it strikes waits, or until the spurious interrupt: 5ms, or from how long to how long: 100us-2ms
    #[arg(long, value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Wait>,

    /// Have the latency distributed log-normally, with this deviation of its logarithm, and --latency for its median
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma: Option<Decimal>,

    /// Request queue, from 0 [default: all]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,

    /// How many it strikes in a row, with --every or --probability [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// The operation waits first
    Latency,
    /// It fails with EIO
    Eio,
    /// It fails with ENOSPC
    Enospc,
    /// A part of it is done, and it is answered as if all were
    Torn,
    /// It is answered and not done
    Lost,
    /// It is not answered until the fault is removed or released
    Stuck,
    /// The operation is done, and the device needs a reset
    NeedsReset,
    /// The operation is done, and the client is disconnected
    CloseSession,
    /// An interrupt is not sent
    LostInterrupt,
    /// An interrupt is sent later
    LateInterrupt,
    /// After an interrupt there is another one, for nothing
    SpuriousInterrupt,
    /// A driver's kick is not heard
    LostKick,
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FaultOn {
    /// Reads
    Read,
    /// Writes
    Write,
    /// Flushes
    Flush,
    /// Discards
    Discard,
    /// Writes of zeroes
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

impl TryFrom<f64> for Decimal {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if !(0.0..=1000.0).contains(&number) {
            return Err(format!("{number} must be from 0 to 1000"));
        }
        Ok(Self((number * Self::ONE.0 as f64).round() as u64))
    }
}

impl FromStr for Decimal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<f64>().map_err(|_| format!("{text:?} is no number"))?.try_into()
    }
}

impl<'de> Deserialize<'de> for Decimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer)?.try_into().map_err(de::Error::custom)
    }
}

impl Serialize for Decimal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.get())
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

/// In microseconds, than which nothing is finer.
impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(wait) => write!(f, "{}us", wait.as_micros()),
            Self::Between(least, most) => write!(f, "{}us-{}us", least.as_micros(), most.as_micros()),
        }
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

impl Serialize for Wait {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Sectors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a fault cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidFault {
    /// A latency without one.
    #[error("fault = \"{fault}\" needs latency, such as \"5ms\" or \"1ms-5ms\"")]
    NoLatency {
        /// What was to come late.
        fault: &'static str,
    },
    /// A latency for something else.
    #[error(
        "latency and sigma are for fault = \"latency\", \"late-interrupt\" and \"spurious-interrupt\"; leave them out"
    )]
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
    /// A burst of nothing, or longer than what it is a part of.
    #[error("burst must be 1 or more, not more than every, and go with every or probability")]
    Burst,
    /// There is no such queue.
    #[error("queue is {queue}; the device has {num_queues}, counted from 0")]
    Queue {
        /// The queue.
        queue: u16,
        /// Queues that there are.
        num_queues: u16,
    },
    /// An interrupt or a kick is of no sector.
    #[error("sectors are for faults of operations; leave them out")]
    NoSectors,
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
            FaultKind::NeedsReset => ("needs-reset", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::CloseSession => ("close-session", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::LostInterrupt => ("lost-interrupt", &[]),
            FaultKind::LateInterrupt => ("late-interrupt", &[]),
            FaultKind::SpuriousInterrupt => ("spurious-interrupt", &[]),
            FaultKind::LostKick => ("lost-kick", &[]),
            FaultKind::Latency => ("latency", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::Eio => ("eio", &[Read, Write, Flush, Discard, WriteZeroes]),
            FaultKind::Enospc => ("enospc", &[Write, Flush, Discard, WriteZeroes]),
            FaultKind::Torn => ("torn", &[Write, Discard, WriteZeroes]),
            FaultKind::Lost => ("lost", &[Write, Flush, Discard, WriteZeroes]),
            FaultKind::Stuck => ("stuck", &[Read, Write, Flush, Discard, WriteZeroes]),
        }
    }

    /// A fault that strikes each time.
    pub fn always(fault: FaultKind) -> Self {
        Self {
            fault,
            on: Vec::new(),
            sectors: None,
            probability: None,
            every: None,
            latency: None,
            sigma: None,
            queue: None,
            burst: None,
        }
    }

    /// Checks that the words make sense together, for a device with so many queues.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, num_queues: u16) -> Result<(), InvalidFault> {
        let (fault, possible) = self.possible();
        let late = matches!(self.fault, FaultKind::Latency | FaultKind::LateInterrupt | FaultKind::SpuriousInterrupt);
        if late && self.latency.is_none() {
            return Err(InvalidFault::NoLatency { fault });
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
        let longest = self.every.or(self.probability.map(|_| u64::MAX)).unwrap_or(0);
        if self.burst.is_some_and(|burst| !(1..=longest).contains(&burst)) {
            return Err(InvalidFault::Burst);
        }
        if let Some(queue) = self.queue.filter(|queue| *queue >= num_queues) {
            return Err(InvalidFault::Queue { queue, num_queues });
        }
        if possible.is_empty() && self.sectors.is_some() {
            return Err(InvalidFault::NoSectors);
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
        fault.check(4).map(|()| fault).map_err(|error| error.to_string())
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
        let fault = parse("fault = 'stuck'\nevery = 10000\nburst = 100\nqueue = 3").unwrap();
        assert_eq!((fault.queue, fault.burst), (Some(3), Some(100)));
    }

    #[test]
    fn a_fault_is_told_as_it_was_given() {
        for toml in [
            "fault = 'latency'\nlatency = '100us-2s'\non = ['read', 'write-zeroes']\nevery = 3\nburst = 2",
            "fault = 'eio'\nsectors = '7'\nprobability = 0.25\nqueue = 1",
            "fault = 'latency'\nlatency = '60s'\nsigma = 0.5",
            "fault = 'spurious-interrupt'\nlatency = '1ms'",
        ] {
            let fault = parse(toml).unwrap();
            let told = serde_json::to_value(&fault).unwrap();
            assert!(!told.to_string().contains("null"), "{told}");
            assert_eq!(serde_json::from_value::<FaultConfig>(told).unwrap(), fault);
        }
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
            ("fault = 'eio'\nburst = 2", "with every or probability"),
            ("fault = 'eio'\nevery = 2\nburst = 3", "not more than every"),
            ("fault = 'eio'\nprobability = 0.1\nburst = 0", "1 or more"),
            ("fault = 'eio'\nqueue = 4", "has 4, counted from 0"),
            ("fault = 'late-interrupt'", "needs latency"),
            ("fault = 'lost-interrupt'\nlatency = '1ms'", "leave them out"),
            ("fault = 'lost-kick'\nsectors = '1'", "of operations"),
            ("fault = 'lost-kick'\non = ['read']", "is not for on"),
            ("fault = 'torn'\non = ['read']", "\"torn\" is not for on = \"read\""),
            ("fault = 'lost'\non = ['write', 'read']", "\"lost\" is not for on = \"read\""),
            ("fault = 'eio'\nhow = 1", "unknown field"),
        ] {
            let error = parse(toml).unwrap_err();
            assert!(error.contains(told), "{toml}: {error}");
        }
    }
}
