//! What is left for a worker to do.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Sender;
use crossbeam::queue::SegQueue;

use super::wakeup::{Awake, Rung};
use super::{Left, TaskBuilder};
use crate::backend::uring::Waker;
use crate::config::PollPolicy;

/// The name of a queue among all that were ever attached to a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct QueueId(pub(super) u64);

/// What a session wants of a worker.
pub(super) enum Command {
    /// Serve this queue.
    Attach {
        id: QueueId,
        doorbell: Arc<Doorbell>,
        build: TaskBuilder,
        poll: PollPolicy,
        attached: Sender<io::Result<()>>,
    },
    /// The driver kicked it, at this time.
    Kick(QueueId, Instant),
    /// Guest memory changed under it.
    Refresh(QueueId),
    /// Stop it, send what it leaves when nothing is in flight any more, and forget it.
    Detach { id: QueueId, detached: Sender<Left> },
    /// It will not go on: what it has in flight may fail rather than take long.
    Hurry(QueueId),
    /// End the thread.
    Exit,
}

/// A worker's letter box.
pub(super) struct Inbox {
    commands: SegQueue<Command>,
    awake: Awake,
    waker: Waker,
}

impl Inbox {
    pub(super) fn new(waker: Waker) -> Self {
        Self { commands: SegQueue::new(), awake: Awake::default(), waker }
    }

    /// Leaves a command, and wakes the worker if it sleeps.
    pub(super) fn push(&self, command: Command) {
        self.commands.push(command);
        if self.awake.must_wake() {
            self.waker.wake();
        }
    }

    /// The oldest command. One that is left just now may be seen by the next call only: to look costs a worker that is awake
    /// no barrier, and one that falls asleep looks again.
    #[inline]
    pub(super) fn pop(&self) -> Option<Command> {
        if self.commands.is_empty() { None } else { self.commands.pop() }
    }

    /// Whether the worker may sleep; the next command then wakes it.
    pub(super) fn fall_asleep(&self) -> bool {
        self.awake.fall_asleep(|| !self.commands.is_empty())
    }

    pub(super) fn woke_up(&self) {
        self.awake.woke_up();
    }
}

/// Where a driver's kicks of one queue arrive, from whichever thread hears of them.
pub(crate) struct Doorbell {
    id: QueueId,
    inbox: Arc<Inbox>,
    rung: Rung,
}

impl Doorbell {
    pub(super) fn new(id: QueueId, inbox: Arc<Inbox>) -> Self {
        Self { id, inbox, rung: Rung::default() }
    }

    /// Has the queue run soon. However often it is rung, one command waits for the worker: a driver that only kicks
    /// fills nobody's memory.
    pub(crate) fn ring(&self) {
        if self.rung.ring() {
            self.inbox.push(Command::Kick(self.id, Instant::now()));
        }
    }

    /// The worker has heard, and will look at the queue after this.
    pub(super) fn answered(&self) {
        self.rung.answer();
    }
}
