//! The side of the worker: what a queue's task tells of.

use std::io;
use std::sync::Arc;

use quanta::Clock;
use virtio::queue::Signal;

use super::{Kind, QueueMetrics, Stage};

/// Counts for one queue, on the thread of its worker.
pub(crate) struct Meter {
    metrics: Arc<QueueMetrics>,
    clock: Clock,
    /// When the last requests were taken, and the last completions found: by the clock's own counting.
    taken: u64,
    reaped: u64,
    kicked: Option<u64>,
    /// When the operation with each token was taken.
    submitted: Box<[u64]>,
    /// Completions in a row that were taken at the same time, which are recorded together.
    alike: u64,
    alike_since: u64,
}

impl Meter {
    /// For tokens below `tokens`.
    pub(crate) fn new(metrics: Arc<QueueMetrics>, tokens: u16) -> Self {
        Self {
            metrics,
            clock: Clock::new(),
            taken: 0,
            reaped: 0,
            kicked: None,
            submitted: vec![0; tokens.into()].into(),
            alike: 0,
            alike_since: 0,
        }
    }

    /// The driver has kicked.
    pub(crate) fn kicked(&mut self) {
        self.metrics.kicks.add(1);
        self.kicked = Some(self.clock.raw());
    }

    /// A batch of requests is there: the clock is read for all of them.
    #[inline(always)]
    pub(crate) fn taken(&mut self) {
        self.taken = self.clock.raw();
        if let Some(kicked) = self.kicked.take() {
            self.record(Stage::KickToSubmit, kicked, self.taken, 1);
        }
    }

    /// One of them is to be given to the store, or was answered without it.
    #[inline(always)]
    pub(crate) fn submitted(&mut self, token: u16, kind: Kind, bytes: u64) {
        match kind {
            Kind::Read => self.metrics.read_bytes.add(bytes),
            Kind::Write => self.metrics.written_bytes.add(bytes),
            _ => {}
        }
        if let Some(count) = self.metrics.operations.get(kind as usize) {
            count.add(1);
        }
        if let Some(since) = self.submitted.get_mut(usize::from(token)) {
            *since = self.taken;
        }
    }

    /// Completions are there: the clock is read for all of them.
    #[inline(always)]
    pub(crate) fn reaped(&mut self) {
        self.reaped = self.clock.raw();
    }

    /// One of them.
    #[inline(always)]
    pub(crate) fn completed(&mut self, token: u16) {
        let since = self.submitted.get(usize::from(token)).copied().unwrap_or(self.reaped);
        if since != self.alike_since {
            self.record_alike();
            self.alike_since = since;
        }
        self.alike = self.alike.wrapping_add(1);
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
        let reaped = self.alike > 0;
        self.record_alike();
        match signal {
            Signal::Needed => {
                self.metrics.interrupts_sent.add(1);
                if reaped {
                    self.record(Stage::ReapToInterrupt, self.reaped, self.clock.raw(), 1);
                }
            }
            Signal::Suppressed => self.metrics.interrupts_suppressed.add(1),
            Signal::Idle => {}
        }
    }

    /// A round of the worker's is over.
    #[inline(always)]
    pub(crate) fn polled(&mut self, work: bool, in_flight: usize) {
        if work {
            self.metrics.polls_with_work.add(1);
            self.metrics.in_flight.set(in_flight as u64);
        } else {
            self.metrics.polls_in_vain.add(1);
        }
    }

    #[inline(always)]
    fn record_alike(&mut self) {
        let times = std::mem::take(&mut self.alike);
        if times > 0 {
            self.record(Stage::SubmitToReap, self.alike_since, self.reaped, times);
        }
    }

    #[inline(always)]
    fn record(&self, stage: Stage, from: u64, to: u64, times: u64) {
        if let Some(histogram) = self.metrics.stages.get(stage as usize) {
            histogram.record(self.clock.delta_as_nanos(from, to), times);
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
        let mut meter = Meter::new(Arc::clone(&metrics), 4);
        meter.kicked();
        meter.taken();
        for (token, kind, bytes) in
            [(0, Kind::Read, 4096), (1, Kind::Write, 512), (2, Kind::Flush, 0), (9, Kind::Read, 1)]
        {
            meter.submitted(token, kind, bytes);
        }
        meter.polled(true, 4);
        assert_eq!(metrics.read().in_flight, 4);
        meter.polled(false, 0);
        meter.reaped();
        for token in [0, 1, 2, 9] {
            meter.completed(token);
        }
        meter.failed(&io::ErrorKind::Unsupported.into());
        meter.failed(&io::Error::other("broken"));
        meter.published(Signal::Needed);
        meter.reaped();
        meter.published(Signal::Suppressed);
        meter.published(Signal::Idle);
        meter.polled(true, 0);
        let now = metrics.read();
        assert_eq!((now.reads, now.writes, now.flushes, now.discards), (2, 1, 1, 0));
        assert_eq!((now.read_bytes, now.written_bytes), (4097, 512));
        assert_eq!((now.io_errors, now.unsupported, now.kicks), (1, 1, 1));
        assert_eq!((now.interrupts_sent, now.interrupts_suppressed), (1, 1));
        assert_eq!((now.polls_with_work, now.polls_in_vain, now.in_flight), (2, 1, 0));
        let counts = |stage: Stage| metrics.stages[stage as usize].read().map(|(_, count)| count).sum::<u64>();
        let all = [Stage::KickToSubmit, Stage::SubmitToReap, Stage::ReapToInterrupt].map(counts);
        assert_eq!(all, [1, 4, 1]);
        assert_eq!(now.since(&now).reads, 0);
    }
}
