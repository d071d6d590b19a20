//! The faults that a device's description asks for.

use std::sync::Arc;

use crate::backend::Store;
use crate::backend::faults::{Fault, FaultyStore, Kind, Latency, Rule, When};
use crate::config::{DeviceConfig, FaultConfig, FaultKind, FaultOn, Wait};

/// Puts a device's faults before its store, if it is to have any.
pub(super) fn with_faults(store: Arc<dyn Store>, config: &DeviceConfig) -> Arc<dyn Store> {
    if config.faults.is_empty() {
        return store;
    }
    let rules = config.faults.iter().map(rule).collect();
    Arc::new(FaultyStore::new(store, rules, config.fault_seed.unwrap_or_default()))
}

fn rule(config: &FaultConfig) -> Rule {
    let latency = match (config.latency, config.sigma) {
        (Some(Wait::Fixed(median)), Some(sigma)) => Latency::LogNormal { median, sigma: sigma.get() },
        (Some(Wait::Fixed(latency)), None) => Latency::Fixed(latency),
        (Some(Wait::Between(least, most)), _) => Latency::Uniform(least, most),
        (None, _) => Latency::Fixed(std::time::Duration::ZERO),
    };
    let kind = |on: FaultOn| match on {
        FaultOn::Read => Kind::Read,
        FaultOn::Write => Kind::Write,
        FaultOn::Flush => Kind::Flush,
        FaultOn::Discard => Kind::Discard,
        FaultOn::WriteZeroes => Kind::WriteZeroes,
    };
    Rule {
        kinds: config.on().into_iter().map(kind).collect(),
        sectors: config.sectors.clone().map(|sectors| sectors.0),
        when: match (config.probability, config.every) {
            (Some(probability), _) => When::Probability(probability.get()),
            (None, Some(every)) => When::Every(every),
            (None, None) => When::Always,
        },
        fault: match config.fault {
            FaultKind::Latency => Fault::Latency(latency),
            FaultKind::Eio => Fault::Error(libc::EIO),
            FaultKind::Enospc => Fault::Error(libc::ENOSPC),
            FaultKind::Torn => Fault::Torn,
            FaultKind::Lost => Fault::Lost,
        },
    }
}
