//! What is to lie between a device and its store.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU64};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Size;
use crate::backend::fabric::{Fabric, MAX_ROUND_TRIP};

/// The fabrics that have names of their own; docs/fabric.md says where the numbers come from.
const KNOWN: [(&str, Fabric); 3] = [
    ("25g-tor", known(10_000, 2_000, 2_900_000_000, 128)),
    ("100g-spine", known(20_000, 8_000, 11_700_000_000, 128)),
    ("cxl-pool", known(1_200, 200, 25_000_000_000, 256)),
];

const fn known(round_trip: u64, jitter: u64, bandwidth: u64, credits: u16) -> Fabric {
    Fabric {
        round_trip: Duration::from_nanos(round_trip),
        jitter: Duration::from_nanos(jitter),
        bandwidth: NonZeroU64::new(bandwidth),
        credits: NonZeroU16::new(credits),
        seed: 0,
    }
}

/// A time as people write it: `800ns`, `20us`, `5ms`, `1s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delay(pub Duration);

impl FromStr for Delay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = text.get(..digits).and_then(|digits| digits.parse().ok());
        let delay = number.zip(text.get(digits..)).and_then(|(number, unit)| match unit {
            "ns" => Some(Duration::from_nanos(number)),
            "us" => Some(Duration::from_micros(number)),
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            _ => None,
        });
        delay.filter(|delay| *delay <= MAX_ROUND_TRIP).map(Self).ok_or_else(|| {
            format!("{text:?} is no time: write a number with ns, us, ms or s, up to 10s, such as \"20us\"")
        })
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        let units = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us")];
        match units.iter().find(|(unit, _)| nanoseconds > 0 && nanoseconds.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", nanoseconds / unit),
            None => write!(f, "{nanoseconds}ns"),
        }
    }
}

impl<'de> Deserialize<'de> for Delay {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Delay {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A fabric in its own numbers: a `[[fabric]]` of the configuration file, or a `[device.fabric]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FabricConfig {
    /// What devices call a `[[fabric]]` by; others have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// There and back, besides the data's own time.
    pub round_trip: Delay,
    /// What is added to that in the mean.
    #[serde(default)]
    pub jitter: Delay,
    /// Bytes a second, each way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
    /// Operations of a queue that are on their way at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credits: Option<u16>,
    /// Where the sequence of jitters starts.
    #[serde(default)]
    pub seed: u64,
}

/// Why a fabric cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidFabric {
    /// Nothing would ever pass.
    #[error("fabric: {0} is 0, and nothing would ever pass; it must be 1 or more, or be left out for no bound")]
    Zero(&'static str),
    /// A name where none is asked for.
    #[error("fabric: name is for a [[fabric]] above the devices; leave it out")]
    NameUnused,
    /// None where one is needed.
    #[error("fabric: a [[fabric]] needs a name, which devices call it by")]
    NoName,
    /// One that is something else already.
    #[error("fabric: the name {0:?} is taken; give this one another")]
    NameTaken(String),
    /// Nobody knows it.
    #[error("fabric {name:?} is not known; there are: {known}; or give its numbers, round_trip and the rest")]
    Unknown {
        /// What was asked for.
        name: String,
        /// All that there are.
        known: String,
    },
}

impl FabricConfig {
    /// What it says.
    ///
    /// # Errors
    /// The first that makes no sense.
    fn fabric(&self) -> Result<Fabric, InvalidFabric> {
        let bandwidth = self.bandwidth.map(|size| NonZeroU64::new(size.0).ok_or(InvalidFabric::Zero("bandwidth")));
        let credits = self.credits.map(|credits| NonZeroU16::new(credits).ok_or(InvalidFabric::Zero("credits")));
        Ok(Fabric {
            round_trip: self.round_trip.0,
            jitter: self.jitter.0,
            bandwidth: bandwidth.transpose()?,
            credits: credits.transpose()?,
            seed: self.seed,
        })
    }
}

/// The fabric of a device: one that has a name, or numbers of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum FabricChoice {
    /// `fabric = "25g-tor"`.
    Named(String),
    /// `[device.fabric]`, or on the command line `round_trip=20us,bandwidth=3G`.
    Own(FabricConfig),
}

impl FabricChoice {
    /// The fabric that is meant, where `defined` are the `[[fabric]]` tables.
    ///
    /// # Errors
    /// If there is none, or it makes no sense.
    pub(crate) fn find(&self, defined: &[FabricConfig]) -> Result<Fabric, InvalidFabric> {
        match self {
            Self::Own(FabricConfig { name: Some(_), .. }) => Err(InvalidFabric::NameUnused),
            Self::Own(own) => own.fabric(),
            Self::Named(name) => {
                if let Some(found) = defined.iter().find(|fabric| fabric.name.as_ref() == Some(name)) {
                    return found.fabric();
                }
                let known = KNOWN.iter().find(|(known, _)| known == name).map(|(_, fabric)| *fabric);
                known.ok_or_else(|| {
                    let names = defined.iter().filter_map(|fabric| fabric.name.as_deref());
                    let known: Vec<_> = KNOWN.iter().map(|(known, _)| *known).chain(names).collect();
                    InvalidFabric::Unknown { name: name.clone(), known: known.join(", ") }
                })
            }
        }
    }
}

/// Checks `[[fabric]]` tables.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn check_defined(defined: &[FabricConfig]) -> Result<(), InvalidFabric> {
    for (index, fabric) in defined.iter().enumerate() {
        let name = fabric.name.as_ref().filter(|name| !name.is_empty()).ok_or(InvalidFabric::NoName)?;
        let before = defined.iter().take(index).filter_map(|fabric| fabric.name.as_deref());
        // `none` is no fabric at all, and numbers are told from names by their signs of equality.
        if before.chain(KNOWN.iter().map(|(known, _)| *known)).chain(["none"]).any(|taken| taken == name)
            || name.contains('=')
        {
            return Err(InvalidFabric::NameTaken(name.clone()));
        }
        fabric.fabric()?;
    }
    Ok(())
}

impl FromStr for FabricChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('=') {
            return Ok(Self::Named(text.to_owned()));
        }
        let mut own = FabricConfig::default();
        let mut round_trip = None;
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "round_trip" => round_trip = Some(value.parse()?),
                "jitter" => own.jitter = value.parse()?,
                "bandwidth" => {
                    own.bandwidth = Some(value.parse().map_err(|error: super::SizeError| error.to_string())?)
                }
                "credits" => own.credits = Some(value.parse().map_err(|error| format!("credits={value}: {error}"))?),
                "seed" => own.seed = value.parse().map_err(|error| format!("seed={value}: {error}"))?,
                _ => return Err(format!("{key:?} is not one of round_trip, jitter, bandwidth, credits, seed")),
            }
        }
        own.round_trip = round_trip.ok_or("a fabric needs round_trip, such as round_trip=20us")?;
        Ok(Self::Own(own))
    }
}

/// As it is understood on the command line.
impl fmt::Display for FabricChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = match self {
            Self::Named(name) => return f.write_str(name),
            Self::Own(own) => own,
        };
        write!(f, "round_trip={}", own.round_trip)?;
        if own.jitter != Delay::default() {
            write!(f, ",jitter={}", own.jitter)?;
        }
        if let Some(bandwidth) = own.bandwidth {
            write!(f, ",bandwidth={}", bandwidth.0)?;
        }
        if let Some(credits) = own.credits {
            write!(f, ",credits={credits}")?;
        }
        if own.seed != 0 {
            write!(f, ",seed={}", own.seed)?;
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for FabricChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = FabricChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a fabric, such as \"25g-tor\", or a table with its round_trip and the rest")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<FabricChoice, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<FabricChoice, A::Error> {
                FabricConfig::deserialize(de::value::MapAccessDeserializer::new(map)).map(FabricChoice::Own)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        fabric: FabricChoice,
    }

    fn find(toml: &str) -> Result<Fabric, String> {
        let defined = FabricConfig {
            name: Some("mine".into()),
            round_trip: Delay(Duration::from_millis(1)),
            ..FabricConfig::default()
        };
        let file: File = toml::from_str(toml).map_err(|error| error.to_string())?;
        file.fabric.find(&[defined]).map_err(|error| error.to_string())
    }

    #[test]
    fn fabrics_are_understood() {
        let tor = find("fabric = '25g-tor'").unwrap();
        assert_eq!((tor.round_trip, tor.credits), (Duration::from_micros(10), NonZeroU16::new(128)));
        assert_eq!(find("fabric = 'mine'").unwrap().round_trip, Duration::from_millis(1));
        let own = Fabric {
            round_trip: Duration::from_micros(20),
            jitter: Duration::from_nanos(500),
            bandwidth: NonZeroU64::new(3 << 30),
            credits: NonZeroU16::new(32),
            seed: 7,
        };
        let numbers = "round_trip = '20us', jitter = '500ns', bandwidth = '3G', credits = 32, seed = 7";
        assert_eq!(find(&format!("fabric = {{ {numbers} }}")), Ok(own));
        let choice: FabricChoice = numbers.replace([' ', '\''], "").parse().unwrap();
        assert_eq!(choice.find(&[]), Ok(own));
        // What it says of itself, and what goes over the control socket, is understood again.
        assert_eq!(choice.to_string().parse(), Ok(choice.clone()));
        let json = serde_json::to_value(&choice).unwrap();
        assert_eq!(serde_json::from_value::<FabricChoice>(json).unwrap(), choice);
        let plain: FabricChoice = "round_trip=0s".parse().unwrap();
        assert_eq!(plain.to_string(), "round_trip=0ns");
        assert_eq!(plain.find(&[]), Ok(Fabric::default()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_says_why() {
        for (toml, told) in [
            ("fabric = '25g'", "there are: 25g-tor, 100g-spine, cxl-pool, mine;"),
            ("fabric = 25", "such as \"25g-tor\""),
            ("fabric = { jitter = '1us' }", "round_trip"),
            ("fabric = { round_trip = '20' }", "ns, us, ms or s"),
            ("fabric = { round_trip = '11s' }", "up to 10s"),
            ("fabric = { round_trip = '1s', bandwidth = 0 }", "bandwidth is 0"),
            ("fabric = { round_trip = '1s', credits = 0 }", "credits is 0"),
            ("fabric = { round_trip = '1s', name = 'x' }", "leave it out"),
            ("fabric = { round_trip = '1s', credit = 1 }", "unknown field"),
            ("fabric = 'jitter=1us'", "needs round_trip"),
            ("fabric = 'round_trip=1us,speed=1'", "\"speed\" is not one of"),
            ("fabric = 'round_trip=1us,credits=70000'", "credits=70000"),
        ] {
            let error = find(toml).unwrap_err();
            assert!(error.contains(told), "{toml}: {error}");
        }
        let named = |name: &str| FabricConfig { name: Some(name.into()), ..FabricConfig::default() };
        assert_eq!(check_defined(&[named("a"), named("b")]), Ok(()));
        assert_eq!(check_defined(&[FabricConfig::default()]), Err(InvalidFabric::NoName));
        for taken in [&[named("a"), named("a")][..], &[named("cxl-pool")], &[named("none")], &[named("a=b")]] {
            assert!(matches!(check_defined(taken), Err(InvalidFabric::NameTaken(_))), "{taken:?}");
        }
        let nothing = FabricConfig { credits: Some(0), ..named("a") };
        assert_eq!(check_defined(&[nothing]), Err(InvalidFabric::Zero("credits")));
    }
}
