//! Histograms that have left their queue: told to operators, subtracted, and read.

use serde::{Deserialize, Serialize};

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// All of it, in nanoseconds.
    pub sum_ns: u64,
    /// The end of each bucket in nanoseconds, a power of two or nothing for the last, and how often it was in it. They rise, and
    /// those in which nothing is are left out.
    pub buckets: Vec<(Option<u64>, u64)>,
}

impl Latencies {
    /// How often.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, (_, count)| sum.wrapping_add(*count))
    }

    /// The mean, in nanoseconds; `None` of nothing.
    pub fn mean_ns(&self) -> Option<u64> {
        self.sum_ns.checked_div(self.count())
    }

    /// What so great a part took at most, from 0 to 1, in nanoseconds: right to a factor of two, since that is what a bucket is wide.
    /// `None` of nothing.
    pub fn quantile_ns(&self, part: f64) -> Option<u64> {
        let wanted = part.clamp(0.0, 1.0) * self.count() as f64;
        let mut below = 0.0;
        for (end, count) in &self.buckets {
            let count = *count as f64;
            if count > 0.0 && below + count >= wanted {
                // The last bucket has no end: what is known is where it begins.
                let (Some(end), within) = (end, (wanted - below) / count) else { return Some(LAST_NS) };
                // The first begins at nothing, each other where its end's half is.
                let start = if *end <= FIRST_NS { 0.0 } else { *end as f64 / 2.0 };
                return Some((start + (*end as f64 - start) * within.clamp(0.0, 1.0)) as u64);
            }
            below += count;
        }
        None
    }

    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let buckets = self.buckets.iter().map(|(end, count)| {
            let old = before.buckets.iter().find(|(other, _)| other == end).map_or(0, |(_, count)| *count);
            (*end, count.saturating_sub(old))
        });
        Self {
            sum_ns: self.sum_ns.wrapping_sub(before.sum_ns),
            buckets: buckets.filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// All of this and of `more`.
    #[must_use]
    pub fn and(&self, more: &Self) -> Self {
        let mut sum = self.clone();
        sum.sum_ns = sum.sum_ns.wrapping_add(more.sum_ns);
        for (end, count) in &more.buckets {
            match sum.buckets.iter_mut().find(|(other, _)| other == end) {
                Some((_, sum)) => *sum = sum.wrapping_add(*count),
                None => sum.buckets.push((*end, *count)),
            }
        }
        sum.buckets.sort_by_key(|(end, _)| end.unwrap_or(u64::MAX));
        sum
    }
}

/// The end of the first bucket.
const FIRST_NS: u64 = 256;
/// Where the last bucket begins.
const LAST_NS: u64 = 1 << 34;

/// The stages of requests; docs/metrics.md says from where to where each goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "docs/metrics.md has the fields")]
#[serde(default)]
pub struct Stages {
    pub kick_to_submit: Latencies,
    pub submit_to_reap: Latencies,
    pub reap_to_interrupt: Latencies,
}

impl Stages {
    pub(super) fn of([kick_to_submit, submit_to_reap, reap_to_interrupt]: [Latencies; 3]) -> Self {
        Self { kick_to_submit, submit_to_reap, reap_to_interrupt }
    }

    /// Each by its name.
    pub fn named(&self) -> [(&'static str, &Latencies); 3] {
        [
            ("kick_to_submit", &self.kick_to_submit),
            ("submit_to_reap", &self.submit_to_reap),
            ("reap_to_interrupt", &self.reap_to_interrupt),
        ]
    }

    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.each(before, Latencies::since)
    }

    fn each(&self, other: &Self, of: fn(&Latencies, &Latencies) -> Latencies) -> Self {
        Self {
            kick_to_submit: of(&self.kick_to_submit, &other.kick_to_submit),
            submit_to_reap: of(&self.submit_to_reap, &other.submit_to_reap),
            reap_to_interrupt: of(&self.reap_to_interrupt, &other.reap_to_interrupt),
        }
    }
}

/// All of several queues.
impl<'a> std::iter::Sum<&'a Stages> for Stages {
    fn sum<I: Iterator<Item = &'a Stages>>(queues: I) -> Self {
        queues.fold(Self::default(), |sum, more| sum.each(more, Latencies::and))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(buckets: &[(Option<u64>, u64)]) -> Latencies {
        Latencies { sum_ns: 1000, buckets: buckets.to_vec() }
    }

    #[test]
    fn quantiles_lie_in_their_bucket() {
        let some = latencies(&[(Some(256), 50), (Some(1024), 49), (None, 1)]);
        for (part, least, most) in [
            (0.0, 0, 0),
            (0.25, 128, 128),
            (0.5, 256, 256),
            (0.6, 512, 1024),
            (0.99, 1024, 1024),
            (1.0, 1 << 34, 1 << 34),
        ] {
            let found = some.quantile_ns(part).unwrap();
            assert!((least..=most).contains(&found), "{part}: {found}");
        }
        assert_eq!((Latencies::default().quantile_ns(0.5), Latencies::default().mean_ns()), (None, None));
        assert_eq!(some.mean_ns(), Some(10));
    }

    #[test]
    fn they_are_added_and_subtracted_by_bucket() {
        let (before, now) = (latencies(&[(Some(512), 5)]), latencies(&[(Some(256), 1), (Some(512), 7), (None, 2)]));
        assert_eq!(now.since(&before).buckets, [(Some(256), 1), (Some(512), 2), (None, 2)]);
        assert_eq!(now.since(&now).buckets, []);
        let sum = latencies(&[(Some(512), 1), (None, 4)]).and(&latencies(&[(Some(256), 3), (None, 1)]));
        assert_eq!((sum.buckets, sum.sum_ns), (vec![(Some(256), 3), (Some(512), 1), (None, 5)], 2000));
    }
}
