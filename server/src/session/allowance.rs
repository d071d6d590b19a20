//! How much a client may take of what all clients share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bounded amount of something, such as descriptors or mapped bytes.
#[derive(Debug)]
pub(super) struct Allowance {
    limit: u64,
    taken: AtomicU64,
}

/// A part of an [`Allowance`], given back when dropped.
#[derive(Debug)]
#[must_use = "it is given back at once otherwise"]
pub(super) struct Share {
    of: Arc<Allowance>,
    amount: u64,
}

impl Allowance {
    /// Nothing of `limit` is taken.
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, taken: AtomicU64::new(0) })
    }

    /// What may be taken altogether.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes `amount`, if there is as much.
    pub(super) fn take(self: &Arc<Self>, amount: u64) -> Option<Share> {
        let more = |taken: u64| taken.checked_add(amount).filter(|taken| *taken <= self.limit);
        // Relaxed: it counts, and guards no memory.
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Share { of: Arc::clone(self), amount })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.taken.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_there_is() {
        let allowance = Allowance::new(10);
        let most = allowance.take(9).unwrap();
        assert!(allowance.take(2).is_none() && allowance.take(u64::MAX).is_none());
        let last = allowance.take(1).unwrap();
        assert!(allowance.take(1).is_none());
        assert!(allowance.take(0).is_some());
        drop(most);
        drop(allowance.take(9).unwrap());
        drop(last);
        assert!(allowance.take(10).is_some());
    }
}
