//! One queue's way to a store that is limited.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{Limiter, Moment, until};
use crate::backend::timer::Asleep;
use crate::backend::uring::{Client, Uring};
use crate::backend::{Backend, Completion, Full, Io};

/// The longest sleep, after which it looks again: a timer is not taken back, and whoever takes down the ring waits for it.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

pub(super) struct LimitedBackend {
    inner: Box<dyn Backend>,
    limiter: Arc<Limiter>,
    ring: Rc<Uring>,
    timer: Client<Asleep<()>>,
    /// The next to go, which has its place in line, and when its turn is. Nothing else is taken before it has gone.
    head: Option<(Box<Io>, Moment)>,
    /// Whether somebody waits for the end of what is in flight: it goes before its turn then, and is paid for later.
    stopping: bool,
    /// Whether a timer was started that the ring has not been told of.
    queued: bool,
}

impl LimitedBackend {
    pub(super) fn new(inner: Box<dyn Backend>, limiter: &Arc<Limiter>, ring: &Rc<Uring>) -> io::Result<Self> {
        let (limiter, timer) = (Arc::clone(limiter), Client::new(ring, ())?);
        Ok(Self { inner, limiter, ring: Rc::clone(ring), timer, head: None, stopping: false, queued: false })
    }

    /// Lets the head go if it may and the store has room for it; says whether it went.
    fn let_go(&mut self) -> bool {
        let Some((io, when)) = self.head.take() else { return false };
        let now = self.limiter.now();
        if when > now && !self.stopping {
            self.head = Some((io, when));
            self.sleep(until(when, now));
            return false;
        }
        match self.inner.submit(io) {
            Ok(()) => true,
            Err(Full(io)) => {
                self.head = Some((io, when));
                false
            }
        }
    }

    /// Has the worker woken after so long at the latest, if nothing does yet.
    fn sleep(&mut self, so_long: Duration) {
        // Not all rings have room for it: this one's next completion has the worker look again then.
        if self.timer.in_flight() == 0 {
            self.queued |= self.timer.start(Asleep::new((), so_long.min(LONGEST_SLEEP))).is_ok();
        }
    }
}

impl Backend for LimitedBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        if self.head.is_some() {
            self.timer.reap(|_| ());
            if !self.let_go() {
                return Err(Full(io));
            }
        }
        let now = self.limiter.now();
        let when = self.limiter.take(&io, now);
        self.head = Some((io, when));
        self.let_go();
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.timer.in_flight() > 0 {
            self.timer.reap(|_| ());
        }
        self.inner.reap(done);
        self.queued = false;
        let went = self.let_go();
        if (went || self.queued)
            && let Err(error) = self.ring.submit()
        {
            log::error!("io_uring: {error}");
        }
        if went {
            // For stores that have done what they are given when they are given it.
            self.inner.reap(done);
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + usize::from(self.head.is_some())
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.inner.stop();
    }

    fn is_dormant(&self) -> bool {
        self.head.is_some() && self.timer.in_flight() > 0 && self.inner.in_flight() == 0
    }
}
