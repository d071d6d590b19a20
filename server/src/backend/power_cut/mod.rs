//! A disk whose power can be cut.
//!
//! A [`PowerCutStore`] stands before another as the cache stands before the medium of a real disk. A write is completed when it
//! is in the cache, which is memory; reads see it there. A flush writes the cache down to the store and flushes that; a durable
//! write goes there at once, by itself. A [`PowerCut`] leaves of what is in the cache what a real disk might have put on its
//! medium by then, chosen by a seed: everything that was flushed, and of the rest nothing, or the oldest writes with the last
//! of them torn, or any of them. Where writes overlap an older one never covers a newer one: no disk writes what it had
//! before.
//!
//! The cache has a bound. When it is full the oldest writes are written down to make room, as a disk does in the background:
//! these survive a cut. A write that is larger than the cache is written down at once. Discards go past the cache.
//!
//! # One at a time
//! One thread has the cache and does all operations, in the order in which they come: what a cut leaves follows from that
//! order and the seed. This is a disk to break and not one to measure.
//!
//! # What is not modelled
//! Sectors of 512 bytes are written whole or not at all. What the store below promises is taken for granted: it does not
//! lose power.

mod cache;
mod drive;
#[cfg(test)]
mod tests;

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Sender, bounded, unbounded};
use serde::{Deserialize, Serialize};

pub use cache::Survivors;
use drive::{Drive, Job};

use super::desk::Queue;
use super::uring::Uring;
use super::{Backend, Service, Store, StoreInfo};
use crate::sandbox::Entrance;

/// What becomes of completed writes that no flush has covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PowerCut {
    /// All are lost
    #[default]
    Drop,
    /// The oldest are there, of the next some sectors, and the rest is lost
    Tear,
    /// Each is there or lost, whatever became of those before it
    Reorder,
}

/// A store with a cache that can lose its power; see the [module](self).
pub struct PowerCutStore {
    inner: Arc<dyn Store>,
    jobs: Option<Sender<Job>>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

/// What has come of a cache.
#[derive(Debug, Default)]
struct Counts {
    /// How often the power was cut: queues of before are dead.
    cuts: AtomicU64,
    /// Writes that were taken by the store.
    written_down: AtomicU64,
}

impl PowerCutStore {
    /// Puts a cache of so many bytes before a store. Its thread does nothing before `entrance` is open.
    ///
    /// # Errors
    /// If the system has no thread or no memory, or the store cannot be used from there.
    pub(crate) fn new(inner: Arc<dyn Store>, limit: u64, entrance: &Entrance) -> io::Result<Self> {
        let (jobs, queue) = unbounded();
        let (ready, is_ready) = bounded(1);
        let counts = Arc::new(Counts::default());
        let (sandbox, store, its_counts) = (entrance.queue_up(), Arc::clone(&inner), Arc::clone(&counts));
        let run = move || match Drive::new(store, limit, its_counts) {
            Ok(drive) => {
                // Who waits for that is there until it comes.
                let _ = ready.send(Ok(()));
                drive.serve(&queue, &sandbox);
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let thread = thread::Builder::new().name("store-cache".into()).spawn(run)?;
        let store = Self { inner, jobs: Some(jobs), counts, thread: Some(thread) };
        is_ready.recv().map_err(|_| gone())??;
        Ok(store)
    }

    /// Cuts the power, and turns it on again. What was completed before and not flushed is as `cut` and `seed` say, and on stable
    /// storage; operations of queues that were attached before fail from now on.
    ///
    /// # Errors
    /// If the store fails to take what survives.
    pub fn cut(&self, cut: PowerCut, seed: u64) -> io::Result<Survivors> {
        self.ask(|done| Job::Cut { cut, seed, done })
    }

    /// How many writes the store has taken out of the cache.
    pub(crate) fn written_down(&self) -> u64 {
        self.counts.written_down.load(Ordering::Relaxed)
    }

    /// Has the thread do something, and waits for that.
    fn ask<T>(&self, job: impl FnOnce(Sender<io::Result<T>>) -> Job) -> io::Result<T> {
        let (done, result) = bounded(1);
        self.jobs.as_ref().and_then(|jobs| jobs.send(job(done)).ok()).ok_or_else(gone)?;
        result.recv().map_err(|_| gone())?
    }
}

fn gone() -> io::Error {
    io::Error::other("the cache's thread has ended")
}

impl Store for PowerCutStore {
    fn info(&self) -> StoreInfo {
        self.inner.info()
    }

    fn attach(&self, ring: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        let jobs = self.jobs.clone().ok_or_else(gone)?;
        let cuts = self.counts.cuts.load(Ordering::Acquire);
        Ok(Box::new(Queue::new(ring, move |io, desk| {
            // Not refused as long as there is the thread, which ends with the store.
            if let Err(error) = jobs.send(Job::Do { io, desk, cuts })
                && let Job::Do { io, desk, .. } = error.into_inner()
            {
                desk.receive(io, |_| Err(gone()));
            }
        })))
    }

    fn flush(&self) -> io::Result<()> {
        self.ask(Job::Flush)?;
        self.inner.flush()
    }

    /// The store below has one queue, that of the thread.
    fn max_queues(&self) -> u16 {
        u16::MAX
    }

    fn service(&self) -> Option<Service> {
        self.inner.service()
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        // Nothing may be attached meanwhile.
        self.ask(Job::LetGo)?;
        let resized = self.inner.resize(capacity);
        self.ask(Job::Attach)?;
        resized
    }
}

impl Drop for PowerCutStore {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a store's cache panicked");
        }
    }
}
