//! What waits for time to pass: in the kernel, which wakes the worker for it as for anything else that completes.

use std::io;
use std::time::{Duration, Instant};

use io_uring::types::Timespec;
use io_uring::{opcode, squeue};

use super::uring::{Client, FixedBuffers, Lane, Operation, Step, Uring};

/// Something that sleeps for a while. A `Client` of these gives it back when the while is over; nothing ends it before.
pub(super) struct Asleep<T> {
    what: T,
    until: Box<Timespec>,
}

impl<T> Asleep<T> {
    /// `what` is to sleep for so long, from when the ring is told of it.
    pub(super) fn new(what: T, so_long: Duration) -> Self {
        let until = Timespec::new().sec(so_long.as_secs()).nsec(so_long.subsec_nanos());
        Self { what, until: Box::new(until) }
    }

    /// What has slept.
    pub(super) fn wake(self) -> T {
        self.what
    }
}

// SAFETY: the entry leads to `until`, which lies on the heap and is changed by nobody.
unsafe impl<T: 'static> Operation for Asleep<T> {
    type Context = ();

    fn lane(&self, (): &()) -> Lane {
        Lane::Interrupt
    }

    fn entry(&mut self, (): &(), _: &mut FixedBuffers<'_>) -> squeue::Entry {
        opcode::Timeout::new(&raw const *self.until).build()
    }

    /// Whatever the kernel says: if it has no timers, what waits is early.
    fn landed(&mut self, (): &(), _: i32) -> Step {
        Step::Over
    }
}

/// The longest sleep of an alarm, which is set anew then: a timer is not taken back, and whoever takes down the ring waits for it.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// A moment, in nanoseconds of a [`Clock`].
pub(super) type Moment = u64;

/// What several queues tell the time by.
#[derive(Debug)]
pub(super) struct Clock(Instant);

impl Clock {
    /// One that begins now.
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }

    pub(super) fn now(&self) -> Moment {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// How long it is until then.
pub(super) fn until(when: Moment, now: Moment) -> Duration {
    Duration::from_nanos(when.saturating_sub(now))
}

/// The nanoseconds that so many units take at so many a second, rounded up: a rate is never exceeded.
pub(super) fn time_of(units: u64, per_second: u64) -> u64 {
    let exact = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(per_second.max(1)));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// Has the worker look again at some moment, or before.
pub(super) struct Alarm {
    timers: Client<Asleep<()>>,
    /// When the first of them ends.
    at: Moment,
}

impl Alarm {
    /// One that is not set.
    ///
    /// # Errors
    /// If there is no ring.
    pub(super) fn new(ring: &Uring) -> io::Result<Self> {
        Ok(Self { timers: Client::new(ring, ())?, at: Moment::MAX })
    }

    /// Has the worker woken, unless it already is to be by then. Says whether the ring has to be told of that.
    pub(super) fn set(&mut self, when: Moment, now: Moment) -> bool {
        if self.is_set() && self.at <= when {
            return false;
        }
        let so_long = until(when, now).min(LONGEST_SLEEP);
        // A ring without room for it has others in flight, whose completions have the worker look again.
        let set = self.timers.start(Asleep::new((), so_long)).is_ok();
        if set {
            self.at = when;
        }
        set
    }

    /// Whether a timer runs.
    pub(super) fn is_set(&self) -> bool {
        self.timers.in_flight() > 0
    }

    /// Takes note of timers that have ended.
    pub(super) fn look(&mut self) {
        if self.is_set() {
            let at = &mut self.at;
            self.timers.reap(|_| *at = Moment::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_rounded_up_and_never_overflows() {
        assert_eq!([time_of(1, 3), time_of(4096, 1 << 30), time_of(0, 5)], [333_333_334, 3815, 0]);
        assert_eq!([time_of(u64::MAX, 1), time_of(1, 0)], [u64::MAX, 1_000_000_000]);
    }
}
