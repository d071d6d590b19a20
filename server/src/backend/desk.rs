//! The queue of a store whose operations other threads do: where it hands them in, and where they leave what is done.

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::uring::{Elsewhere, Uring, Waker};
use super::{Backend, Completion, Full, Io};

/// How long operations go on after their queue was stopped for good; those that were not begun by then fail.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Operations in flight on one backend, at most, as on a ring.
const SLOTS: usize = 1024;

/// Where threads leave what they have done for one queue.
#[derive(Debug)]
pub(super) struct Desk {
    papers: Mutex<Papers>,
    /// Nothing is left to be done.
    over: Condvar,
    waker: Waker,
}

#[derive(Debug, Default)]
struct Papers {
    /// Operations that a thread has, or that wait for one.
    open: usize,
    done: Vec<Completion>,
    /// Nobody will take what is done.
    abandoned: bool,
    /// When what has not been begun fails.
    until: Option<Instant>,
}

impl Desk {
    fn papers(&self) -> MutexGuard<'_, Papers> {
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does an operation that was handed in here, unless nobody wants it any more.
    pub(super) fn receive(&self, io: Box<Io>, execute: impl FnOnce(&Io) -> io::Result<()>) {
        let mut completion = Some(Completion { result: Ok(()), io });
        let (abandoned, until) = {
            let papers = self.papers();
            (papers.abandoned, papers.until)
        };
        if let Some(completion) = &mut completion
            && !abandoned
        {
            completion.result = if until.is_some_and(|until| until <= Instant::now()) {
                Err(io::Error::from_raw_os_error(libc::EIO))
            } else {
                execute(&completion.io)
            };
        }
        let mut papers = self.papers();
        if papers.abandoned {
            // Its memory is free before it counts as over.
            drop(completion.take());
        }
        papers.open = papers.open.saturating_sub(1);
        // One wake is enough for all that is there when the worker comes.
        let wake = if papers.abandoned { papers.open == 0 } else { papers.done.is_empty() };
        papers.done.extend(completion);
        if papers.open == 0 {
            self.over.notify_all();
        }
        drop(papers);
        if wake {
            self.waker.wake();
        }
    }
}

impl Elsewhere for Desk {
    fn is_over(&self) -> bool {
        self.papers().open == 0
    }

    fn wait_until(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.over.wait_timeout_while(self.papers(), left, |papers| papers.open > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.open == 0
    }
}

/// One queue's access to such threads. `F` hands an operation in; whoever gets it owes the desk its end.
pub(super) struct Queue<F> {
    hand_in: F,
    desk: Arc<Desk>,
    ring: Rc<Uring>,
    in_flight: usize,
}

impl<F: Fn(Box<Io>, Arc<Desk>)> Queue<F> {
    /// A queue of this thread.
    pub(super) fn new(ring: &Rc<Uring>, hand_in: F) -> Self {
        let desk = Arc::new(Desk { papers: Mutex::default(), over: Condvar::new(), waker: ring.waker().clone() });
        Self { hand_in, desk, ring: Rc::clone(ring), in_flight: 0 }
    }
}

impl<F: Fn(Box<Io>, Arc<Desk>)> Backend for Queue<F> {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        if self.in_flight == SLOTS {
            return Err(Full(io));
        }
        self.desk.papers().open += 1;
        (self.hand_in)(io, Arc::clone(&self.desk));
        self.in_flight += 1;
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let before = done.len();
        done.append(&mut self.desk.papers().done);
        self.in_flight = self.in_flight.saturating_sub(done.len() - before);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn stop(&mut self) {
        self.desk.papers().until.get_or_insert_with(|| Instant::now() + STOP_LIMIT);
    }
}

impl<F> Drop for Queue<F> {
    fn drop(&mut self) {
        let mut papers = self.desk.papers();
        papers.abandoned = true;
        papers.done.clear();
        if papers.open > 0 {
            drop(papers);
            self.ring.leave(Arc::clone(&self.desk) as Arc<dyn Elsewhere>);
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio::memory::PinnedBuffers;

    use super::*;
    use crate::backend::Op;

    #[test]
    fn what_was_not_begun_in_time_fails_once_the_queue_is_stopped() {
        let ring = Rc::new(Uring::without_kernel(&Waker::new().unwrap()));
        let mut queue = Queue::new(&ring, |io, desk| desk.receive(io, |_| Ok(())));
        let flush = || Box::new(Io::new(0, Op::Flush, PinnedBuffers::default()));
        let results = |queue: &mut Queue<_>| {
            queue.submit(flush()).unwrap();
            let mut done = Vec::new();
            queue.reap(&mut done);
            done.pop().unwrap().result.map_err(|error| error.raw_os_error())
        };
        assert_eq!(results(&mut queue), Ok(()));
        queue.stop();
        let until = queue.desk.papers().until.unwrap();
        assert_eq!(results(&mut queue), Ok(()), "there is some time left");
        queue.stop();
        assert_eq!(queue.desk.papers().until, Some(until), "it does not begin anew");
        queue.desk.papers().until = Some(Instant::now());
        assert_eq!(results(&mut queue), Err(Some(libc::EIO)));
    }
}
