//! What each queue has done: counted by the worker that serves it, and told to whoever asks.
//!
//! On the way of a request there are plain additions and no locked instruction, since only one thread writes; and the clock is
//! read once for a batch, or for some batches only. [`meter`] is that side, [`export`] the text for Prometheus, [`responder`] who serves it.

mod counter;
mod export;
mod latencies;
mod meter;
mod responder;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use counter::{Counter, Histogram};
pub use latencies::{Latencies, Stages};
pub(crate) use meter::Meter;
pub(crate) use responder::{Place, Responder, bind};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// What the store does not see: the serial, and what makes no sense.
    Other,
}

impl Kind {
    const NAMES: [&'static str; 6] = ["read", "write", "flush", "discard", "write_zeroes", "other"];
}

/// A piece of the way of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// From when its worker hears of the kick until the first requests are taken.
    KickToSubmit,
    /// From when it is taken off the ring until the store has done it and that is found out.
    SubmitToReap,
    /// From then until the interrupt is sent, where one is.
    ReapToInterrupt,
}

impl Stage {
    const NAMES: [&'static str; 3] = ["kick_to_submit", "submit_to_reap", "reap_to_interrupt"];
}

/// The counters of one queue, written by the worker that serves it and by nobody else.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct QueueMetrics {
    /// By [`Kind`].
    operations: [Counter; 6],
    read_bytes: Counter,
    written_bytes: Counter,
    io_errors: Counter,
    unsupported: Counter,
    kicks: Counter,
    interrupts_sent: Counter,
    /// Batches given back that the driver wanted no interrupt for.
    interrupts_suppressed: Counter,
    polls_with_work: Counter,
    polls_in_vain: Counter,
    in_flight: Counter,
    /// By [`Stage`].
    stages: [Histogram; 3],
}

/// The counters of a device, as long as it is served: clients and resets do not end them.
#[derive(Debug)]
pub(crate) struct DeviceMetrics(Vec<Arc<QueueMetrics>>);

impl DeviceMetrics {
    /// All zero.
    pub(crate) fn new(num_queues: u16) -> Self {
        Self((0..num_queues).map(|_| Arc::default()).collect())
    }

    /// Those of a queue; of one that there is not, some that nobody sees.
    pub(crate) fn queue(&self, index: u16) -> Arc<QueueMetrics> {
        self.0.get(usize::from(index)).cloned().unwrap_or_default()
    }

    /// How long the stages of requests have taken, by queue.
    pub(crate) fn stages(&self) -> Vec<Stages> {
        self.0.iter().map(|queue| Stages::of(queue.stages.each_ref().map(Histogram::latencies))).collect()
    }

    /// As they are now.
    pub(crate) fn read(&self) -> Vec<Statistics> {
        self.0.iter().map(|queue| queue.read()).collect()
    }
}

/// The counters of a queue at some moment. The names are those of docs/control.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "docs/control.md has the fields")]
pub struct Statistics {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub write_zeroes: u64,
    pub other: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub io_errors: u64,
    pub unsupported: u64,
    pub kicks: u64,
    pub interrupts_sent: u64,
    pub interrupts_suppressed: u64,
    pub polls_with_work: u64,
    pub polls_in_vain: u64,
    /// No counter: what is in flight now.
    pub in_flight: u64,
    /// Nanoseconds that all requests together were with the store; where not all are timed, as those that are let expect.
    pub submit_to_reap_ns: u64,
}

impl Statistics {
    /// Requests of all kinds.
    pub fn operations(&self) -> u64 {
        [self.reads, self.writes, self.flushes, self.discards, self.write_zeroes, self.other]
            .iter()
            .fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// What has come since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self { in_flight: self.in_flight, ..self.each(before, u64::wrapping_sub) }
    }

    fn and(&self, more: &Self) -> Self {
        self.each(more, u64::wrapping_add)
    }

    fn each(&self, other: &Self, of: fn(u64, u64) -> u64) -> Self {
        macro_rules! each {
            ($($field:ident)*) => { Self { $($field: of(self.$field, other.$field),)* } };
        }
        each!(reads writes flushes discards write_zeroes other read_bytes written_bytes io_errors unsupported kicks
            interrupts_sent interrupts_suppressed polls_with_work polls_in_vain in_flight submit_to_reap_ns)
    }
}

/// All of several queues.
impl<'a> std::iter::Sum<&'a Statistics> for Statistics {
    fn sum<I: Iterator<Item = &'a Statistics>>(queues: I) -> Self {
        queues.fold(Self::default(), |sum, more| sum.and(more))
    }
}

impl QueueMetrics {
    fn read(&self) -> Statistics {
        let [reads, writes, flushes, discards, write_zeroes, other] = self.operations.each_ref().map(Counter::get);
        let [_, submit_to_reap, _] = &self.stages;
        Statistics {
            reads,
            writes,
            flushes,
            discards,
            write_zeroes,
            other,
            read_bytes: self.read_bytes.get(),
            written_bytes: self.written_bytes.get(),
            io_errors: self.io_errors.get(),
            unsupported: self.unsupported.get(),
            kicks: self.kicks.get(),
            interrupts_sent: self.interrupts_sent.get(),
            interrupts_suppressed: self.interrupts_suppressed.get(),
            polls_with_work: self.polls_with_work.get(),
            polls_in_vain: self.polls_in_vain.get(),
            in_flight: self.in_flight.get(),
            submit_to_reap_ns: submit_to_reap.sum(),
        }
    }
}
