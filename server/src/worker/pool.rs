//! The threads, and which queue goes to which.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam::channel::{Receiver, bounded};
use virtio::queue::QueueState;

use super::inbox::{Command, Doorbell, Inbox, QueueId};
use super::{TaskBuilder, Worker};
use crate::backend::uring::{Uring, Waker};
use crate::config::PollPolicy;

/// The worker threads of a server. When it is dropped they end, after what they are doing and without waiting for
/// requests in flight: detach the queues first.
pub(crate) struct Pool {
    workers: Vec<Handle>,
    next_id: AtomicU64,
}

struct Handle {
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` workers, at least one.
    ///
    /// # Errors
    /// If the system refuses. Without io_uring the workers run all the same; stores that need it say so.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let mut pool = Self { workers: Vec::new(), next_id: AtomicU64::new(0) };
        for index in 0..threads.max(1) {
            let waker = Waker::new()?;
            let inbox = Arc::new(Inbox::new(waker.clone()));
            let (worker_inbox, name) = (Arc::clone(&inbox), format!("worker-{index}"));
            let thread = thread::Builder::new().name(name).spawn(move || {
                let ring = Uring::new(&waker).unwrap_or_else(|error| {
                    log::warn!("{error}");
                    Uring::without_kernel(&waker)
                });
                Worker::new(worker_inbox, Rc::new(ring)).run();
            })?;
            pool.workers.push(Handle { inbox, thread: Some(thread) });
        }
        Ok(pool)
    }

    /// Gives a queue to a worker: each in its turn.
    ///
    /// # Errors
    /// If its task cannot be made.
    pub(crate) fn attach(&self, build: TaskBuilder, poll: PollPolicy) -> io::Result<Attached> {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        let gone = || io::Error::other("no worker threads");
        let turn = usize::try_from(number).unwrap_or(0) % self.workers.len().max(1);
        let inbox = Arc::clone(&self.workers.get(turn).ok_or_else(gone)?.inbox);
        let id = QueueId(number);
        let doorbell = Arc::new(Doorbell::new(id, Arc::clone(&inbox)));
        let (attached, answer) = bounded(1);
        inbox.push(Command::Attach { id, doorbell: Arc::clone(&doorbell), build, poll, attached });
        answer.recv().map_err(|_| gone())??;
        Ok(Attached { id, inbox, doorbell })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.inbox.push(Command::Exit);
        }
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            if thread.join().is_err() {
                log::error!("a worker thread panicked");
            }
        }
    }
}

/// A queue that a worker serves.
pub(crate) struct Attached {
    id: QueueId,
    inbox: Arc<Inbox>,
    doorbell: Arc<Doorbell>,
}

impl Attached {
    /// Where kicks go.
    pub(crate) fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    /// Has the worker look at guest memory anew; what was unmapped is let go when it has.
    pub(crate) fn refresh(&self) {
        self.inbox.push(Command::Refresh(self.id));
    }

    /// Stops it. It goes on giving back what is in flight, and is forgotten after the last.
    pub(crate) fn detach(self) -> Detaching {
        let (detached, state) = bounded(1);
        self.inbox.push(Command::Detach { id: self.id, detached });
        Detaching { state }
    }
}

/// A queue that is being stopped.
#[must_use = "a queue in this state may still move data"]
pub(crate) struct Detaching {
    state: Receiver<QueueState>,
}

impl Detaching {
    /// Where the queue stands, once nothing is in flight any more; `None` if that is still not so at `deadline`.
    pub(crate) fn wait_until(&self, deadline: Instant) -> Option<QueueState> {
        self.state.recv_deadline(deadline).ok()
    }
}
