//! A store that fails on purpose.
//!
//! A [`FaultyStore`] stands before another and has some operations come late, fail, or get lost, as its [`Rule`]s say.
//! What a rule does to the *n*th operation that it concerns follows from the seed, the rule and *n* alone: the same
//! operations meet the same faults each time, whatever queues they come by.
//!
//! Rules are asked in their order. Latencies add up; the first other fault that strikes is the last.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use queue::FaultyBackend;

use super::random::Random;
use super::uring::Uring;
use super::{Backend, Io, Op, SECTOR, Service, Store, StoreInfo};

/// The longest that an operation is kept waiting.
pub const MAX_LATENCY: Duration = Duration::from_secs(60);

/// Which operations a rule concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Writes of zeroes.
    WriteZeroes,
}

/// How often a rule strikes, of the operations that it concerns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Each time.
    Always,
    /// Each time with this probability, from 0 to 1.
    Probability(f64),
    /// The first of each so many, from 1 on.
    Every(u64),
}

/// How long an operation is kept waiting, in all cases up to [`MAX_LATENCY`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Latency {
    /// So long.
    Fixed(Duration),
    /// Anything from the first to the second.
    Uniform(Duration, Duration),
    /// Half of the times longer than the median; sigma, the deviation of the logarithm, says how long the tail is.
    LogNormal {
        /// Half are longer.
        median: Duration,
        /// 0 and more; 1 puts one in a hundred at more than ten times the median.
        sigma: f64,
    },
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// It waits before anything else happens to it.
    Latency(Latency),
    /// It fails with this error number, and nothing is done.
    Error(i32),
    /// The first of its sectors are changed and the rest are not, and it is said to have been done; those of one sector are done.
    Torn,
    /// It is said to have been done.
    Lost,
}

/// One fault, and what it strikes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Which operations it concerns: all if there is none.
    pub kinds: Vec<Kind>,
    /// Sectors, one of which the operation has to touch; flushes touch all. `None` for any.
    pub sectors: Option<RangeInclusive<u64>>,
    /// How often it strikes.
    pub when: When,
    /// What it does.
    pub fault: Fault,
}

/// A store before which some things go wrong; see the [module](self).
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    rules: Arc<Rules>,
}

impl FaultyStore {
    /// Puts `rules` before a store.
    pub fn new(inner: Arc<dyn Store>, rules: Vec<Rule>, seed: u64) -> Self {
        let rules = rules.into_iter().map(|rule| (rule, AtomicU64::new(0))).collect();
        Self { inner, rules: Arc::new(Rules { rules, seed }) }
    }
}

impl Store for FaultyStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn attach(&self, ring: &Rc<Uring>) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(FaultyBackend::new(self.inner.attach(ring)?, &self.rules, ring)?))
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

/// What is to become of one operation, once it has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Failed(i32),
    /// Only so many of its bytes.
    Torn(u64),
    Lost,
}

struct Rules {
    /// With the number of operations that each has concerned.
    rules: Vec<(Rule, AtomicU64)>,
    seed: u64,
}

/// The bytes that an operation touches; all for a flush.
fn touched(io: &Io) -> (u64, u64) {
    match io.op {
        Op::Read { offset } | Op::Write { offset, .. } => (offset, io.buffers.len()),
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
        Op::Flush => (0, u64::MAX),
    }
}

impl Rules {
    /// Whether operations may have to wait.
    fn have_latency(&self) -> bool {
        self.rules.iter().any(|(rule, _)| matches!(rule.fault, Fault::Latency(_)))
    }

    /// What becomes of an operation, and after how long.
    fn judge(&self, io: &Io) -> (Duration, Fate) {
        let mut latency = Duration::ZERO;
        for (number, (rule, concerned)) in (0..).zip(&self.rules) {
            if !rule.concerns(io) {
                continue;
            }
            let nth = concerned.fetch_add(1, Ordering::Relaxed);
            let mut random = Random::new(self.seed, number, nth);
            if !rule.when.strikes(nth, &mut random) {
                continue;
            }
            let fate = match rule.fault {
                Fault::Latency(more) => {
                    latency = latency.saturating_add(more.draw(&mut random)).min(MAX_LATENCY);
                    continue;
                }
                Fault::Error(errno) => Fate::Failed(errno),
                Fault::Torn => match touched(io).1 / SECTOR {
                    0 | 1 => Fate::Done,
                    sectors => Fate::Torn((1 + random.below(sectors - 1)) * SECTOR),
                },
                Fault::Lost => Fate::Lost,
            };
            return (latency, fate);
        }
        (latency, Fate::Done)
    }
}

impl Rule {
    fn concerns(&self, io: &Io) -> bool {
        let kind = match io.op {
            Op::Read { .. } => Kind::Read,
            Op::Write { .. } => Kind::Write,
            Op::Flush => Kind::Flush,
            Op::Discard { .. } => Kind::Discard,
            Op::WriteZeroes { .. } => Kind::WriteZeroes,
        };
        let (offset, len) = touched(io);
        let touches = |sectors: &RangeInclusive<u64>| {
            offset / SECTOR <= *sectors.end() && sectors.start().saturating_mul(SECTOR) < offset.saturating_add(len)
        };
        (self.kinds.is_empty() || self.kinds.contains(&kind)) && self.sectors.as_ref().is_none_or(touches)
    }
}

impl When {
    fn strikes(self, nth: u64, random: &mut Random) -> bool {
        match self {
            Self::Always => true,
            Self::Probability(probability) => random.unit() < probability,
            Self::Every(count) => nth.is_multiple_of(count.max(1)),
        }
    }
}

impl Latency {
    fn draw(self, random: &mut Random) -> Duration {
        let drawn = match self {
            Self::Fixed(latency) => latency,
            Self::Uniform(least, most) => least.saturating_add(most.saturating_sub(least).mul_f64(random.unit())),
            Self::LogNormal { median, sigma } => {
                // Too many seconds for a duration are more than the longest.
                let seconds = median.as_secs_f64() * (sigma * random.normal()).exp();
                Duration::try_from_secs_f64(seconds).unwrap_or(MAX_LATENCY)
            }
        };
        drawn.min(MAX_LATENCY)
    }
}
