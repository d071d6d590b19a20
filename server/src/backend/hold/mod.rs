//! A store whose failures do not come to the guest, or not at once.
//!
//! A [`HoldStore`] stands before another. An operation that fails below, and not by what the guest asked for, waits here: until
//! somebody says [`Held::resume`], or for a while that grows from time to time ([`OnError`]). Then it is sent again, whole,
//! whatever of it was done before. The guest sees a slow disk and not a broken one.
//!
//! # Order
//! What waits has not been completed, and a guest relies on no order between operations that have not. So others overtake it:
//! a flush covers the writes that were completed before it, of which what waits is none. A guest that wants a write on stable
//! storage waits for it first, and waits as long as we do.
//!
//! # The end
//! Whoever stops a queue for good ([`Backend::stop`]) has what waits there end with the error that it met, and what fails
//! after that fails. A pause is no such end: what waits is [put off](Backend::put_off), so that the stores below come to rest, and is
//! sent again when the queue goes on.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use queue::HoldBackend;
use serde::Serialize;

use super::uring::{Uring, Waker};
use super::{Backend, Io, Service, Store, StoreInfo};

/// What is done with an operation that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// It waits until somebody has it sent again.
    Hold,
    /// It is sent again, less and less often, until so long after it has failed for the first time; then it fails.
    Retry(Duration),
}

/// A store whose failed operations are sent again; see the [module](self).
pub struct HoldStore {
    inner: Arc<dyn Store>,
    on_error: OnError,
    held: Arc<Held>,
}

impl HoldStore {
    /// Stands before a store; in the log it is called `name`.
    pub fn new(inner: Arc<dyn Store>, on_error: OnError, name: &str) -> Self {
        let held = Held { name: name.to_owned(), on_error, resumed: AtomicU64::new(0), waiting: Mutex::default() };
        Self { inner, on_error, held: Arc::new(held) }
    }

    /// What waits in its queues.
    pub fn held(&self) -> Arc<Held> {
        Arc::clone(&self.held)
    }
}

impl Store for HoldStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(HoldBackend::new(self.inner.attach(ring, queue)?, self.on_error, &self.held, ring)?))
    }

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

/// What waits in all queues of a device together, and the word that has it sent again.
#[derive(Debug)]
pub struct Held {
    name: String,
    on_error: OnError,
    /// How often they were told to send again what waits.
    resumed: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: usize,
    /// What the first of them has met since they were sent again.
    error: Option<String>,
    /// Whether one of them has failed for good.
    over: bool,
    /// Those who have queues.
    wakers: Vec<(u64, Waker)>,
    next: u64,
}

/// What has failed, and has not been given back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HeldRequests {
    /// How many operations that are.
    pub requests: usize,
    /// The error that the first of them met; `None` if there are none, or while all are on their way again.
    pub error: Option<String>,
}

impl Held {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits now.
    pub fn requests(&self) -> HeldRequests {
        let waiting = self.waiting();
        HeldRequests { requests: waiting.requests, error: waiting.error.clone() }
    }

    /// Has all that waits sent again soon, and what is on its way and will fail, once more; says how many waited.
    pub fn resume(&self) -> usize {
        // Release: what the caller has mended is mended for whoever sees this.
        self.resumed.fetch_add(1, Ordering::Release);
        let mut waiting = self.waiting();
        waiting.error = None;
        waiting.wakers.iter().for_each(|(_, waker)| waker.wake());
        waiting.requests
    }

    /// How often [`resume`](Self::resume) was called.
    fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Acquire)
    }

    /// Wakes this thread with [`resume`](Self::resume) from now on, until the number is [left](Self::leave).
    fn join(&self, waker: &Waker) -> u64 {
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next = number.wrapping_add(1);
        waiting.wakers.push((number, waker.clone()));
        number
    }

    fn leave(&self, number: u64) {
        self.waiting().wakers.retain(|(joined, _)| *joined != number);
    }

    /// Operations have failed with this error; the log says so, unless that is old news.
    fn tell(&self, error: &io::Error) {
        let mut waiting = self.waiting();
        if waiting.error.is_some() {
            return;
        }
        waiting.error = Some(error.to_string());
        drop(waiting);
        let name = &self.name;
        match self.on_error {
            OnError::Hold => log::error!(
                "{name}: the storage has failed: {error}. The guest waits; put the storage in order, then have it go on: \
                 vfio-user-blk ctl resume {name}"
            ),
            OnError::Retry(deadline) => log::warn!(
                "{name}: the storage has failed: {error}. The guest waits while it is tried again, for {deadline:?} at most; \
                 vfio-user-blk ctl resume {name} has it tried at once"
            ),
        }
    }

    /// An operation has been tried again for as long as it may.
    fn is_over(&self, error: &io::Error) {
        let mut waiting = self.waiting();
        if !std::mem::replace(&mut waiting.over, true) {
            drop(waiting);
            log::error!("{}: the storage still fails: {error}. The guest is told of it", self.name);
        }
    }
}

/// An operation that has failed: counts among those that wait until this is dropped.
#[derive(Debug)]
struct Counted(Arc<Held>);

impl Counted {
    fn new(held: &Arc<Held>) -> Self {
        let mut waiting = held.waiting();
        waiting.requests = waiting.requests.saturating_add(1);
        drop(waiting);
        Self(Arc::clone(held))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.requests = waiting.requests.saturating_sub(1);
        if waiting.requests == 0 {
            (waiting.error, waiting.over) = (None, false);
        }
    }
}

/// An operation that has failed and that no queue has: its own is at rest. It counts among those that wait until this is dropped.
#[derive(Debug)]
pub struct PutOff {
    /// As it came.
    pub(crate) io: Box<Io>,
    _counted: Counted,
}
