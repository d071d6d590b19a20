//! What each queue has done: counted by the worker that serves it, and told to whoever asks.
//!
//! On the way of a request there are plain additions and no locked instruction, since only one thread writes; and the clock is
//! read once for a batch, or for some batches only. [`meter`] is that side, [`export`] the text for Prometheus, [`responder`] who serves it.

mod counter;
mod export;
mod meter;
mod responder;

use std::sync::Arc;

use serde::Serialize;

use counter::{Counter, Histogram};
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

    /// As they are now.
    pub(crate) fn read(&self) -> Vec<Statistics> {
        self.0.iter().map(|queue| queue.read()).collect()
    }
}

/// The counters of a queue at some moment. The names are those of docs/control.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Statistics {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    pub(crate) write_zeroes: u64,
    pub(crate) other: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) io_errors: u64,
    pub(crate) unsupported: u64,
    pub(crate) kicks: u64,
    pub(crate) interrupts_sent: u64,
    pub(crate) interrupts_suppressed: u64,
    pub(crate) polls_with_work: u64,
    pub(crate) polls_in_vain: u64,
    /// No counter: what is in flight now.
    pub(crate) in_flight: u64,
    /// Nanoseconds that all requests together were with the store; where not all are timed, as those that are let expect.
    pub(crate) submit_to_reap_ns: u64,
}

impl Statistics {
    /// What has come since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        macro_rules! difference {
            ($($field:ident)*) => { Self { $($field: self.$field.wrapping_sub(before.$field),)* in_flight: self.in_flight } };
        }
        difference!(reads writes flushes discards write_zeroes other read_bytes written_bytes io_errors unsupported kicks
            interrupts_sent interrupts_suppressed polls_with_work polls_in_vain submit_to_reap_ns)
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
