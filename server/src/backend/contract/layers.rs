//! Layers before a store that the suite runs on.

use std::fs;
use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::stores::StoredFile;
use super::{Fixture, IsStable, KeepsBlocks};
use crate::backend::fabric::{DistantStore, Fabric};
use crate::backend::faults::{Fault, Faults, FaultyStore, Latency, Rule, When};
use crate::backend::hold::{HoldStore, OnError};
use crate::backend::limits::{Budget, LimitedStore, Limits, Rate};
use crate::backend::memory::MemoryStore;
use crate::backend::moody::Moody;
use crate::backend::power_cut::PowerCutStore;
use crate::backend::uring::{Uring, Waker};
use crate::backend::{Store, image};

/// Memory that answers when it likes.
pub(super) struct Late(FaultyStore);

impl Fixture for Late {
    fn new(capacity: u64) -> Self {
        let latency = Latency::Uniform(Duration::ZERO, Duration::from_micros(300));
        let late = |when| Rule { when, ..Rule::always(Fault::Latency(latency)) };
        let rules = vec![late(When::Probability(0.4)), late(When::Every(7))];
        Self(FaultyStore::new(Arc::new(MemoryStore::new(capacity).unwrap()), Faults::new(1, rules)))
    }

    fn store(&self) -> &dyn Store {
        &self.0
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl KeepsBlocks for Late {}

/// Memory that may be used as fast as can be: what waits is never taken, which a suite that counts on it cannot bear.
pub(super) struct Limited(LimitedStore);

impl Fixture for Limited {
    fn new(capacity: u64) -> Self {
        let rate = Rate { per_second: NonZeroU64::MAX, burst: 1 };
        let all = Budget { all: Some(rate), reads: Some(rate), writes: Some(rate) };
        let limits = Limits { operations: all, bytes: all };
        Self(LimitedStore::new(Arc::new(MemoryStore::new(capacity).unwrap()), &limits))
    }

    fn store(&self) -> &dyn Store {
        &self.0
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl KeepsBlocks for Limited {}

/// Memory that is elsewhere.
pub(super) struct Distant(DistantStore);

impl Fixture for Distant {
    fn new(capacity: u64) -> Self {
        let fabric = Fabric {
            round_trip: Duration::from_micros(50),
            jitter: Duration::from_micros(50),
            bandwidth: NonZeroU64::new(4 << 30),
            credits: NonZeroU16::new(300),
            seed: 1,
        };
        Self(DistantStore::new(Arc::new(MemoryStore::new(capacity).unwrap()), fabric))
    }

    fn store(&self) -> &dyn Store {
        &self.0
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl KeepsBlocks for Distant {}

/// Memory that fails now and then, before which all is tried again.
pub(super) struct Retried(HoldStore);

impl Fixture for Retried {
    fn new(capacity: u64) -> Self {
        let fails = |when| Rule { when, ..Rule::always(Fault::Error(libc::EIO)) };
        let rules = vec![fails(When::Every(50)), fails(When::Probability(0.01))];
        let faulty = FaultyStore::new(Arc::new(MemoryStore::new(capacity).unwrap()), Faults::new(1, rules));
        Self(HoldStore::new(Arc::new(faulty), OnError::Retry(Duration::from_secs(60)), "retried"))
    }

    fn store(&self) -> &dyn Store {
        &self.0
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl KeepsBlocks for Retried {}

/// A file before which errors would be held, if there were any; or a cache that a power cut empties.
pub(super) struct Before<const POWER_CUT: bool> {
    store: Box<dyn Store>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl<const POWER_CUT: bool> Fixture for Before<POWER_CUT> {
    fn new(capacity: u64) -> Self {
        let StoredFile::<true> { store, path, _dir, .. } = Fixture::new(capacity);
        let file: Arc<dyn Store> = Arc::new(store);
        let store: Box<dyn Store> = if POWER_CUT {
            // So small that it is often full.
            Box::new(PowerCutStore::new(file, 64 << 10, &image::testing::open_entrance()).unwrap())
        } else {
            Box::new(HoldStore::new(file, OnError::Hold, "held"))
        };
        Self { store, path, _dir }
    }

    fn store(&self) -> &dyn Store {
        &*self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl<const POWER_CUT: bool> KeepsBlocks for Before<POWER_CUT> {}

impl<const POWER_CUT: bool> IsStable for Before<POWER_CUT> {
    fn stored(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

/// A store below learns of what its queue is told, whatever stands before it.
#[test]
fn layers_pass_on_what_they_are_told() {
    let rate = Some(Rate { per_second: NonZeroU64::MIN, burst: 1 });
    let limits = Limits { operations: Budget { all: rate, ..Budget::default() }, ..Limits::default() };
    let fabric =
        Fabric { round_trip: Duration::from_secs(1), jitter: Duration::ZERO, bandwidth: None, credits: None, seed: 0 };
    type Layer<'a> = Box<dyn Fn(Arc<dyn Store>) -> Box<dyn Store> + 'a>;
    let layers: [(&str, Layer<'_>); 4] = [
        ("limits", Box::new(|inner| Box::new(LimitedStore::new(inner, &limits)))),
        ("fabric", Box::new(|inner| Box::new(DistantStore::new(inner, fabric)))),
        ("hold", Box::new(|inner| Box::new(HoldStore::new(inner, OnError::Hold, "held")))),
        (
            "faults",
            Box::new(|inner| Box::new(FaultyStore::new(inner, Faults::new(0, vec![Rule::always(Fault::Lost)])))),
        ),
    ];
    for (name, layer) in layers {
        let moody = Moody::new(4096);
        let mood = Arc::clone(&moody.mood);
        let ring = Rc::new(Uring::new(&Waker::new().unwrap()).unwrap());
        let mut backend = layer(Arc::new(moody)).attach(&ring, 0).unwrap();
        backend.hasten();
        assert_eq!(mood.told(), (1, 0), "{name}");
        backend.stop();
        assert_eq!(mood.told(), (1, 1), "{name}");
    }
}
