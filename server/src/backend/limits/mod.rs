//! A store that is not to be used faster than it may.
//!
//! A [`LimitedStore`] stands before another and lets no more operations or bytes through in a second than its [`Limits`]
//! say, but for bursts. All queues of the device share them. Of each queue only the oldest operation asks, and gets a place in
//! line; the rest wait where they are, in the guest's ring for the most part. So queues that wait are served in turn, and one
//! with hundreds of requests has no more turns than one with a single request.
//!
//! What waits does so in the kernel, and its worker sleeps meanwhile.
//!
//! Each operation counts once, also flushes and discards. Bytes are those that are read, written, or to be zeroes.

mod bucket;
mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::Arc;

use bucket::Bucket;
use queue::LimitedBackend;

use super::timer::{Clock, Moment};
use super::uring::Uring;
use super::{Backend, Io, Op, Service, Store, StoreInfo};

/// How much of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In each second, in the long run.
    pub per_second: NonZeroU64,
    /// At once, when there has been less before; never less than what two milliseconds bring.
    pub burst: u64,
}

/// How much of reads, of what changes the store, and of all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Of all operations.
    pub all: Option<Rate>,
    /// Of reads.
    pub reads: Option<Rate>,
    /// Of all others.
    pub writes: Option<Rate>,
}

/// How fast a store may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Operations.
    pub operations: Budget,
    /// Bytes: those that are read, written, or to be zeroes.
    pub bytes: Budget,
}

/// A store that is limited; see the [module](self).
pub struct LimitedStore {
    inner: Arc<dyn Store>,
    limiter: Arc<Limiter>,
}

impl LimitedStore {
    /// Puts limits before a store, whose bursts are to be had at once.
    pub fn new(inner: Arc<dyn Store>, limits: &Limits) -> Self {
        Self { inner, limiter: Arc::new(Limiter::new(limits)) }
    }

    /// The same for a store that is in use: its bursts have to be saved up first.
    pub fn in_use(inner: Arc<dyn Store>, limits: &Limits) -> Self {
        let limiter = Limiter::new(limits);
        limiter.buckets.iter().for_each(|bucket| bucket.bucket.empty(0));
        Self { inner, limiter: Arc::new(limiter) }
    }
}

impl Store for LimitedStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(LimitedBackend::new(self.inner.attach(ring, queue)?, &self.limiter, ring)?))
    }

    /// Not limited: it is no guest's.
    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn max_queues(&self) -> u16 {
        self.inner.max_queues()
    }

    fn service(&self) -> Option<Service> {
        self.inner.service()
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        self.inner.resize(capacity)
    }
}

/// What a bucket counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Operation,
    Byte,
}

#[derive(Debug)]
struct LimitedBy {
    bucket: Bucket,
    unit: Unit,
    reads: bool,
    writes: bool,
}

/// The limits of a device, shared by its queues without a lock.
#[derive(Debug)]
struct Limiter {
    buckets: Vec<LimitedBy>,
    clock: Clock,
}

impl Limiter {
    fn new(limits: &Limits) -> Self {
        let mut buckets = Vec::new();
        for (budget, unit) in [(limits.operations, Unit::Operation), (limits.bytes, Unit::Byte)] {
            let whole = u64::from(unit == Unit::Operation);
            let rates = [(budget.all, true, true), (budget.reads, true, false), (budget.writes, false, true)];
            for (rate, reads, writes) in rates {
                buckets.extend(rate.map(|rate| LimitedBy { bucket: Bucket::new(rate, whole), unit, reads, writes }));
            }
        }
        Self { buckets, clock: Clock::new() }
    }

    /// Takes what an operation needs, and says when it may go.
    fn take(&self, io: &Io, now: Moment) -> Moment {
        let (is_read, bytes) = match io.op {
            Op::Read { .. } => (true, io.buffers.len()),
            Op::Write { .. } => (false, io.buffers.len()),
            Op::WriteZeroes { len, .. } => (false, len),
            Op::Flush | Op::Discard { .. } => (false, 0),
        };
        let mut when = now;
        for limit in &self.buckets {
            let units = if limit.unit == Unit::Operation { 1 } else { bytes };
            if units > 0 && if is_read { limit.reads } else { limit.writes } {
                when = when.max(limit.bucket.take(units, now));
            }
        }
        when
    }
}
