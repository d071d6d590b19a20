//! How much may pass in a second: arithmetic, without a clock of its own.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Rate;
use crate::backend::timer::{Moment, time_of};

/// The least that may pass at once, in nanoseconds of the rate: a worker that is woken late by less loses nothing.
const LEAST_BURST: u64 = 2_000_000;

/// A token bucket, kept as the moment at which all that was taken from it will have been paid for by its rate (the generic
/// cell rate algorithm, ITU-T I.371). Whoever takes gets a place in line at once, so that those who wait are served in the
/// order in which they asked, and nobody has to be told when it is their turn.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: u64,
    /// How far ahead of its payment something may pass: the burst, in nanoseconds of the rate.
    ahead: u64,
    paid_at: AtomicU64,
}

impl Bucket {
    /// A full one. `whole` are the units of a burst that the first taker has for itself: 1 where units are taken one by one,
    /// none where a taker may take any number of them.
    pub(super) fn new(rate: Rate, whole: u64) -> Self {
        let ahead = time_of(rate.burst.saturating_sub(whole), rate.per_second.get());
        Self { per_second: rate.per_second.get(), ahead: ahead.max(LEAST_BURST), paid_at: AtomicU64::new(0) }
    }

    /// Has nothing left at `now`, and owes nothing.
    pub(super) fn empty(&self, now: Moment) {
        self.paid_at.store(now.saturating_add(self.ahead), Ordering::Relaxed);
    }

    /// Takes units, and says when they may pass. They have been taken even if they pass before that.
    pub(super) fn take(&self, units: u64, now: Moment) -> Moment {
        let cost = time_of(units, self.per_second);
        let pay = |paid_at: Moment| Some(paid_at.max(now).saturating_add(cost));
        // Nothing else is told by it: its own order is enough. Cannot fail, as there always is a next.
        let paid_at = self.paid_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay).unwrap_or_else(|same| same);
        paid_at.saturating_sub(self.ahead).max(now)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    const MS: u64 = 1_000_000;

    fn bucket(per_second: u64, burst: u64, whole: u64) -> Bucket {
        Bucket::new(Rate { per_second: NonZeroU64::new(per_second).unwrap(), burst }, whole)
    }

    #[test]
    fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
        let bucket = bucket(100, 20, 1);
        let passed: Vec<_> = (0..50).map(|_| bucket.take(1, 5 * MS)).collect();
        assert!(passed[..20].iter().all(|at| *at == 5 * MS), "{passed:?}");
        for (nth, at) in (1..).zip(&passed[20..]) {
            assert_eq!(*at, 5 * MS + nth * 10 * MS);
        }
    }

    #[test]
    fn what_is_not_used_is_saved_up_to_the_burst() {
        let bucket = bucket(100, 20, 1);
        (0..20).for_each(|_| assert_eq!(bucket.take(1, 0), 0));
        // Half of it comes back in 100 ms.
        assert_eq!((0..11).map(|_| bucket.take(1, 100 * MS)).filter(|at| *at == 100 * MS).count(), 10);
        // However long nobody comes.
        let later = 3600 * 1000 * MS;
        assert_eq!((0..50).map(|_| bucket.take(1, later)).filter(|at| *at == later).count(), 20);
    }

    #[test]
    fn over_a_long_time_the_rate_is_exact_however_late_takers_come() {
        for late in [0, 300_000, LEAST_BURST] {
            let bucket = bucket(30_000, 1, 1);
            let (mut now, mut passed) = (0, 0u64);
            while now < 10_000 * MS {
                // One at a time, each of which asks when the one before it has passed.
                now = bucket.take(1, now).max(now);
                passed += 1;
                now += if passed % 10 == 0 { late } else { 0 };
            }
            // Nobody passes while none comes.
            let slowest = (10 * 10_000 * MS).checked_div(late).map_or(300_000, |most| most.min(300_000));
            assert!(passed <= 300_000 + 62, "{late}: {passed}");
            assert!(passed >= slowest * 99 / 100, "{late}: {passed} of {slowest}");
        }
    }

    #[test]
    fn something_larger_than_the_burst_passes_and_those_after_it_wait_longer() {
        let bucket = bucket(1000, 100, 0);
        assert_eq!(bucket.take(5000, 0), 0);
        assert_eq!(bucket.take(1, 0), 4900 * MS);
        assert_eq!(bucket.take(1, 1000 * MS), 4901 * MS);
    }

    #[test]
    fn what_passes_unasked_is_paid_for_later() {
        let bucket = bucket(100, 1, 1);
        let mut early = 0;
        (0..10).for_each(|_| early = bucket.take(1, 0));
        // All of them passed at once, as when a device is stopped.
        assert!(early > 0 && bucket.take(1, 0) == 100 * MS - LEAST_BURST);
    }

    #[test]
    fn an_empty_one_has_nothing_to_give_and_owes_nothing() {
        let bucket = bucket(100, 20, 1);
        assert!((0..1000).map(|_| bucket.take(1, 0)).last() > Some(1000 * MS));
        bucket.empty(7 * MS);
        assert_eq!([bucket.take(1, 7 * MS), bucket.take(1, 7 * MS)], [7 * MS, 17 * MS]);
    }

    #[test]
    fn no_number_is_too_large() {
        for bucket in [bucket(1, u64::MAX, 0), bucket(u64::MAX, 1, 1), bucket(1, 1, 1)] {
            for _ in 0..3 {
                bucket.take(u64::MAX, u64::MAX - 1);
                bucket.take(0, 0);
            }
        }
    }
}
