//! What goes wrong, with what, and how often.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::MAX_LATENCY;
use crate::backend::random::Random;
use crate::backend::{Io, Op, SECTOR};

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

/// How often a rule strikes, of what it concerns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Each time.
    Always,
    /// Each time with this probability, from 0 to 1.
    Probability(f64),
    /// The first of each so many, from 1 on.
    Every(u64),
}

/// How long something is kept waiting, in all cases up to [`MAX_LATENCY`].
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

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// An operation waits before anything else happens to it.
    Latency(Latency),
    /// It fails with this error number, and nothing is done.
    Error(i32),
    /// The first of its sectors are changed and the rest are not, and it is said to have been done; those of one sector are done.
    Torn,
    /// It is said to have been done.
    Lost,
    /// It is done, and the device breaks down.
    Breakdown(Breakdown),
    /// It is not answered before the rule is removed, or lets go of what it holds; it is done then. One whose queue is to stop
    /// fails with EIO.
    Stuck,
    /// An interrupt goes wrong.
    Interrupt(Delivery<Latency>),
    /// A driver's kick is not heard.
    LostKick,
}

/// What becomes of an interrupt that the device sends for a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery<L> {
    /// It is sent.
    Sent,
    /// It is not.
    Lost,
    /// It is sent so much later.
    Late(L),
    /// It is sent, and once more so much later.
    Twice(L),
}

/// What a device does as a whole that its driver has to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breakdown {
    /// It sets DEVICE_NEEDS_RESET and takes no requests until it is reset (virtio 1.3 §2.1.1).
    NeedsReset,
    /// The session with the client ends.
    CloseSession,
}

/// One fault, and what it strikes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// The number of the request queue that it concerns. `None` for all.
    pub queue: Option<u16>,
    /// Which operations it concerns: all if there is none.
    pub kinds: Vec<Kind>,
    /// Sectors, one of which the operation has to touch; flushes touch all. `None` for any.
    pub sectors: Option<RangeInclusive<u64>>,
    /// How often it strikes.
    pub when: When,
    /// How many it strikes in a row, from 1 on: the first so many of each [`Every`](When::Every), which is not less; all or
    /// none of so many, by [`Probability`](When::Probability).
    pub burst: u64,
    /// What it does.
    pub fault: Fault,
}

/// The bytes that an operation touches; all for a flush.
pub(super) fn touched(io: &Io) -> (u64, u64) {
    match io.op {
        Op::Read { offset } | Op::Write { offset, .. } => (offset, io.buffers.len()),
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
        Op::Flush => (0, u64::MAX),
    }
}

/// What a rule decides by lot, each from a sequence of its own.
#[derive(Clone, Copy)]
enum Lot {
    Strike,
    Strength,
}

impl Rule {
    /// One that strikes all operations.
    pub fn always(fault: Fault) -> Self {
        Self { queue: None, kinds: Vec::new(), sectors: None, when: When::Always, burst: 1, fault }
    }

    /// Whether it concerns an operation of a queue.
    pub(super) fn concerns(&self, queue: u16, io: &Io) -> bool {
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
        !matches!(self.fault, Fault::Interrupt(_) | Fault::LostKick)
            && self.is_of(queue)
            && (self.kinds.is_empty() || self.kinds.contains(&kind))
            && self.sectors.as_ref().is_none_or(touches)
    }

    /// Whether it concerns a queue.
    pub(super) fn is_of(&self, queue: u16) -> bool {
        self.queue.is_none_or(|own| own == queue)
    }

    /// Whether it strikes the `nth` that it concerns, as the rule with this number, and if so, by which lot it decides how hard.
    pub(super) fn strikes(&self, seed: u64, number: u32, nth: u64) -> Option<Random> {
        let burst = self.burst.max(1);
        let lot = |lot: Lot, nth| Random::new(seed, u64::from(number) << 1 | lot as u64, nth);
        let strikes = match self.when {
            When::Always => true,
            When::Probability(probability) => lot(Lot::Strike, nth / burst).unit() < probability,
            When::Every(count) => nth % count.max(1) < burst,
        };
        strikes.then(|| lot(Lot::Strength, nth))
    }
}

impl Latency {
    pub(super) fn draw(self, random: &mut Random) -> Duration {
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
