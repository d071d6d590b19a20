//! What is measured, in which order, and the bars that the ratios have to reach.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use testbed::Progress;

use super::floors::{self, Memory};
use super::load::{Completion, Load, MAX_DEPTH};
use super::servers::{self, Place, Store};
use super::tenants;

/// What one measurement gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Requests a second.
    Rate,
    Nanoseconds,
}

/// One thing to measure.
pub(super) struct Subject {
    /// Its name, by which bars and plots find it.
    pub(super) name: &'static str,
    /// What it is, for people.
    pub(super) title: String,
    pub(super) unit: Unit,
    measure: Measure,
}

enum Measure {
    /// The floor of what is measured next, which has this name.
    CacheLine(&'static str),
    Copy,
    EventFd,
    Ours(Store, &'static str, Load),
    QemuStorageDaemon(Store, Load),
    Fio(Load),
    FioNbd(Load),
    Beside(u16),
}

impl Subject {
    fn new(name: &'static str, measure: Measure) -> Self {
        let what = |store: Store, load: &Load| {
            let store = match store {
                Store::Null => "null",
                Store::Memory => "memory",
                Store::File => "file, direct",
                Store::Nbd => "NBD, nbdkit's memory",
            };
            let way = if load.write { "write" } else { "read" };
            let driver = if load.completion == Completion::Event { ", driver sleeping" } else { "" };
            format!("{store}, {way}, depth {}{driver}", load.depth)
        };
        let (title, unit) = match &measure {
            Measure::CacheLine(of) => {
                (format!("a cache line to the other core and back, before {of}"), Unit::Nanoseconds)
            }
            Measure::Copy => ("a random 4 KiB copy out of 512 MiB".to_owned(), Unit::Nanoseconds),
            Measure::EventFd => ("an eventfd to a sleeping thread and back".to_owned(), Unit::Nanoseconds),
            Measure::Ours(store, poll, load) => {
                (format!("vfio-user-blk, poll {poll}: {}", what(*store, load)), Unit::Rate)
            }
            Measure::QemuStorageDaemon(store, load) => {
                (format!("qemu-storage-daemon: {}", what(*store, load)), Unit::Rate)
            }
            Measure::Fio(load) => (format!("fio: {}", what(Store::File, load)), Unit::Rate),
            Measure::FioNbd(load) => (format!("fio, libnbd: {}", what(Store::Nbd, load)), Unit::Rate),
            Measure::Beside(0) => ("vfio-user-blk, depth 1: p99, the other device idle".to_owned(), Unit::Nanoseconds),
            Measure::Beside(depth) => {
                (format!("vfio-user-blk, depth 1: p99, the other device at depth {depth}"), Unit::Nanoseconds)
            }
        };
        Self { name, title, unit, measure }
    }
}

/// All that is measured.
pub(super) fn subjects(place: &Place) -> Vec<Subject> {
    use Measure::{Beside, CacheLine, Copy, EventFd, Fio, FioNbd, Ours, QemuStorageDaemon};
    use Store::{File, Memory, Nbd, Null};
    let load = |store, depth| Load { write: false, depth, completion: Completion::Poll, size: place.size(store) };
    let event = |depth| Load { completion: Completion::Event, ..load(Null, depth) };
    let write = |depth| Load { write: true, ..load(File, depth) };
    // The driver sleeps, for its processor is the NBD server's too.
    let nbd = |write| Load { write, completion: Completion::Event, ..load(Nbd, 32) };
    let measures = [
        ("eventfd", EventFd),
        ("null-always-1-floor", CacheLine("null, depth 1")),
        ("null-always-1", Ours(Null, "always", load(Null, 1))),
        ("null-adaptive-1", Ours(Null, "adaptive", load(Null, 1))),
        ("null-qsd-1", QemuStorageDaemon(Null, load(Null, 1))),
        ("null-always-32-floor", CacheLine("null, depth 32")),
        ("null-always-32", Ours(Null, "always", load(Null, 32))),
        ("null-adaptive-32", Ours(Null, "adaptive", load(Null, 32))),
        ("null-qsd-32", QemuStorageDaemon(Null, load(Null, 32))),
        ("null-event-1", Ours(Null, "adaptive", event(1))),
        ("null-event-qsd-1", QemuStorageDaemon(Null, event(1))),
        ("null-event-32", Ours(Null, "adaptive", event(32))),
        ("null-event-qsd-32", QemuStorageDaemon(Null, event(32))),
        ("copy", Copy),
        ("memory-always-1-floor", CacheLine("memory, depth 1")),
        ("memory-always-1", Ours(Memory, "always", load(Memory, 1))),
        ("memory-always-32", Ours(Memory, "always", load(Memory, 32))),
        ("memory-adaptive-32", Ours(Memory, "adaptive", load(Memory, 32))),
        ("file-read-1", Ours(File, "adaptive", load(File, 1))),
        ("file-read-fio-1", Fio(load(File, 1))),
        ("file-read-32", Ours(File, "adaptive", load(File, 32))),
        ("file-read-fio-32", Fio(load(File, 32))),
        ("file-read-qsd-32", QemuStorageDaemon(File, load(File, 32))),
        ("file-write-1", Ours(File, "adaptive", write(1))),
        ("file-write-fio-1", Fio(write(1))),
        ("file-write-32", Ours(File, "adaptive", write(32))),
        ("file-write-fio-32", Fio(write(32))),
        ("file-write-qsd-32", QemuStorageDaemon(File, write(32))),
        ("nbd-read-32", Ours(Nbd, "adaptive", nbd(false))),
        ("nbd-read-qsd-32", QemuStorageDaemon(Nbd, nbd(false))),
        ("nbd-read-fio-32", FioNbd(nbd(false))),
        ("nbd-write-32", Ours(Nbd, "adaptive", nbd(true))),
        ("nbd-write-qsd-32", QemuStorageDaemon(Nbd, nbd(true))),
        ("nbd-write-fio-32", FioNbd(nbd(true))),
        ("beside-idle", Beside(0)),
        ("beside-flooded", Beside(MAX_DEPTH)),
    ];
    measures.into_iter().map(|(name, measure)| Subject::new(name, measure)).collect()
}

/// The values of a subject, one a round.
pub(super) type Results = BTreeMap<&'static str, Vec<f64>>;

/// Measures all subjects in turns, so that whatever else the machine does falls on all alike.
pub(super) fn measure(
    subjects: &[Subject],
    place: &Place,
    rounds: usize,
    duration: Duration,
    progress: &Progress,
) -> Result<Results> {
    let step = progress.step("measuring");
    let memory = Memory::new();
    let mut results = Results::new();
    let total = (subjects.len() * rounds) as u64;
    for round in 0..rounds {
        for (index, subject) in subjects.iter().enumerate() {
            step.note(&format!("round {} of {rounds}, {}", round + 1, subject.title));
            let value = match &subject.measure {
                Measure::CacheLine(_) => floors::cache_line(duration),
                Measure::Copy => memory.copy(duration),
                Measure::EventFd => floors::eventfd(duration),
                Measure::Ours(store, poll, load) => servers::ours(place, *store, poll, *load, duration),
                Measure::QemuStorageDaemon(store, load) => servers::qemu_storage_daemon(place, *store, *load, duration),
                Measure::Fio(load) => servers::fio(place, *load, duration),
                Measure::FioNbd(load) => servers::fio_nbd(place, *load, duration),
                Measure::Beside(depth) => tenants::beside(place, *depth, duration),
            };
            let value = value.map_err(|error| error.context(subject.title.clone()))?;
            results.entry(subject.name).or_default().push(value);
            step.advance((round * subjects.len() + index + 1) as u64, total);
        }
    }
    step.done("done");
    Ok(results)
}

/// The value in the middle; the mean of two for an even number.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), middle.checked_sub(1).and_then(|below| values.get(below))) {
        (Some(above), Some(below)) if values.len().is_multiple_of(2) => (above + below) / 2.0,
        (Some(value), _) => *value,
        (None, _) => f64::NAN,
    }
}

/// What a ratio has to be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    pub(super) fn is_reached(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(bar) => ratio <= bar,
            Self::AtLeast(bar) => ratio >= bar,
        }
    }
}

/// The values of one round, by the names of their subjects.
type Values<'a> = dyn Fn(&str) -> f64 + 'a;

/// One ratio: how it is made of one round's values.
struct Ratio {
    title: &'static str,
    bar: Option<Bar>,
    of: fn(&Values<'_>) -> f64,
}

/// Nanoseconds of a request at this rate.
fn time(rate: f64) -> f64 {
    1e9 / rate
}

const RATIOS: [Ratio; 21] = [
    Ratio {
        title: "null, always polling, depth 1: time a request over the cache-line round trip",
        bar: Some(Bar::AtMost(2.5)),
        of: |value| time(value("null-always-1")) / value("null-always-1-floor"),
    },
    Ratio {
        title: "null, always polling, depth 32: the same",
        bar: Some(Bar::AtMost(0.70)),
        of: |value| time(value("null-always-32")) / value("null-always-32-floor"),
    },
    Ratio {
        title: "memory, depth 32: rate over the one-core random 4 KiB copy rate",
        bar: Some(Bar::AtLeast(0.75)),
        of: |value| value("memory-always-32") / time(value("copy")),
    },
    Ratio {
        title: "memory, depth 1: time over (2.5 round trips + one copy)",
        bar: Some(Bar::AtMost(1.2)),
        of: |value| time(value("memory-always-1")) / (2.5 * value("memory-always-1-floor") + value("copy")),
    },
    Ratio {
        title: "file, direct, read, depth 1: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-read-1") / value("file-read-fio-1"),
    },
    Ratio {
        title: "file, direct, read, depth 32: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-read-32") / value("file-read-fio-32"),
    },
    Ratio {
        title: "file, direct, write, depth 1: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-write-1") / value("file-write-fio-1"),
    },
    Ratio {
        title: "file, direct, write, depth 32: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-write-32") / value("file-write-fio-32"),
    },
    Ratio {
        title: "adaptive over always, null, depth 32",
        bar: Some(Bar::AtLeast(0.95)),
        of: |value| value("null-adaptive-32") / value("null-always-32"),
    },
    Ratio {
        title: "adaptive over always, memory, depth 32",
        bar: Some(Bar::AtLeast(0.95)),
        of: |value| value("memory-adaptive-32") / value("memory-always-32"),
    },
    Ratio {
        title: "driver sleeping on eventfds, null, depth 32: rate over qemu-storage-daemon",
        bar: Some(Bar::AtLeast(1.5)),
        of: |value| value("null-event-32") / value("null-event-qsd-32"),
    },
    Ratio {
        title: "two devices, the other at depth 256: p99 at depth 1 over alone",
        bar: Some(Bar::AtMost(2.0)),
        of: |value| value("beside-flooded") / value("beside-idle"),
    },
    Ratio {
        title: "NBD, read, depth 32: rate over qemu-storage-daemon with the same export",
        bar: Some(Bar::AtLeast(1.2)),
        of: |value| value("nbd-read-32") / value("nbd-read-qsd-32"),
    },
    Ratio {
        title: "NBD, write, depth 32: the same",
        bar: Some(Bar::AtLeast(1.2)),
        of: |value| value("nbd-write-32") / value("nbd-write-qsd-32"),
    },
    Ratio {
        title: "NBD, read, depth 32: rate over fio with the same export",
        bar: None,
        of: |value| value("nbd-read-32") / value("nbd-read-fio-32"),
    },
    Ratio {
        title: "NBD, write, depth 32: the same",
        bar: None,
        of: |value| value("nbd-write-32") / value("nbd-write-fio-32"),
    },
    Ratio {
        title: "driver sleeping on eventfds, null, depth 1: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-event-1") / value("null-event-qsd-1"),
    },
    Ratio {
        title: "driver polling, null, depth 1: rate (adaptive) over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-adaptive-1") / value("null-qsd-1"),
    },
    Ratio {
        title: "driver polling, null, depth 32: rate (adaptive) over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-adaptive-32") / value("null-qsd-32"),
    },
    Ratio {
        title: "file, direct, read, depth 32: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("file-read-32") / value("file-read-qsd-32"),
    },
    Ratio {
        title: "file, direct, write, depth 32: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("file-write-32") / value("file-write-qsd-32"),
    },
];

/// A ratio that was measured.
pub(super) struct Measured {
    pub(super) title: String,
    pub(super) bar: Option<Bar>,
    /// The ratio of each round.
    pub(super) ratios: Vec<f64>,
    /// What comes after the number.
    pub(super) unit: &'static str,
}

/// The ratios whose values are all there: each round's own, since only they were measured side by side.
pub(super) fn ratios(results: &Results) -> Vec<Measured> {
    let rounds = results.values().map(Vec::len).min().unwrap_or(0);
    RATIOS
        .iter()
        .map(|ratio| {
            let of_round = |round: usize| {
                (ratio.of)(&|name: &str| {
                    results.get(name).and_then(|values| values.get(round)).copied().unwrap_or(f64::NAN)
                })
            };
            let ratios = (0..rounds).map(of_round).collect();
            Measured { title: ratio.title.to_owned(), bar: ratio.bar, ratios, unit: "" }
        })
        .filter(|measured: &Measured| measured.ratios.iter().all(|ratio| ratio.is_finite()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ratio_is_made_of_subjects() {
        let place = Place { folder: "/".into(), file: "/file".into(), file_size: 1 << 30 };
        let results: Results = subjects(&place).iter().map(|subject| (subject.name, vec![2.0, 4.0])).collect();
        assert_eq!(ratios(&results).len(), RATIOS.len());
        let mut fewer = results;
        fewer.remove("copy");
        assert_eq!(ratios(&fewer).len(), RATIOS.len() - 2);
    }

    #[test]
    fn the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
