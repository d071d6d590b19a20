//! The threads, and which queue goes to which.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::inbox::{Command, Doorbell, Inbox, QueueId};
use super::{Left, TaskBuilder, Worker};
use crate::backend::uring::{Uring, UringError, UringOptions, Waker};
use crate::config::PollPolicy;
use crate::sandbox::{Sandbox, ThreadKind};

/// What a worker is to be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkerPlan {
    /// The processor that it is bound to.
    pub(crate) cpu: Option<usize>,
    /// What its ring is to have.
    pub(crate) uring: UringOptions,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// Threads or descriptors.
    #[error("cannot start the server's threads: {0}")]
    Threads(#[from] io::Error),
    /// No such processor, or not for this process.
    #[error(
        "worker_cpus names processor {cpu}, which is not there, or offline, or not among those that this process may \
         use (/proc/self/status, Cpus_allowed_list): {source}"
    )]
    Cpu {
        /// The processor.
        cpu: usize,
        /// What the system said.
        source: io::Error,
    },
    /// A ring with what was asked for.
    #[error(transparent)]
    Uring(#[from] UringError),
}

/// The worker threads of a server. When it is dropped they end, after what they are doing and without waiting for
/// requests in flight: detach the queues first.
pub(crate) struct Pool {
    workers: Vec<Handle>,
    next_id: AtomicU64,
}

struct Handle {
    inbox: Arc<Inbox>,
    /// Queues that it serves.
    queues: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Pool {
    /// Starts a worker for each plan, in the sandbox.
    ///
    /// # Errors
    /// If the system refuses. Without io_uring workers whose plan asks for nothing of it run all the same; stores that need
    /// it say so.
    pub(crate) fn new(plans: impl IntoIterator<Item = WorkerPlan>, sandbox: &Sandbox) -> Result<Self, PoolError> {
        let mut pool = Self { workers: Vec::new(), next_id: AtomicU64::new(0) };
        for (index, plan) in plans.into_iter().enumerate() {
            let waker = Waker::new()?;
            let inbox = Arc::new(Inbox::new(waker.clone()));
            let (worker_inbox, name) = (Arc::clone(&inbox), format!("worker-{index}"));
            let sandbox = sandbox.clone();
            let (ready, answer) = bounded(1);
            let thread = thread::Builder::new().name(name).spawn(move || {
                let (ring, result) = match prepare(plan, &waker) {
                    Ok(ring) => (Some(ring), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                if ready.send(result).is_ok()
                    && let Some(ring) = ring
                {
                    sandbox.enter_as(ThreadKind::Worker);
                    Worker::new(worker_inbox, Rc::new(ring)).run();
                }
            })?;
            // Known to the pool before it can fail, which then joins it.
            pool.workers.push(Handle { inbox, queues: Arc::default(), thread: Some(thread) });
            answer.recv().map_err(|_| io::Error::other("a worker has ended at once"))??;
        }
        Ok(pool)
    }

    /// Gives a queue to a worker: to the one with that number, or to the one that serves the fewest queues.
    ///
    /// # Errors
    /// If there is no such worker, or the queue's task cannot be made.
    pub(crate) fn attach(&self, build: TaskBuilder, poll: PollPolicy, worker: Option<usize>) -> io::Result<Attached> {
        let handle = match worker {
            Some(worker) => self.workers.get(worker),
            // Of equals the first. That two who look at the same time may find the same one does no harm.
            None => self.workers.iter().min_by_key(|worker| worker.queues.load(Ordering::Relaxed)),
        };
        let gone = || io::Error::other("no such worker thread");
        let handle = handle.ok_or_else(gone)?;
        let share = Share::new(&handle.queues);
        let inbox = Arc::clone(&handle.inbox);
        let id = QueueId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let doorbell = Arc::new(Doorbell::new(id, Arc::clone(&inbox)));
        let (attached, answer) = bounded(1);
        inbox.push(Command::Attach { id, doorbell: Arc::clone(&doorbell), build, poll, attached });
        answer.recv().map_err(|_| gone())??;
        Ok(Attached { id, inbox, doorbell, _share: share })
    }
}

/// Makes the calling thread a worker: binds it, and makes its ring.
fn prepare(plan: WorkerPlan, waker: &Waker) -> Result<Uring, PoolError> {
    if let Some(cpu) = plan.cpu {
        let mut cpus = CpuSet::new();
        let bound = cpus.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus));
        bound.map_err(|source| PoolError::Cpu { cpu, source: source.into() })?;
    }
    match Uring::with(waker, plan.uring) {
        Err(error) if plan.uring.sqpoll.is_none() && !plan.uring.iopoll => {
            log::warn!("{error}");
            Ok(Uring::without_kernel(waker))
        }
        result => Ok(result?),
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
    _share: Share,
}

/// A queue among those that its worker serves, until this is dropped.
struct Share(Arc<AtomicUsize>);

impl Share {
    fn new(queues: &Arc<AtomicUsize>) -> Self {
        queues.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(queues))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
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
        let (detached, left) = bounded(1);
        self.inbox.push(Command::Detach { id: self.id, detached });
        Detaching { id: self.id, inbox: self.inbox, left }
    }
}

/// A queue that is being stopped.
#[must_use = "a queue in this state may still move data"]
pub(crate) struct Detaching {
    id: QueueId,
    inbox: Arc<Inbox>,
    left: Receiver<Left>,
}

impl Detaching {
    /// Has the worker look for what it may go on with.
    pub(crate) fn refresh(&self) {
        self.inbox.push(Command::Refresh(self.id));
    }

    /// What is in flight may fail rather than take long, for the queue will not go on.
    pub(crate) fn hurry(&self) {
        self.inbox.push(Command::Hurry(self.id));
    }

    /// What the queue leaves, once nothing is in flight any more; `None` if that is still not so at `deadline`.
    pub(crate) fn wait_until(&self, deadline: Instant) -> Option<Left> {
        match self.left.recv_deadline(deadline) {
            Ok(left) => Some(left),
            Err(RecvTimeoutError::Timeout) => None,
            // Its worker knows nothing of it any more: whoever waited would wait for ever.
            Err(RecvTimeoutError::Disconnected) => {
                log::error!("a worker has lost a queue");
                Some(Left::default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio::queue::Armed;

    use super::super::{QueueTask, Round, Share};
    use super::*;
    use crate::backend::uring::SqPoll;
    use crate::config::SandboxMode;

    /// A queue with nothing in it.
    struct Empty;

    impl QueueTask for Empty {
        fn hurry(&mut self) {}

        fn run(&mut self, _: Share) -> Round {
            Round::Nothing
        }

        fn arm(&mut self) -> Armed {
            Armed::Sleep
        }

        fn kicked(&mut self) {}

        fn refresh(&mut self) {}

        fn stop(&mut self) {}

        fn in_flight(&self) -> usize {
            0
        }

        fn is_dormant(&self) -> bool {
            false
        }

        fn leave(&mut self) -> Left {
            Left::default()
        }

        fn give_up(&mut self, _: &str) {}
    }

    fn pool(plans: &[WorkerPlan]) -> Result<Pool, PoolError> {
        Pool::new(plans.iter().copied(), &Sandbox::new(SandboxMode::Off, &[], &[]).unwrap())
    }

    /// Attaches a queue; the name of the thread that serves it, and the processors that it may run on.
    fn attach(pool: &Pool, worker: Option<usize>) -> (Attached, String, Vec<usize>) {
        let (told, place) = bounded(1);
        let build = Box::new(move |_: &Rc<Uring>| -> io::Result<Box<dyn QueueTask>> {
            let cpus = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
            let cpus = (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu).unwrap()).collect();
            told.send((thread::current().name().unwrap().to_owned(), cpus)).unwrap();
            Ok(Box::new(Empty))
        });
        let attached = pool.attach(build, PollPolicy::Never, worker).unwrap();
        let (name, cpus) = place.recv().unwrap();
        (attached, name, cpus)
    }

    /// The processors that this process may use.
    fn usable() -> Vec<usize> {
        let cpus = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu).unwrap()).collect()
    }

    #[test]
    fn a_queue_goes_to_the_worker_with_the_fewest_or_to_the_one_that_is_named() {
        let pool = pool(&[WorkerPlan::default(); 3]).unwrap();
        let mut spread: Vec<_> = (0..6).map(|_| attach(&pool, None)).collect();
        let names: Vec<_> = spread.iter().map(|(_, name, _)| name.as_str()).collect();
        assert_eq!(names, ["worker-0", "worker-1", "worker-2", "worker-0", "worker-1", "worker-2"]);
        let (detached, ..) = spread.remove(1);
        let limit = Instant::now() + std::time::Duration::from_secs(60);
        assert!(detached.detach().wait_until(limit).is_some());
        assert_eq!(attach(&pool, None).1, "worker-1", "where there is one less");
        let named: Vec<_> = [2, 2, 0, 2].map(|worker| attach(&pool, Some(worker))).into();
        let names: Vec<_> = named.iter().map(|(_, name, _)| name.as_str()).collect();
        assert_eq!(names, ["worker-2", "worker-2", "worker-0", "worker-2"]);
        assert_eq!(attach(&pool, None).1, "worker-1", "those that were named count too");
        let nobody = pool.attach(Box::new(|_| Ok(Box::new(Empty))), PollPolicy::Never, Some(3));
        assert!(nobody.is_err());
    }

    #[test]
    fn workers_are_bound_to_their_processors() {
        let (usable, mut plans) = (usable(), Vec::new());
        // The last first, so that the order is not the natural one.
        for cpu in usable.iter().rev() {
            plans.push(WorkerPlan { cpu: Some(*cpu), ..WorkerPlan::default() });
        }
        plans.push(WorkerPlan::default());
        let pool = pool(&plans).unwrap();
        for (worker, plan) in plans.iter().enumerate() {
            let (_queue, _, cpus) = attach(&pool, Some(worker));
            assert_eq!(cpus, plan.cpu.map_or(usable.clone(), |cpu| vec![cpu]));
        }
    }

    #[test]
    fn what_a_plan_asks_for_and_cannot_be_had_is_an_error() {
        // No machine has it and lets this process use it.
        let nowhere = (0..1024).rev().find(|cpu| !usable().contains(cpu)).unwrap();
        let bound = WorkerPlan { cpu: Some(nowhere), ..WorkerPlan::default() };
        let error = pool(&[WorkerPlan::default(), bound]).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("worker_cpus names processor {nowhere},")), "{error}");
        let sqpoll = Some(SqPoll { idle: 1, cpu: Some(nowhere as u32) });
        let submitted = WorkerPlan { uring: UringOptions { sqpoll, iopoll: false }, ..WorkerPlan::default() };
        let error = pool(&[submitted]).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("sqpoll_cpus names processor {nowhere},")), "{error}");
    }
}
