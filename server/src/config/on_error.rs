//! What a device does when its storage fails, and when its power is cut.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{DeviceConfig, Size};

/// Seconds that requests are tried again, where nobody says how many.
const DEFAULT_RETRY_DEADLINE: u32 = 60;
/// The most: a day.
const MAX_RETRY_DEADLINE: u32 = 86400;
/// The cache of a device whose power can be cut, where nobody says how large.
const DEFAULT_POWER_CUT_CACHE: Size = Size(64 << 20);
/// The least that holds a few requests.
const MIN_POWER_CUT_CACHE: Size = Size(4096);
/// The most.
const MAX_POWER_CUT_CACHE: Size = Size(64 << 30);

/// What is done with a request that the storage has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The guest is told of the error
    #[default]
    Report,
    /// It waits until `ctl resume` has it sent again: the guest sees a slow disk
    Hold,
    /// It is sent again, less and less often; the guest is told of the error after --retry-deadline
    Retry,
}

/// Why that cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidOnError {
    /// A deadline for nothing.
    #[error("retry_deadline is for on_error = \"retry\" only; leave it out")]
    DeadlineUnused,
    /// The deadline.
    #[error("retry_deadline is {0}; it must be from 1 to 86400 seconds")]
    Deadline(u32),
    /// A cache for nothing.
    #[error("power_cut_cache is for power_cut = true only; leave it out")]
    CacheUnused,
    /// The cache.
    #[error("power_cut_cache is {0}; it must be from 4K to 64G")]
    Cache(Size),
    /// What is never written loses nothing.
    #[error("power_cut is for devices that are written; leave read_only out")]
    ReadOnly,
    /// The cache's thread has no polled ring.
    #[error("power_cut and iopoll do not go together; leave one of them out")]
    Iopoll,
}

impl DeviceConfig {
    /// What is done with requests that the storage has failed.
    pub fn on_error(&self) -> OnError {
        self.on_error.unwrap_or_default()
    }

    /// Seconds that requests are tried again.
    pub fn retry_deadline(&self) -> u32 {
        self.retry_deadline.unwrap_or(DEFAULT_RETRY_DEADLINE)
    }

    /// Bytes of the cache that a power cut empties.
    pub fn power_cut_cache(&self) -> u64 {
        self.power_cut_cache.unwrap_or(DEFAULT_POWER_CUT_CACHE).0
    }

    pub(super) fn check_on_error(&self) -> Result<(), InvalidOnError> {
        if let Some(seconds) = self.retry_deadline {
            if self.on_error() != OnError::Retry {
                return Err(InvalidOnError::DeadlineUnused);
            }
            if !(1..=MAX_RETRY_DEADLINE).contains(&seconds) {
                return Err(InvalidOnError::Deadline(seconds));
            }
        }
        if let Some(size) = self.power_cut_cache {
            if !self.power_cut {
                return Err(InvalidOnError::CacheUnused);
            }
            if !(MIN_POWER_CUT_CACHE..=MAX_POWER_CUT_CACHE).contains(&size) {
                return Err(InvalidOnError::Cache(size));
            }
        }
        match (self.power_cut, self.read_only, self.iopoll) {
            (true, true, _) => Err(InvalidOnError::ReadOnly),
            (true, _, true) => Err(InvalidOnError::Iopoll),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::InvalidDevice;

    #[test]
    fn what_does_not_go_together_is_refused() {
        let check = |change: fn(&mut DeviceConfig)| {
            let mut device = DeviceConfig::new("blk.sock");
            change(&mut device);
            device.check()
        };
        let refused = |change| match check(change) {
            Err(InvalidDevice::OnError(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(check(|device| device.on_error = Some(OnError::Hold)), Ok(()));
        assert_eq!(refused(|device| device.retry_deadline = Some(5)), InvalidOnError::DeadlineUnused);
        let hold =
            |device: &mut DeviceConfig| (device.on_error, device.retry_deadline) = (Some(OnError::Hold), Some(5));
        assert_eq!(refused(hold), InvalidOnError::DeadlineUnused);
        fn retry(device: &mut DeviceConfig, seconds: u32) {
            (device.on_error, device.retry_deadline) = (Some(OnError::Retry), Some(seconds));
        }
        assert_eq!(check(|device| retry(device, 86400)), Ok(()));
        assert_eq!(refused(|device| retry(device, 0)), InvalidOnError::Deadline(0));
        assert_eq!(refused(|device| retry(device, 86401)), InvalidOnError::Deadline(86401));
        assert_eq!(refused(|device| device.power_cut_cache = Some(Size(4096))), InvalidOnError::CacheUnused);
        fn power_cut(device: &mut DeviceConfig, cache: u64) {
            (device.power_cut, device.power_cut_cache) = (true, Some(Size(cache)));
        }
        assert_eq!(check(|device| power_cut(device, 4096)), Ok(()));
        assert_eq!(refused(|device| power_cut(device, 4095)), InvalidOnError::Cache(Size(4095)));
        assert_eq!(refused(|device| power_cut(device, 1 << 40)), InvalidOnError::Cache(Size(1 << 40)));
        assert_eq!(refused(|device| (device.power_cut, device.read_only) = (true, true)), InvalidOnError::ReadOnly);
        let polled = |device: &mut DeviceConfig| {
            (device.power_cut, device.iopoll, device.blk_file) = (true, true, Some("a".into()));
        };
        assert_eq!(refused(polled), InvalidOnError::Iopoll);
    }
}
