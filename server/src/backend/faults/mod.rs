//! A store that fails on purpose.
//!
//! A [`FaultyStore`] stands before another and has some operations come late, fail, get stuck, or get lost, as the [`Rule`]s
//! of its [`Faults`] say, which may change at any time. What a rule does to the *n*th operation that it concerns follows from
//! the seed, the rule's number and *n* alone: the same operations meet the same faults each time, whatever queues they come by.
//!
//! Those of interrupts and kicks are asked by the queues' tasks and the session.
//!
//! Rules are asked in their order. Latencies add up; the first other fault that strikes is the last, and the rules behind it do
//! not learn of the operation.

mod queue;
mod rule;
#[cfg(test)]
mod tests;
mod timers;

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::queue::SegQueue;
use queue::FaultyBackend;
pub use rule::{Breakdown, Delivery, Fault, Kind, Latency, Rule, When};
pub(crate) use timers::Timers;

use super::random::Random;
use super::uring::Uring;
use super::{Backend, Io, SECTOR, Service, Store, StoreInfo};

/// The longest that an operation is kept waiting.
pub const MAX_LATENCY: Duration = Duration::from_secs(60);
/// Rules that may be added to one device.
pub const MAX_RULES: usize = 256;

/// What goes wrong with one device: rules that come and go while it is served.
pub struct Faults {
    seed: u64,
    rules: ArcSwap<Vec<Arc<Active>>>,
    /// The number of the last rule that was added. Held by whoever changes the rules.
    last: Mutex<u32>,
    /// Whoever is told of breakdowns takes them from here.
    breakdowns: SegQueue<Breakdown>,
    /// How often a rule was removed or had to let go.
    eased: AtomicU64,
}

/// A rule at work.
pub struct Active {
    /// Its number, from 1 on; never that of another.
    pub number: u32,
    /// What it is.
    pub rule: Rule,
    concerned: AtomicU64,
    struck: AtomicU64,
    /// How often it had to let go of what it holds.
    released: AtomicU64,
}

impl Active {
    fn new(number: u32, rule: Rule) -> Arc<Self> {
        let [concerned, struck, released] = [0; 3].map(AtomicU64::new);
        Arc::new(Self { number, rule, concerned, struck, released })
    }

    /// How many it has concerned, and how many of these it has struck.
    pub fn counts(&self) -> (u64, u64) {
        let struck = self.struck.load(Ordering::Relaxed);
        (self.concerned.load(Ordering::Relaxed), struck)
    }

    /// It concerns one more: says whether that is struck, and if so, by which lot it decides how hard.
    fn asked(&self, seed: u64) -> Option<Random> {
        let nth = self.concerned.fetch_add(1, Ordering::Relaxed);
        let random = self.rule.strikes(seed, self.number, nth)?;
        self.struck.fetch_add(1, Ordering::Relaxed);
        Some(random)
    }
}

impl Faults {
    /// Those of a device, with these rules to begin with.
    pub fn new(seed: u64, rules: Vec<Rule>) -> Arc<Self> {
        let rules: Vec<_> = (1..).zip(rules).map(|(number, rule)| Active::new(number, rule)).collect();
        let last = rules.last().map_or(0, |rule| rule.number);
        let rules = ArcSwap::from_pointee(rules);
        Arc::new(Self { seed, rules, last: Mutex::new(last), breakdowns: SegQueue::new(), eased: AtomicU64::new(0) })
    }

    /// Where the sequence of faults starts.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The rules, in the order in which they are asked.
    pub fn rules(&self) -> Arc<Vec<Arc<Active>>> {
        self.rules.load_full()
    }

    /// Adds a rule behind the others; says its number, if there is room for one more.
    pub fn add(&self, rule: Rule) -> Option<u32> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rules = self.rules.load().to_vec();
        let number = last.checked_add(1).filter(|_| rules.len() < MAX_RULES)?;
        *last = number;
        rules.push(Active::new(number, rule));
        self.rules.store(Arc::new(rules));
        Some(number)
    }

    /// Removes the rules that `which` names by their numbers; says which these are. What they hold goes on when its queue is next
    /// looked at.
    pub fn remove(&self, which: impl Fn(u32) -> bool) -> Vec<u32> {
        let _changing = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let rules = self.rules.load();
        let (gone, left): (Vec<_>, Vec<_>) = rules.iter().cloned().partition(|rule| which(rule.number));
        self.rules.store(Arc::new(left));
        self.eased.fetch_add(1, Ordering::Release);
        gone.iter().map(|rule| rule.number).collect()
    }

    /// Has the rules that `which` names let go of what they hold now; says which these are. It goes on when its queue is next
    /// looked at.
    pub fn release(&self, which: impl Fn(u32) -> bool) -> Vec<u32> {
        let rules = self.rules.load();
        let released = rules.iter().filter(|rule| which(rule.number));
        let released = released.inspect(|rule| _ = rule.released.fetch_add(1, Ordering::Relaxed));
        let released = released.map(|rule| rule.number).collect();
        self.eased.fetch_add(1, Ordering::Release);
        released
    }

    /// Whether what a rule has held since it had let go of things `released` times may go on.
    fn lets_go(&self, number: u32, released: u64) -> bool {
        let rules = self.rules.load();
        let rule = rules.iter().find(|rule| rule.number == number);
        rule.is_none_or(|rule| rule.released.load(Ordering::Relaxed) != released)
    }

    /// Whether there are rules.
    pub(crate) fn any(&self) -> bool {
        !self.rules.load().is_empty()
    }

    /// How often a rule was removed or had to let go: what was lost before is to be made up for when this has changed.
    pub(crate) fn eased(&self) -> u64 {
        self.eased.load(Ordering::Acquire)
    }

    /// A breakdown that nobody was told of.
    pub(crate) fn breakdown(&self) -> Option<Breakdown> {
        self.breakdowns.pop()
    }

    /// Whether a kick of a queue is lost.
    pub(crate) fn loses_kick(&self, queue: u16) -> bool {
        let rules = self.rules.load();
        let mut concern =
            rules.iter().filter(|active| active.rule.fault == Fault::LostKick && active.rule.is_of(queue));
        concern.any(|active| active.asked(self.seed).is_some())
    }

    /// What becomes of an interrupt of a queue.
    pub(crate) fn deliver(&self, queue: u16) -> Delivery<Duration> {
        for active in self.rules.load().iter().filter(|active| active.rule.is_of(queue)) {
            let Fault::Interrupt(delivery) = active.rule.fault else { continue };
            let Some(mut random) = active.asked(self.seed) else { continue };
            return match delivery {
                Delivery::Sent => Delivery::Sent,
                Delivery::Lost => Delivery::Lost,
                Delivery::Late(latency) => Delivery::Late(latency.draw(&mut random)),
                Delivery::Twice(latency) => Delivery::Twice(latency.draw(&mut random)),
            };
        }
        Delivery::Sent
    }

    /// What becomes of an operation of a queue, and after how long.
    fn judge(&self, queue: u16, io: &Io) -> (Duration, Fate) {
        let mut latency = Duration::ZERO;
        for active in self.rules.load().iter().filter(|active| active.rule.concerns(queue, io)) {
            let Some(mut random) = active.asked(self.seed) else { continue };
            let fate = match active.rule.fault {
                Fault::Latency(more) => {
                    latency = latency.saturating_add(more.draw(&mut random)).min(MAX_LATENCY);
                    continue;
                }
                Fault::Error(errno) => Fate::Failed(errno),
                Fault::Torn => match rule::touched(io).1 / SECTOR {
                    0 | 1 => Fate::Done,
                    sectors => Fate::Torn((1 + random.below(sectors - 1)) * SECTOR),
                },
                Fault::Lost => Fate::Lost,
                Fault::Breakdown(breakdown) => {
                    self.breakdowns.push(breakdown);
                    Fate::Done
                }
                // They concern no operation.
                Fault::Interrupt(_) | Fault::LostKick => continue,
                Fault::Stuck => Fate::Stuck { rule: active.number, released: active.released.load(Ordering::Relaxed) },
            };
            return (latency, fate);
        }
        (latency, Fate::Done)
    }
}

/// What is to become of one operation, once it has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Failed(i32),
    /// Only so many of its bytes.
    Torn(u64),
    Lost,
    /// Held by this rule, which had let go of things so many times by then.
    Stuck {
        rule: u32,
        released: u64,
    },
}

/// A store before which some things go wrong; see the [module](self).
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    faults: Arc<Faults>,
}

impl FaultyStore {
    /// Puts `faults` before a store.
    pub fn new(inner: Arc<dyn Store>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl Store for FaultyStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    /// Without rules there is nothing before the store. What is attached then does not learn of rules that come later.
    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        let inner = self.inner.attach(ring, queue)?;
        if self.faults.rules.load().is_empty() {
            return Ok(inner);
        }
        Ok(Box::new(FaultyBackend::new(inner, &self.faults, queue, ring)))
    }

    /// Nothing goes wrong here: a flush is lost for guests only.
    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn max_queues(&self) -> u16 {
        self.inner.max_queues()
    }

    fn service(&self) -> Option<Service> {
        self.inner.service()
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        self.inner.resize(capacity)
    }
}
