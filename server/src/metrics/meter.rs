//! The side of the worker: what a queue's task tells of.

use std::io;
use std::sync::Arc;

use quanta::Clock;
use virtio::queue::Signal;

use super::{Kind, QueueMetrics, Stage};

/// So many batches after a kick are timed each: all those of a queue that is not busy.
const TIMED: u32 = 64;
/// From then on it is one in so many, which counts for as many: to read the clock takes longer than to count.
const ONE_IN: u32 = 32;

/// Counts for one queue, on the thread of its worker.
pub(crate) struct Meter {
    metrics: Arc<QueueMetrics>,
    clock: Clock,
    /// Batches that are timed each, and batches until one is timed again.
    each: u32,
    until: u32,
    /// For how many batches one that is timed counts.
    weight: u32,
    /// When the requests at hand were taken, and the last completions found: by the clock's own counting, or 0 if it was not read.
    taken: u64,
    reaped: u64,
    kicked: Option<u64>,
    /// Requests that were answered without the store, since a batch was timed.
    answered: usize,
    /// Completions in a row that were taken at the same time, which are recorded together.
    alike: u64,
    alike_since: u64,
}

impl Meter {
    pub(crate) fn new(metrics: Arc<QueueMetrics>) -> Self {
        Self {
            metrics,
            clock: Clock::new(),
            each: TIMED,
            until: 1,
            weight: 1,
            taken: 0,
            reaped: 0,
            kicked: None,
            answered: 0,
            alike: 0,
            alike_since: 0,
        }
    }

    /// The driver has kicked.
    pub(crate) fn kicked(&mut self) {
        self.metrics.kicks.add(1);
        (self.each, self.until) = (TIMED, 1);
        self.kicked = Some(self.clock.raw());
    }

    /// A batch of requests is there: the clock is read once for all of them, or not at all.
    #[inline(always)]
    pub(crate) fn taken(&mut self) {
        self.until = self.until.wrapping_sub(1);
        if self.until == 0 {
            self.time_batch();
        }
    }

    #[inline(never)]
    fn time_batch(&mut self) {
        self.answered = 0;
        // As many as come until the next.
        self.weight = if self.each > 0 { 1 } else { ONE_IN };
        self.each = self.each.saturating_sub(1);
        self.until = if self.each > 0 { 1 } else { ONE_IN };
        self.taken = self.clock.raw();
        if let Some(kicked) = self.kicked.take() {
            self.record(Stage::KickToSubmit, kicked, self.taken, 1);
        }
    }

    /// One of them is to be given to the store. Returns what [`completed`](Self::completed) is to be told.
    #[inline(always)]
    pub(crate) fn submitted(&mut self, kind: Kind, bytes: u64) -> u64 {
        match kind {
            Kind::Read => self.metrics.read_bytes.add(bytes),
            Kind::Write => self.metrics.written_bytes.add(bytes),
            _ => {}
        }
        if let Some(count) = self.metrics.operations.get(kind as usize) {
            count.add(1);
        }
        self.taken
    }

    /// One of them is answered without the store.
    #[cold]
    pub(crate) fn answered(&mut self) {
        self.submitted(Kind::Other, 0);
        self.answered = self.answered.wrapping_add(1);
    }

    /// That was the batch. So many of it as `performed` says were done at once, by the store or without it.
    #[inline(always)]
    pub(crate) fn started(&mut self, performed: impl FnOnce() -> usize) {
        if self.taken != 0 {
            self.time_performed(performed());
        }
    }

    #[inline(never)]
    fn time_performed(&mut self, performed: usize) {
        let performed = performed.saturating_sub(self.answered);
        if performed > 0 {
            self.reaped = self.clock.raw();
            self.record(Stage::SubmitToReap, self.taken, self.reaped, performed as u64);
        }
        self.taken = 0;
    }

    /// Completions are there: the clock is read once for all of them, for the first that is timed.
    #[inline(always)]
    pub(crate) fn reaped(&mut self) {
        self.reaped = 0;
        self.alike_since = 0;
    }

    /// One of them, which was `submitted` then.
    #[inline(always)]
    pub(crate) fn completed(&mut self, since: u64) {
        if since != self.alike_since {
            self.begin_alike(since);
        }
        self.alike = self.alike.wrapping_add(1);
    }

    #[inline(never)]
    fn begin_alike(&mut self, since: u64) {
        self.record_alike();
        self.alike_since = since;
        if self.reaped == 0 {
            self.reaped = self.clock.raw();
        }
    }

    /// That was all of them.
    #[inline(always)]
    pub(crate) fn completed_all(&mut self) {
        self.record_alike();
    }

    /// One of them failed.
    #[cold]
    pub(crate) fn failed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::Unsupported => self.metrics.unsupported.add(1),
            _ => self.metrics.io_errors.add(1),
        }
    }

    /// What was completed was given back to the driver, who was interrupted or not.
    #[inline(always)]
    pub(crate) fn published(&mut self, signal: Signal) {
        match signal {
            Signal::Needed => {
                self.metrics.interrupts_sent.add(1);
                if self.reaped != 0 {
                    self.record(Stage::ReapToInterrupt, self.reaped, self.clock.raw(), 1);
                }
            }
            Signal::Suppressed => self.metrics.interrupts_suppressed.add(1),
            Signal::Idle => {}
        }
        self.reaped = 0;
    }

    /// So many requests are in flight now.
    #[inline(always)]
    pub(crate) fn in_flight(&mut self, requests: usize) {
        self.metrics.in_flight.set(requests as u64);
    }

    /// A round of the worker's is over.
    #[inline(always)]
    pub(crate) fn polled(&mut self, work: bool) {
        if work {
            self.metrics.polls_with_work.add(1);
        } else {
            self.metrics.polls_in_vain.add(1);
        }
    }

    #[inline(always)]
    fn record_alike(&mut self) {
        let times = std::mem::take(&mut self.alike);
        if times > 0 && self.alike_since != 0 {
            self.record(Stage::SubmitToReap, self.alike_since, self.reaped, times);
        }
    }

    #[inline(always)]
    fn record(&self, stage: Stage, from: u64, to: u64, times: u64) {
        if let Some(histogram) = self.metrics.stages.get(stage as usize) {
            histogram.record(self.clock.delta_as_nanos(from, to), times.wrapping_mul(self.weight.into()));
        }
    }
}

/// Nothing is in flight any more.
impl Drop for Meter {
    fn drop(&mut self) {
        self.metrics.in_flight.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_counted() {
        let metrics = Arc::new(QueueMetrics::default());
        let mut meter = Meter::new(Arc::clone(&metrics));
        meter.kicked();
        meter.taken();
        let requests = [(Kind::Read, 4096), (Kind::Write, 512), (Kind::Flush, 0), (Kind::Read, 1)];
        let since = requests.map(|(kind, bytes)| meter.submitted(kind, bytes));
        meter.started(|| 0);
        meter.in_flight(4);
        meter.polled(true);
        assert_eq!(metrics.read().in_flight, 4);
        meter.polled(false);
        meter.reaped();
        since.into_iter().for_each(|since| meter.completed(since));
        meter.completed_all();
        meter.failed(&io::ErrorKind::Unsupported.into());
        meter.failed(&io::Error::other("broken"));
        meter.published(Signal::Needed);
        meter.reaped();
        meter.published(Signal::Suppressed);
        meter.published(Signal::Idle);
        meter.in_flight(0);
        meter.polled(true);
        let now = metrics.read();
        assert_eq!((now.reads, now.writes, now.flushes, now.discards), (2, 1, 1, 0));
        assert_eq!((now.read_bytes, now.written_bytes), (4097, 512));
        assert_eq!((now.io_errors, now.unsupported, now.kicks), (1, 1, 1));
        assert_eq!((now.interrupts_sent, now.interrupts_suppressed), (1, 1));
        assert_eq!((now.polls_with_work, now.polls_in_vain, now.in_flight), (2, 1, 0));
        let counts = |stage: Stage| metrics.stages[stage as usize].read().map(|(_, count)| count).sum::<u64>();
        let all = || [Stage::KickToSubmit, Stage::SubmitToReap, Stage::ReapToInterrupt].map(counts);
        assert_eq!(all(), [1, 4, 1]);
        // Done at once.
        meter.taken();
        for _ in 0..3 {
            meter.submitted(Kind::Read, 1);
        }
        meter.answered();
        meter.started(|| 4);
        meter.published(Signal::Needed);
        assert_eq!(all(), [1, 7, 2]);
        // And not counted again.
        meter.started(|| 3);
        meter.published(Signal::Needed);
        assert_eq!(all(), [1, 7, 2]);
        assert_eq!(now.since(&now).reads, 0);
    }

    /// So that as much is counted of a busy queue as if each of its batches were timed.
    #[test]
    fn a_batch_that_is_timed_counts_for_those_that_are_not() {
        let metrics = Arc::new(QueueMetrics::default());
        let mut meter = Meter::new(Arc::clone(&metrics));
        let counts = |stage: Stage| metrics.stages[stage as usize].read().map(|(_, count)| count).sum::<u64>();
        let mut timed = 0;
        let batches = TIMED + 10 * ONE_IN;
        for _ in 0..batches {
            meter.taken();
            let since = [Kind::Read, Kind::Write].map(|kind| meter.submitted(kind, 512));
            meter.started(|| 0);
            timed += u32::from(since[0] != 0);
            meter.reaped();
            since.into_iter().for_each(|since| meter.completed(since));
            meter.completed_all();
            meter.published(Signal::Needed);
        }
        assert_eq!(timed, TIMED + 10);
        assert_eq!(counts(Stage::SubmitToReap), 2 * u64::from(batches));
        assert_eq!(counts(Stage::ReapToInterrupt), u64::from(batches));
        assert_eq!(metrics.read().reads, u64::from(batches), "counters count each");
        meter.kicked();
        meter.taken();
        assert_eq!(counts(Stage::KickToSubmit), 1);
        assert_ne!(meter.submitted(Kind::Read, 0), 0, "timed again after a kick");
    }
}
