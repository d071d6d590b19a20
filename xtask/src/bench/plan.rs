//! What is measured, in which order, and what beside what.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use client::BlockOptions;
use testbed::{Progress, binary};

use super::DRIVER_CPU;
use super::floors::{self, Memory};
use super::load::{Completion, Load, MAX_DEPTH, on_cpu};
use super::servers::{self, Place, Store};
use super::tenants::Beside;
use super::turns::{self, Contender, Turn};

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
    /// Beside what has this name.
    CacheLine(&'static str),
    Copy,
    EventFd,
    /// With this polling policy.
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
            let rings = match load.rings {
                BlockOptions::PACKED => ", packed",
                BlockOptions::IN_ORDER => ", in order",
                _ => "",
            };
            format!("{store}, {way}, depth {}{driver}{rings}", load.depth)
        };
        let (title, unit) = match &measure {
            Measure::CacheLine(of) => {
                (format!("a cache line to the other core and back, beside {of}"), Unit::Nanoseconds)
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

    /// Whether it needs the file that is served.
    pub(super) fn is_of_file(&self) -> bool {
        match self.measure {
            Measure::Fio(_) => true,
            Measure::Ours(store, ..) | Measure::QemuStorageDaemon(store, _) => store == Store::File,
            _ => false,
        }
    }

    /// Has it ready for its turns, on the driver's thread.
    fn start<'a>(&self, place: &'a Place, memory: &'a Memory) -> Result<Box<dyn Contender + 'a>> {
        let name = self.name;
        Ok(match self.measure {
            Measure::CacheLine(_) => Box::new(|turn: Turn| floors::cache_line(turn.length)),
            Measure::Copy => Box::new(|turn: Turn| memory.copy(turn.length)),
            Measure::EventFd => Box::new(|turn: Turn| floors::eventfd(turn.length)),
            Measure::Ours(store, poll, load) => Box::new(servers::ours(&binary()?, name, place, store, poll, load)?),
            Measure::QemuStorageDaemon(store, load) => {
                Box::new(servers::qemu_storage_daemon(name, place, store, load)?)
            }
            Measure::Fio(load) => Box::new(move |turn: Turn| servers::fio(place, load, turn)),
            Measure::FioNbd(load) => Box::new(move |turn: Turn| servers::fio_nbd(place, load, turn)),
            Measure::Beside(depth) => Box::new(Beside::start(name, place, depth)?),
        })
    }
}

/// How often what has no short turns is there in a round.
const PASSES: u32 = 4;

/// What is compared with each other.
pub(super) struct Group {
    pub(super) subjects: Vec<Subject>,
    /// Whether they are all there at once and have short turns; otherwise there is one after the other, and then back again.
    in_turns: bool,
}

/// All that is measured, some of it on a file of so many bytes.
pub(super) fn groups(file_size: u64) -> Vec<Group> {
    use Measure::{Beside, CacheLine, Copy, EventFd, Fio, FioNbd, Ours, QemuStorageDaemon};
    use Store::{File, Memory, Nbd, Null};
    let load = |store: Store, depth| Load {
        write: false,
        depth,
        completion: Completion::Poll,
        rings: 0,
        size: store.size(file_size),
    };
    let event = |depth| Load { completion: Completion::Event, ..load(Null, depth) };
    let packed = |depth| Load { rings: BlockOptions::PACKED, ..load(Null, depth) };
    let in_order = |depth| Load { rings: BlockOptions::IN_ORDER, ..load(Null, depth) };
    let write = |depth| Load { write: true, ..load(File, depth) };
    // The driver sleeps, for its processor is the NBD server's too.
    let nbd = |write| Load { write, completion: Completion::Event, ..load(Nbd, 32) };
    vec![
        in_turns([
            ("null-floor-1", CacheLine("null, depth 1")),
            ("null-always-1", Ours(Null, "always", load(Null, 1))),
            ("null-adaptive-1", Ours(Null, "adaptive", load(Null, 1))),
            ("null-packed-1", Ours(Null, "always", packed(1))),
            ("null-in-order-1", Ours(Null, "always", in_order(1))),
            ("null-qsd-1", QemuStorageDaemon(Null, load(Null, 1))),
        ]),
        in_turns([
            ("null-floor-32", CacheLine("null, depth 32")),
            ("null-always-32", Ours(Null, "always", load(Null, 32))),
            ("null-adaptive-32", Ours(Null, "adaptive", load(Null, 32))),
            ("null-packed-32", Ours(Null, "always", packed(32))),
            ("null-in-order-32", Ours(Null, "always", in_order(32))),
            ("null-qsd-32", QemuStorageDaemon(Null, load(Null, 32))),
        ]),
        in_turns([
            ("eventfd", EventFd),
            ("null-event-1", Ours(Null, "adaptive", event(1))),
            ("null-event-qsd-1", QemuStorageDaemon(Null, event(1))),
            ("null-event-32", Ours(Null, "adaptive", event(32))),
            ("null-event-qsd-32", QemuStorageDaemon(Null, event(32))),
        ]),
        in_turns([
            ("copy", Copy),
            ("memory-floor", CacheLine("memory")),
            ("memory-always-1", Ours(Memory, "always", load(Memory, 1))),
            ("memory-always-32", Ours(Memory, "always", load(Memory, 32))),
            ("memory-adaptive-32", Ours(Memory, "adaptive", load(Memory, 32))),
        ]),
        in_turns([("beside-idle", Beside(0)), ("beside-flooded", Beside(MAX_DEPTH))]),
        // A disk takes longer than a turn to forget who was there before.
        alone([("file-read-1", Ours(File, "adaptive", load(File, 1))), ("file-read-fio-1", Fio(load(File, 1)))]),
        alone([
            ("file-read-32", Ours(File, "adaptive", load(File, 32))),
            ("file-read-fio-32", Fio(load(File, 32))),
            ("file-read-qsd-32", QemuStorageDaemon(File, load(File, 32))),
        ]),
        alone([("file-write-1", Ours(File, "adaptive", write(1))), ("file-write-fio-1", Fio(write(1)))]),
        alone([
            ("file-write-32", Ours(File, "adaptive", write(32))),
            ("file-write-fio-32", Fio(write(32))),
            ("file-write-qsd-32", QemuStorageDaemon(File, write(32))),
        ]),
        alone([
            ("nbd-read-32", Ours(Nbd, "adaptive", nbd(false))),
            ("nbd-read-qsd-32", QemuStorageDaemon(Nbd, nbd(false))),
            ("nbd-read-fio-32", FioNbd(nbd(false))),
        ]),
        alone([
            ("nbd-write-32", Ours(Nbd, "adaptive", nbd(true))),
            ("nbd-write-qsd-32", QemuStorageDaemon(Nbd, nbd(true))),
            ("nbd-write-fio-32", FioNbd(nbd(true))),
        ]),
    ]
}

fn in_turns<const N: usize>(measures: [(&'static str, Measure); N]) -> Group {
    Group { in_turns: true, ..alone(measures) }
}

fn alone<const N: usize>(measures: [(&'static str, Measure); N]) -> Group {
    let subjects = measures.into_iter().map(|(name, measure)| Subject::new(name, measure)).collect();
    Group { subjects, in_turns: false }
}

impl Group {
    /// The values of each subject in a round, in which each has `duration`.
    fn measure(&self, place: &Place, memory: &Memory, duration: Duration) -> Result<Vec<Vec<f64>>> {
        let start =
            |subject: &Subject| subject.start(place, memory).map_err(|error| error.context(subject.title.clone()));
        on_cpu(DRIVER_CPU, || {
            if self.in_turns {
                let mut contenders = self.subjects.iter().map(start).collect::<Result<Vec<_>>>()?;
                let turns = duration.as_millis() / Turn::SHORT.length.as_millis();
                let values = turns::take(&mut contenders, usize::try_from(turns)?)?;
                contenders.into_iter().try_for_each(Contender::leave)?;
                return Ok(values);
            }
            let mut values = vec![Vec::new(); self.subjects.len()];
            for pass in 0..PASSES {
                let mut order: Vec<_> = self.subjects.iter().zip(&mut values).collect();
                if pass % 2 == 1 {
                    order.reverse();
                }
                for (subject, values) in order {
                    let mut contender = start(subject)?;
                    values.push(contender.turn(Turn::whole(duration / PASSES))?);
                    contender.leave()?;
                }
            }
            Ok(values)
        })
    }
}

/// The values of a subject: of each round, those of its turns.
pub(super) type Results = BTreeMap<&'static str, Vec<Vec<f64>>>;

/// Measures all groups in each round, so that whatever else the machine does falls on all alike.
pub(super) fn measure(
    groups: &[Group],
    place: &Place,
    rounds: usize,
    duration: Duration,
    progress: &Progress,
) -> Result<Results> {
    let step = progress.step("measuring");
    let memory = Memory::new();
    let mut results = Results::new();
    for round in 0..rounds {
        for (index, group) in groups.iter().enumerate() {
            let first = group.subjects.first().map_or("", |subject| &subject.title);
            step.note(&format!("round {} of {rounds}, {first} ...", round + 1));
            let values = group.measure(place, &memory, duration)?;
            for (subject, values) in group.subjects.iter().zip(values) {
                results.entry(subject.name).or_default().push(values);
            }
            step.advance((round * groups.len() + index + 1) as u64, (groups.len() * rounds) as u64);
        }
    }
    step.done("done");
    Ok(results)
}
