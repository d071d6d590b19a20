//! How fast a device may be used.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Size;
use crate::backend::limits::{Budget, Limits, Rate};

/// A burst that nobody has said: what comes in this part of a second.
const DEFAULT_BURST: u64 = 10;

/// `[device.limits]`, and on the command line `iops=1000,bandwidth=100M`. What is not said is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimits {
    /// Operations a second, of all kinds together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,

    /// Operations at once after a rest, and above `iops` for as long as they last; by default what 100 ms bring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,

    /// Reads a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,

    /// Operations a second that are no reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,

    /// Bytes a second, read and written together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,

    /// Bytes at once after a rest, and above `bandwidth` for as long as they last; by default what 100 ms bring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Size>,

    /// Bytes read a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bandwidth: Option<Size>,

    /// Bytes written a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bandwidth: Option<Size>,
}

/// Why limits cannot be as they are described. The names are those of the configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRates {
    /// Nothing would ever pass.
    #[error("limits: {0} is 0, and nothing would ever pass; it must be 1 or more, or be left out for no limit")]
    Zero(&'static str),
    /// A burst of what has no limit.
    #[error("limits: {0}_burst is for {0}; name that too, or leave it out")]
    BurstUnused(&'static str),
}

impl RateLimits {
    /// The limits; `None` if there are none.
    ///
    /// # Errors
    /// The first that makes no sense.
    pub fn limits(&self) -> Result<Option<Limits>, InvalidRates> {
        let bytes = |size: Option<Size>| size.map(|size| size.0);
        let limits = Limits {
            operations: Budget {
                all: rate("iops", self.iops, self.iops_burst)?,
                reads: rate("read_iops", self.read_iops, None)?,
                writes: rate("write_iops", self.write_iops, None)?,
            },
            bytes: Budget {
                all: rate("bandwidth", bytes(self.bandwidth), bytes(self.bandwidth_burst))?,
                reads: rate("read_bandwidth", bytes(self.read_bandwidth), None)?,
                writes: rate("write_bandwidth", bytes(self.write_bandwidth), None)?,
            },
        };
        Ok((limits != Limits::default()).then_some(limits))
    }
}

fn rate(name: &'static str, per_second: Option<u64>, burst: Option<u64>) -> Result<Option<Rate>, InvalidRates> {
    let Some(per_second) = per_second else {
        return if burst.is_some() { Err(InvalidRates::BurstUnused(name)) } else { Ok(None) };
    };
    let per_second = NonZeroU64::new(per_second).ok_or(InvalidRates::Zero(name))?;
    if burst == Some(0) {
        return Err(InvalidRates::Zero(if name == "iops" { "iops_burst" } else { "bandwidth_burst" }));
    }
    Ok(Some(Rate { per_second, burst: burst.unwrap_or(per_second.get() / DEFAULT_BURST) }))
}

impl FromStr for RateLimits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rates = Self::default();
        if text == "none" {
            return Ok(rates);
        }
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || value.parse().map(Some).map_err(|error| format!("{key}={value}: {error}"));
            let size = || value.parse().map(Some).map_err(|error: super::SizeError| format!("{key}: {error}"));
            match key {
                "iops" => rates.iops = number()?,
                "iops_burst" => rates.iops_burst = number()?,
                "read_iops" => rates.read_iops = number()?,
                "write_iops" => rates.write_iops = number()?,
                "bandwidth" => rates.bandwidth = size()?,
                "bandwidth_burst" => rates.bandwidth_burst = size()?,
                "read_bandwidth" => rates.read_bandwidth = size()?,
                "write_bandwidth" => rates.write_bandwidth = size()?,
                _ => {
                    return Err(format!(
                        "{key:?} is not one of iops, bandwidth, read_iops, read_bandwidth, write_iops, write_bandwidth, \
                         iops_burst, bandwidth_burst"
                    ));
                }
            }
        }
        Ok(rates)
    }
}

/// As it is understood on the command line.
impl fmt::Display for RateLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |size: Option<Size>| size.map(|size| size.0);
        let all = [
            ("iops", self.iops),
            ("iops_burst", self.iops_burst),
            ("read_iops", self.read_iops),
            ("write_iops", self.write_iops),
            ("bandwidth", bytes(self.bandwidth)),
            ("bandwidth_burst", bytes(self.bandwidth_burst)),
            ("read_bandwidth", bytes(self.read_bandwidth)),
            ("write_bandwidth", bytes(self.write_bandwidth)),
        ];
        let mut comma = "";
        for (name, value) in all {
            if let Some(value) = value {
                write!(f, "{comma}{name}={value}")?;
                comma = ",";
            }
        }
        if comma.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(toml: &str) -> Result<Option<Limits>, String> {
        let rates: RateLimits = toml::from_str(toml).map_err(|error| error.to_string())?;
        rates.limits().map_err(|error| error.to_string())
    }

    #[test]
    fn limits_are_understood() {
        assert_eq!(parse(""), Ok(None));
        let limits = parse("iops = 1000\nread_iops = 5\nbandwidth = '10M'\nbandwidth_burst = 512").unwrap().unwrap();
        let rate = |per_second, burst| NonZeroU64::new(per_second).map(|per_second| Rate { per_second, burst });
        assert_eq!(limits.operations, Budget { all: rate(1000, 100), reads: rate(5, 0), writes: None });
        assert_eq!(limits.bytes, Budget { all: rate(10 << 20, 512), reads: None, writes: None });
        let limits =
            parse("iops = 1\niops_burst = 9\nwrite_iops = 40\nwrite_bandwidth = 70\nread_bandwidth = 80").unwrap();
        let limits = limits.unwrap();
        assert_eq!(limits.operations, Budget { all: rate(1, 9), reads: None, writes: rate(40, 4) });
        assert_eq!(limits.bytes, Budget { all: None, reads: rate(80, 8), writes: rate(70, 7) });
        let all = "iops=100,iops_burst=2,read_iops=3,write_iops=4,bandwidth=10485760,bandwidth_burst=6,read_bandwidth=7,\
                   write_bandwidth=8";
        let rates: RateLimits = all.parse().unwrap();
        assert_eq!(rates.to_string(), all);
        assert_eq!("iops=100,bandwidth=10M".parse::<RateLimits>().unwrap().to_string(), "iops=100,bandwidth=10485760");
        assert_eq!(("none".parse(), RateLimits::default().to_string()), (Ok(RateLimits::default()), "none".to_owned()));
        for (text, told) in
            [("", "not one of iops"), ("iops", "iops="), ("bandwidth=x", "such as 512M"), ("iops=5;", "iops=5;")]
        {
            let error = text.parse::<RateLimits>().unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_says_why() {
        for (toml, told) in [
            ("iops = 0", "iops is 0"),
            ("write_bandwidth = 0", "write_bandwidth is 0"),
            ("iops = 5\niops_burst = 0", "iops_burst is 0"),
            ("iops_burst = 5", "iops_burst is for iops"),
            ("bandwidth_burst = 5\niops = 1", "bandwidth_burst is for bandwidth"),
            ("iops = -1", "u64"),
            ("bandwidth = 'much'", "such as 512M"),
            ("iop = 1", "unknown field"),
        ] {
            let error = parse(toml).unwrap_err();
            assert!(error.contains(told), "{toml}: {error}");
        }
    }
}
