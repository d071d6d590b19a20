//! What goes wrong with a device on purpose: as its description says, and as operators say while it is served.
//!
//! The rules themselves, and what they do to operations, are in [`backend::faults`](crate::backend::faults); [`FaultyQueue`] does
//! what they say of interrupts. A kick is lost where the session hears of it.

mod queue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::backend::faults::{Breakdown, Delivery, Fault, Faults, Kind, Latency, Rule, When};
use crate::config::{DeviceConfig, FaultConfig, FaultKind, FaultOn, Wait};

pub(crate) use queue::FaultyQueue;

/// The faults of one device.
pub(crate) struct DeviceFaults {
    rules: Arc<Faults>,
    /// Each rule's number, and how it was described.
    described: Mutex<Vec<(u32, FaultConfig)>>,
}

/// A rule as it is told of.
#[derive(Debug, Serialize)]
pub(crate) struct Told {
    id: u32,
    rule: FaultConfig,
    /// How many operations, interrupts or kicks it has concerned.
    concerned: u64,
    /// How many of these it has struck.
    struck: u64,
}

impl DeviceFaults {
    /// Those of a device's description.
    pub(crate) fn new(config: &DeviceConfig) -> Self {
        let rules = Faults::new(config.fault_seed.unwrap_or_default(), config.faults.iter().map(rule).collect());
        Self { rules, described: Mutex::new((1..).zip(config.faults.iter().cloned()).collect()) }
    }

    /// The rules.
    pub(crate) fn rules(&self) -> &Arc<Faults> {
        &self.rules
    }

    /// All of them now; for whoever changes them, until that is done.
    pub(crate) fn change(&self) -> Change<'_> {
        Change { rules: &self.rules, described: self.described.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

/// The faults of a device in the hands of somebody who changes them.
pub(crate) struct Change<'a> {
    rules: &'a Faults,
    described: MutexGuard<'a, Vec<(u32, FaultConfig)>>,
}

impl Change<'_> {
    /// Whether nothing goes wrong.
    pub(crate) fn is_none(&self) -> bool {
        self.described.is_empty()
    }

    /// Adds one behind the others; says its number, if there is room for one more.
    pub(crate) fn add(&mut self, fault: &FaultConfig) -> Option<u32> {
        let number = self.rules.add(rule(fault))?;
        self.described.push((number, fault.clone()));
        Some(number)
    }

    /// Removes one, or all; says which.
    pub(crate) fn remove(&mut self, which: Option<u32>) -> Vec<u32> {
        let removed = self.rules.remove(|number| which.is_none_or(|which| which == number));
        self.described.retain(|(number, _)| !removed.contains(number));
        removed
    }

    /// Has one let go of what it holds, or all; says which.
    pub(crate) fn release(&self, which: Option<u32>) -> Vec<u32> {
        self.rules.release(|number| which.is_none_or(|which| which == number))
    }

    /// What there is, in the order in which it is asked.
    pub(crate) fn tell(&self) -> Vec<Told> {
        let rules = self.rules.rules();
        let told = rules.iter().zip(self.described.iter()).map(|(active, (_, rule))| {
            let (concerned, struck) = active.counts();
            Told { id: active.number, rule: rule.clone(), concerned, struck }
        });
        told.collect()
    }
}

fn rule(config: &FaultConfig) -> Rule {
    let latency = match (config.latency, config.sigma) {
        (Some(Wait::Fixed(median)), Some(sigma)) => Latency::LogNormal { median, sigma: sigma.get() },
        (Some(Wait::Fixed(latency)), None) => Latency::Fixed(latency),
        (Some(Wait::Between(least, most)), _) => Latency::Uniform(least, most),
        (None, _) => Latency::Fixed(Duration::ZERO),
    };
    let kind = |on: FaultOn| match on {
        FaultOn::Read => Kind::Read,
        FaultOn::Write => Kind::Write,
        FaultOn::Flush => Kind::Flush,
        FaultOn::Discard => Kind::Discard,
        FaultOn::WriteZeroes => Kind::WriteZeroes,
    };
    Rule {
        queue: config.queue,
        kinds: config.on().into_iter().map(kind).collect(),
        sectors: config.sectors.clone().map(|sectors| sectors.0),
        when: match (config.probability, config.every) {
            (Some(probability), _) => When::Probability(probability.get()),
            (None, Some(every)) => When::Every(every),
            (None, None) => When::Always,
        },
        burst: config.burst.unwrap_or(1),
        fault: match config.fault {
            FaultKind::Latency => Fault::Latency(latency),
            FaultKind::Eio => Fault::Error(libc::EIO),
            FaultKind::Enospc => Fault::Error(libc::ENOSPC),
            FaultKind::Torn => Fault::Torn,
            FaultKind::Lost => Fault::Lost,
            FaultKind::Stuck => Fault::Stuck,
            FaultKind::NeedsReset => Fault::Breakdown(Breakdown::NeedsReset),
            FaultKind::CloseSession => Fault::Breakdown(Breakdown::CloseSession),
            FaultKind::LostInterrupt => Fault::Interrupt(Delivery::Lost),
            FaultKind::LateInterrupt => Fault::Interrupt(Delivery::Late(latency)),
            FaultKind::SpuriousInterrupt => Fault::Interrupt(Delivery::Twice(latency)),
            FaultKind::LostKick => Fault::LostKick,
        },
    }
}
