//! A store that fails when a test wants it to.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::memory::MemoryStore;
use super::uring::Uring;
use super::{Backend, Completion, Full, Io, Service, Store, StoreInfo};

/// Memory, if it is in the mood.
pub(super) struct Moody {
    pub(super) memory: MemoryStore,
    pub(super) mood: Arc<Mood>,
}

#[derive(Default)]
pub(super) struct Mood {
    /// The error of all operations to come; 0 for none.
    errno: AtomicI32,
    /// How many will meet it, if not all.
    left: AtomicUsize,
    /// How many have met one.
    failed: AtomicUsize,
    /// How often its queues were hastened, and stopped.
    hastened: AtomicUsize,
    stopped: AtomicUsize,
}

impl Mood {
    /// All operations fail from now on, or none if this is 0.
    pub(super) fn fail(&self, errno: i32) {
        self.fail_times(errno, usize::MAX);
    }

    /// So many operations fail from now on.
    pub(super) fn fail_times(&self, errno: i32, times: usize) {
        self.left.store(times, Ordering::SeqCst);
        self.errno.store(errno, Ordering::SeqCst);
    }

    pub(super) fn failed(&self) -> usize {
        self.failed.load(Ordering::SeqCst)
    }

    /// How often its queues were hastened, and stopped.
    pub(super) fn told(&self) -> (usize, usize) {
        (self.hastened.load(Ordering::SeqCst), self.stopped.load(Ordering::SeqCst))
    }

    fn meet(&self) -> Option<io::Error> {
        let errno = self.errno.load(Ordering::SeqCst);
        let one_less = |left: usize| left.checked_sub(1);
        if errno == 0 || self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_err() {
            return None;
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        Some(io::Error::from_raw_os_error(errno))
    }
}

impl Moody {
    pub(super) fn new(capacity: u64) -> Self {
        Self { memory: MemoryStore::new(capacity).unwrap(), mood: Arc::default() }
    }
}

impl Store for Moody {
    fn info(&self) -> StoreInfo {
        self.memory.info()
    }

    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        let (inner, mood) = (self.memory.attach(ring, queue)?, Arc::clone(&self.mood));
        Ok(Box::new(MoodyBackend { inner, mood, failed: Vec::new() }))
    }

    fn flush(&self) -> io::Result<()> {
        self.mood.meet().map_or(Ok(()), Err)
    }

    fn max_queues(&self) -> u16 {
        self.memory.max_queues()
    }

    fn service(&self) -> Option<Service> {
        None
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        self.memory.resize(capacity)
    }
}

struct MoodyBackend {
    inner: Box<dyn Backend>,
    mood: Arc<Mood>,
    failed: Vec<Completion>,
}

impl Backend for MoodyBackend {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Full> {
        let Some(error) = self.mood.meet() else { return self.inner.submit(io) };
        // What was consumed before it went wrong is gone from the list.
        io.buffers.advance(512);
        self.failed.push(Completion { io, result: Err(error) });
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.failed);
        self.inner.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.failed.len()
    }

    fn hasten(&mut self) {
        self.mood.hastened.fetch_add(1, Ordering::SeqCst);
    }

    fn stop(&mut self) {
        self.mood.stopped.fetch_add(1, Ordering::SeqCst);
    }
}
