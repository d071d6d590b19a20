//! The data path: a pool of threads, each of which serves queues of any device.
//!
//! A worker knows its queues as [`QueueTask`]s and nothing of what they do. It runs those that are awake, round after
//! round, each with a bounded amount of work; one that has nothing left arms its notifications and is set aside until it
//! is kicked. With nothing awake the worker sleeps in its ring, where completions, kicks and commands wake it.
//!
//! A task that panics costs its queue, not its worker: see [`guarded`].
//!
//! No two workers share anything on the way of a request. What a session wants of a worker goes through the worker's
//! [`Inbox`]; the worker answers by dropping or sending, never by waiting.

mod guarded;
mod inbox;
mod patience;
mod pool;
mod sync;
mod wakeup;

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use virtio::queue::{Armed, QueueState};

use crate::backend::uring::Uring;

use guarded::{Guarded, guarded};
use inbox::{Command, Inbox};
pub(crate) use inbox::{Doorbell, QueueId};
use patience::Patience;
pub use pool::PoolError;
pub(crate) use pool::{Attached, Detaching, Pool, WorkerPlan};

/// How long a worker whose ring fails to wait sleeps in place of it, or one that has panicked before it goes on.
const BROKEN_RING_PAUSE: Duration = Duration::from_millis(100);

/// Rounds without work after which the clock is read: some hundred nanoseconds.
const ROUNDS_BY_THE_CLOCK: u32 = 8;

/// What a round of work came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Something was taken, or given back: there may be more.
    Progress,
    /// There was nothing to do.
    Nothing,
}

/// How much a queue may do in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// As much as a queue's size: no other queue of the worker is awake.
    Whole,
    /// A few requests: others wait for their turn, and a queue that is flooded must not become theirs.
    Part,
}

/// What a queue that was stopped leaves to its next task.
#[derive(Default)]
pub(crate) struct Left {
    /// Where it stands.
    pub(crate) state: QueueState,
    /// What it has taken and not given back, and all that goes with it, which its kind of device knows; `None` if that is nothing.
    pub(crate) unfinished: Option<Box<dyn Any + Send>>,
}

impl From<QueueState> for Left {
    fn from(state: QueueState) -> Self {
        Self { state, unfinished: None }
    }
}

/// One queue, on the thread of its worker.
pub(crate) trait QueueTask {
    /// One round: takes requests, as many as its share allows, and queues them in the ring, which the worker then starts for
    /// all queues; gives back what has completed, publishes it and signals.
    fn run(&mut self, share: Share) -> Round;

    /// Asks for a kick with the next request and says whether there is none yet.
    fn arm(&mut self) -> Armed;

    /// The driver kicked; `run` follows.
    fn kicked(&mut self);

    /// Guest memory has changed: looks at it anew and lets go of all that is gone.
    fn refresh(&mut self);

    /// Takes no requests from now on.
    fn stop(&mut self);

    /// Stopped for good: what is in flight may fail rather than take long.
    fn hurry(&mut self);

    /// Requests that were taken and not given back, but for those that it [leaves](Self::leave) to its next task.
    fn in_flight(&self) -> usize;

    /// Whether nothing will come of what is in flight before the ring wakes the worker, which need not stay awake for it,
    /// whatever the policy: nor for more requests, which would only wait behind.
    fn is_dormant(&self) -> bool;

    /// What it leaves behind when it is stopped and nothing is in flight; it is dropped then.
    fn leave(&mut self) -> Left;

    /// It has panicked, or its worker has, and it is about to be dropped with what it has in flight: has the device need a
    /// reset.
    fn give_up(&mut self, why: &str);
}

/// Makes a task on its worker's thread, where it stays.
pub(crate) type TaskBuilder = Box<dyn FnOnce(&Rc<Uring>) -> io::Result<Box<dyn QueueTask>> + Send>;

struct Entry {
    id: QueueId,
    doorbell: Arc<Doorbell>,
    task: Guarded,
    patience: Patience,
    /// Where to send what it leaves once the last request is given back.
    stopping: Option<Sender<Left>>,
}

/// One thread of the pool.
struct Worker {
    inbox: Arc<Inbox>,
    ring: Rc<Uring>,
    /// Queues with something to do, or that have not been found idle yet.
    awake: Vec<Entry>,
    /// Queues whose notifications are armed and that have nothing in flight.
    idle: HashMap<QueueId, Entry>,
}

impl Worker {
    fn new(inbox: Arc<Inbox>, ring: Rc<Uring>) -> Self {
        Self { inbox, ring, awake: Vec::new(), idle: HashMap::new() }
    }

    /// Serves until the pool is dropped. A panic of the worker's own costs it the queues that it has, not its thread.
    fn run(mut self) {
        while let Err(why) = guarded(|| self.serve()) {
            log::error!("a worker panicked: {why}; it gives up its queues and goes on");
            for entry in self.awake.iter_mut().chain(self.idle.values_mut()) {
                entry.task.give_up(&format!("a defect of this server: its worker panicked: {why}"));
            }
            // Should it panic at once again, then not as fast as it can.
            std::thread::sleep(BROKEN_RING_PAUSE);
        }
    }

    fn serve(&mut self) {
        // Since when there has been nothing to do. The clock is read only then, so that it costs no request anything, and
        // not at once, as the time it takes is time in which no request is seen.
        let mut idle_since = None;
        let mut unclocked = 0;
        // Whether the last round's requests are still in the ring, to be started by the call that sleeps.
        let mut held = false;
        loop {
            while let Some(command) = self.inbox.pop() {
                match command {
                    Command::Exit => return,
                    command => self.execute(command),
                }
            }
            if self.run_awake() == Round::Progress {
                idle_since = None;
                unclocked = 0;
                // A worker that sleeps as soon as it finds nothing starts its requests and sleeps in one system call. It
                // holds them back for no more than the one round which shows that there is nothing else.
                held = !held && !self.stays_awake(Duration::ZERO);
                if !held {
                    self.start();
                }
                continue;
            }
            if unclocked < ROUNDS_BY_THE_CLOCK && self.stays_awake(Duration::ZERO) {
                unclocked += 1;
                std::hint::spin_loop();
                continue;
            }
            unclocked = 0;
            let now = Instant::now();
            let since = *idle_since.get_or_insert(now);
            let idle = now.saturating_duration_since(since);
            if self.stays_awake(idle) && !self.is_dormant(idle) {
                self.start();
                if patience::spin(now, idle) {
                    self.awake.iter_mut().for_each(|entry| entry.patience.in_the_way());
                }
            } else if self.arm_all(since) == Armed::Sleep {
                self.sleep();
                idle_since = None;
                held = false;
            }
        }
    }

    /// Whether a queue wants the worker awake after having had nothing to do for `idle`, or nothing would wake it for what
    /// is in flight.
    fn stays_awake(&self, idle: Duration) -> bool {
        self.ring.is_polling() || self.awake.iter().any(|entry| entry.patience.lasts(idle))
    }

    /// Whether all queues that want the worker awake would wait in vain.
    fn is_dormant(&self, idle: Duration) -> bool {
        let in_vain = |entry: &Entry| !entry.patience.lasts(idle) || entry.task.is_dormant();
        !self.ring.is_polling() && self.awake.iter().all(in_vain)
    }

    /// Starts what the queues have left in the ring.
    fn start(&self) {
        if let Err(error) = self.ring.submit() {
            log::error!("a worker cannot start requests: {error}");
        }
    }

    /// Gives each queue that is awake its round, and sets aside those that have had nothing for long while others did.
    fn run_awake(&mut self) -> Round {
        let mut any = Round::Nothing;
        let (mut stopped, mut quiet) = (false, false);
        let share = if self.awake.len() > 1 { Share::Part } else { Share::Whole };
        for entry in &mut self.awake {
            let round = entry.task.run(share);
            quiet |= entry.patience.after(round);
            stopped |= entry.stopping.is_some();
            if round == Round::Progress {
                any = round;
            }
        }
        if stopped {
            self.let_go_of_stopped();
        }
        if quiet && any == Round::Progress {
            let idle = self.awake.extract_if(.., |entry| {
                entry.patience.is_over()
                    && entry.task.in_flight() == 0
                    && entry.stopping.is_none()
                    && entry.task.arm() == Armed::Sleep
            });
            self.idle.extend(idle.map(|entry| (entry.id, entry)));
        }
        any
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Attach { id, doorbell, build, poll, attached } => {
                let result = Guarded::build(build, &self.ring).map(|task| {
                    // Awake at first: the driver may have added requests before it was known here.
                    let patience = Patience::new(poll);
                    self.awake.push(Entry { id, doorbell, task, patience, stopping: None });
                });
                // A session that has gone meanwhile detaches what it attached.
                let _gone = attached.send(result);
            }
            Command::Kick(id, at) => {
                if let Some(entry) = self.wake(id) {
                    entry.patience.kicked(at);
                    entry.doorbell.answered();
                    entry.task.kicked();
                }
            }
            Command::Refresh(id) => {
                if let Some(entry) = self.wake(id) {
                    entry.task.refresh();
                }
            }
            Command::Detach { id, detached } => {
                if let Some(entry) = self.wake(id) {
                    entry.task.stop();
                    entry.stopping = Some(detached);
                }
            }
            Command::Hurry(id) => {
                if let Some(entry) = self.wake(id) {
                    entry.task.hurry();
                }
            }
            Command::Exit => {}
        }
    }

    /// Puts a queue among those that are run.
    fn wake(&mut self, id: QueueId) -> Option<&mut Entry> {
        if let Some(entry) = self.idle.remove(&id) {
            self.awake.push(entry);
            return self.awake.last_mut();
        }
        self.awake.iter_mut().find(|entry| entry.id == id)
    }

    fn let_go_of_stopped(&mut self) {
        let over = |entry: &mut Entry| entry.stopping.is_some() && entry.task.in_flight() == 0;
        for Entry { stopping, mut task, .. } in self.awake.extract_if(.., over) {
            let Some(detached) = stopping else { continue };
            let left = task.leave();
            // Guest memory that it holds is to be gone when the session goes on, but for that of what it leaves.
            drop(task);
            // Nobody waits any more if the session gave up on a store that did not answer.
            let _gone = detached.send(left);
        }
    }

    /// Arms all queues that are awake and sets aside those with nothing in flight; there has been nothing to do `since`.
    fn arm_all(&mut self, since: Instant) -> Armed {
        let mut armed = Armed::Sleep;
        let idle = self.awake.extract_if(.., |entry| match entry.task.arm() {
            Armed::Sleep => {
                let is_at_rest = entry.task.in_flight() == 0;
                // What ends the sleep of a dormant one says nothing of when requests come.
                if is_at_rest || !entry.task.is_dormant() {
                    entry.patience.sleeps(since);
                }
                is_at_rest && entry.stopping.is_none()
            }
            Armed::Work => {
                armed = Armed::Work;
                false
            }
        });
        self.idle.extend(idle.map(|entry| (entry.id, entry)));
        armed
    }

    /// Starts what is left in the ring and sleeps, unless there is a command.
    fn sleep(&mut self) {
        if !self.inbox.fall_asleep() {
            self.start();
            return;
        }
        if let Err(error) = self.ring.wait() {
            // The ring is broken, and what is in it lost to us; queues that do not need it go on.
            log::error!("a worker cannot wait for completions: {error}");
            std::thread::sleep(BROKEN_RING_PAUSE);
        }
        self.inbox.woke_up();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::backend::contract::Guest;
    use crate::backend::file::{Cache, FileOptions, FileStore};
    use crate::backend::uring::Waker;
    use crate::backend::{Backend, Io, Op, Store};
    use crate::config::PollPolicy;

    /// A queue whose driver has one read in flight all the time, until it has had `left` more.
    struct OneAtATime {
        backend: Box<dyn Backend>,
        guest: Guest,
        left: u32,
        inbox: Arc<Inbox>,
        given_up: Arc<AtomicBool>,
    }

    impl QueueTask for OneAtATime {
        fn hurry(&mut self) {}

        fn run(&mut self, _: Share) -> Round {
            let mut done = Vec::new();
            self.backend.reap(&mut done);
            assert!(done.iter().all(|done| done.result.is_ok()));
            if self.backend.in_flight() > 0 || self.left == 0 {
                return if done.is_empty() { Round::Nothing } else { Round::Progress };
            }
            self.left -= 1;
            if self.left == 0 {
                self.inbox.push(Command::Exit);
            }
            let buffers = self.guest.buffers(&[(0, 4096)]);
            let read = Io::new(0, Op::Read { offset: 0 }, buffers);
            assert!(self.backend.submit(Box::new(read)).is_ok());
            Round::Progress
        }

        fn arm(&mut self) -> Armed {
            Armed::Sleep
        }

        fn kicked(&mut self) {}

        fn refresh(&mut self) {}

        fn stop(&mut self) {}

        fn in_flight(&self) -> usize {
            self.backend.in_flight()
        }

        fn is_dormant(&self) -> bool {
            self.backend.is_dormant()
        }

        fn leave(&mut self) -> Left {
            Left::default()
        }

        fn give_up(&mut self, _: &str) {
            self.given_up.store(true, Ordering::SeqCst);
            self.inbox.push(Command::Exit);
        }
    }

    #[test]
    fn a_read_is_started_and_waited_for_in_one_system_call() {
        const READS: u32 = 200;
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions {
            path: dir.path().join("image"),
            read_only: false,
            cache: Cache::None,
            size: Some(4096),
            fixed_buffers: false,
            iopoll: false,
        };
        let store = FileStore::open(&options).unwrap();
        let waker = Waker::new().unwrap();
        let ring = Rc::new(Uring::new(&waker).unwrap());
        let inbox = Arc::new(Inbox::new(waker));
        let (id, attached) = (QueueId(0), crossbeam::channel::bounded(1).0);
        let given_up = Arc::new(AtomicBool::new(false));
        let build = {
            let (inbox, given_up) = (Arc::clone(&inbox), Arc::clone(&given_up));
            let task = move |ring: &Rc<Uring>| -> io::Result<Box<dyn QueueTask>> {
                let backend = store.attach(ring, 0)?;
                Ok(Box::new(OneAtATime { backend, guest: Guest::new(), left: READS, inbox, given_up }))
            };
            Box::new(task)
        };
        let doorbell = Arc::new(Doorbell::new(id, Arc::clone(&inbox)));
        inbox.push(Command::Attach { id, doorbell, build, poll: PollPolicy::Never, attached });
        Worker::new(Arc::clone(&inbox), Rc::clone(&ring)).run();
        assert!(!given_up.load(Ordering::SeqCst));
        // Besides: that a completion was not there yet when the call ended, now and then.
        let calls = ring.system_calls();
        assert!(calls <= u64::from(READS) + u64::from(READS) / 10, "{calls} calls for {READS} reads");
    }
}
