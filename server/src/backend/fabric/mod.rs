//! A store that seems to be elsewhere.
//!
//! A [`DistantStore`] stands before another as if a [`Fabric`] lay between the device and it. Each operation becomes a request
//! that travels there and a response that travels back:
//! - Data goes over the wire once: that of writes with the request, that of reads with the response. The wire carries so many
//!   bytes a second each way, one message after the other, for all queues of the device.
//! - Behind that, each message takes half of the round trip, and its share of the jitter.
//! - Each queue has a connection of its own. On it messages arrive in the order in which they were sent, and no more
//!   operations are on their way than it has credits; the rest wait in the guest's ring.
//!
//! The jitter follows from the seed, the direction, and how many messages went that way before.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::num::{NonZeroU16, NonZeroU64};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use queue::DistantBackend;

use super::random::Random;
use super::timer::{Clock, Moment, time_of};
use super::uring::Uring;
use super::{Backend, Io, Op, Service, Store, StoreInfo};

/// The longest round trip, and the longest mean jitter.
pub const MAX_ROUND_TRIP: Duration = Duration::from_secs(10);
/// How many times its mean a jitter is at most.
const LONGEST_JITTER: f64 = 10.0;

/// What lies between a device and its store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fabric {
    /// How long it is there and back, besides the data's own time; up to [`MAX_ROUND_TRIP`].
    pub round_trip: Duration,
    /// What is added to that in the mean: exponentially distributed each way, and at most ten times as much.
    pub jitter: Duration,
    /// Bytes of data a second, each way; `None` for any number.
    pub bandwidth: Option<NonZeroU64>,
    /// Operations of a queue that are on their way at the same time; `None` for any number.
    pub credits: Option<NonZeroU16>,
    /// Where the sequence of jitters starts.
    pub seed: u64,
}

/// A store behind a fabric; see the [module](self).
pub struct DistantStore {
    inner: Arc<dyn Store>,
    wire: Arc<Wire>,
}

impl DistantStore {
    /// Puts a fabric before a store.
    pub fn new(inner: Arc<dyn Store>, fabric: Fabric) -> Self {
        Self { inner, wire: Arc::new(Wire::new(fabric)) }
    }
}

impl Store for DistantStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(DistantBackend::new(self.inner.attach(ring, queue)?, &self.wire, ring)?))
    }

    /// At once: it is no guest's.
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

/// One direction.
#[derive(Debug, Default)]
struct Way {
    /// When all that was sent has left.
    free_at: AtomicU64,
    messages: AtomicU64,
}

/// Both directions, shared by the device's queues without a lock.
#[derive(Debug)]
struct Wire {
    fabric: Fabric,
    clock: Clock,
    there: Way,
    back: Way,
}

impl Wire {
    fn new(fabric: Fabric) -> Self {
        Self { fabric, clock: Clock::new(), there: Way::default(), back: Way::default() }
    }

    /// Sends a request, and says when it arrives.
    fn request(&self, io: &Io, now: Moment) -> Moment {
        let data = if matches!(io.op, Op::Write { .. }) { io.buffers.len() } else { 0 };
        self.arrival(&self.there, 0, data, now)
    }

    /// Sends the response to a request whose data were so many bytes, and says when it arrives.
    fn response(&self, op: Op, data: u64, now: Moment) -> Moment {
        let data = if matches!(op, Op::Read { .. }) { data } else { 0 };
        self.arrival(&self.back, 1, data, now)
    }

    fn arrival(&self, way: &Way, direction: u64, data: u64, now: Moment) -> Moment {
        let time = self.fabric.bandwidth.map_or(0, |bandwidth| time_of(data, bandwidth.get()));
        let leave = |free_at: Moment| Some(free_at.max(now).saturating_add(time));
        // Nothing else is told by it: its own order is enough. Cannot fail, as there always is a next.
        let free_at = way.free_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, leave).unwrap_or_else(|same| same);
        let left = free_at.max(now).saturating_add(time);
        let nth = way.messages.fetch_add(1, Ordering::Relaxed);
        let travel = self.fabric.round_trip / 2 + self.jitter(direction, nth);
        left.saturating_add(u64::try_from(travel.as_nanos()).unwrap_or(u64::MAX))
    }

    /// One way's share of the jitter.
    fn jitter(&self, direction: u64, nth: u64) -> Duration {
        let mean = self.fabric.jitter / 2;
        if mean.is_zero() {
            return mean;
        }
        let draw = -(1.0 - Random::new(self.fabric.seed, direction, nth).unit()).ln();
        mean.mul_f64(draw.min(LONGEST_JITTER))
    }
}
