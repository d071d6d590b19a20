//! Numbers that one thread writes and any reads.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Latencies;

/// A number. Relaxed, as it guards no memory; and stored in place of added to, since there is one writer at a time.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    #[inline(always)]
    pub(super) fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    #[inline(always)]
    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The end of the first bucket, as a power of two in nanoseconds: 256 ns.
const FIRST: u32 = 8;
/// Each ends at twice the nanoseconds of the one before, the last but one at 17 s, and the last never.
const BUCKETS: usize = 28;

/// How often something took how long.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: [Counter; BUCKETS],
    /// Nanoseconds.
    sum: Counter,
}

impl Histogram {
    /// It took that long, `times` times.
    #[inline]
    pub(super) fn record(&self, nanoseconds: u64, times: u64) {
        let bits = u64::BITS.saturating_sub(nanoseconds.leading_zeros());
        let bucket = (bits.saturating_sub(FIRST) as usize).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.add(times);
        }
        self.sum.add(nanoseconds.wrapping_mul(times));
    }

    /// All of it, in nanoseconds.
    pub(super) fn sum(&self) -> u64 {
        self.sum.get()
    }

    /// As it is now.
    pub(super) fn latencies(&self) -> Latencies {
        let last = BUCKETS.saturating_sub(1);
        let end = |at: usize| (at < last).then_some(1 << (FIRST as usize).saturating_add(at));
        let counts = self.buckets.iter().enumerate().map(|(at, count)| (end(at), count.get()));
        Latencies { sum_ns: self.sum.get(), buckets: counts.filter(|(_, count)| *count > 0).collect() }
    }

    /// The end of each bucket in seconds, and how often it was in it.
    pub(super) fn read(&self) -> impl Iterator<Item = (f64, u64)> {
        let last = BUCKETS.saturating_sub(1);
        self.buckets.iter().enumerate().map(move |(at, count)| {
            let end = if at == last { f64::MAX } else { (1u64 << (FIRST as usize + at)) as f64 / 1e9 };
            (end, count.get())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_has_its_bucket() {
        let histogram = Histogram::default();
        for (time, bucket) in [
            (0, 0),
            (255, 0),
            (256, 1),
            (511, 1),
            (512, 2),
            (1 << 33, 26),
            ((1 << 34) - 1, 26),
            (1 << 34, 27),
            (u64::MAX, 27),
        ] {
            let before: Vec<_> = histogram.read().collect();
            histogram.record(time, 3);
            let after: Vec<_> = histogram.read().collect();
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                assert_eq!(after.1 - before.1, if at == bucket { 3 } else { 0 }, "{time} in {at}");
                assert!(at != bucket || time as f64 / 1e9 <= after.0, "{time}");
            }
        }
        let histogram = Histogram::default();
        histogram.record(1000, 2);
        histogram.record(u64::MAX, 1);
        assert_eq!(histogram.sum(), 2000u64.wrapping_add(u64::MAX));
        assert_eq!(histogram.latencies().buckets, [(Some(1024), 2), (None, 1)]);
    }
}
