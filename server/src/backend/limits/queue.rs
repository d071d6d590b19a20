//! One queue's way to a store that is limited.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::Limiter;
use crate::backend::hold::PutOff;
use crate::backend::timer::{Alarm, Moment};
use crate::backend::uring::Uring;
use crate::backend::{Backend, Completion, Full, Io};

pub(super) struct LimitedBackend {
    inner: Box<dyn Backend>,
    limiter: Arc<Limiter>,
    ring: Rc<Uring>,
    alarm: Alarm,
    /// The next to go, which has its place in line, and when its turn is. Nothing else is taken before it has gone.
    head: Option<(Box<Io>, Moment)>,
    /// Whether somebody waits for the end of what is in flight: it goes before its turn then, and is paid for later.
    hastening: bool,
    /// Whether a timer was started that the ring has not been told of.
    queued: bool,
}

impl LimitedBackend {
    pub(super) fn new(inner: Box<dyn Backend>, limiter: &Arc<Limiter>, ring: &Rc<Uring>) -> io::Result<Self> {
        let (limiter, alarm) = (Arc::clone(limiter), Alarm::new(ring)?);
        Ok(Self { inner, limiter, ring: Rc::clone(ring), alarm, head: None, hastening: false, queued: false })
    }

    /// Lets the head go if it may and the store has room for it; says whether it went.
    fn let_go(&mut self) -> bool {
        let Some((io, when)) = self.head.take() else { return false };
        let now = self.limiter.clock.now();
        if when > now && !self.hastening {
            self.head = Some((io, when));
            self.queued |= self.alarm.set(when, now);
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
}

impl Backend for LimitedBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        if self.head.is_some() {
            self.alarm.look();
            if !self.let_go() {
                return Err(Full(io));
            }
        }
        let now = self.limiter.clock.now();
        let when = self.limiter.take(&io, now);
        self.head = Some((io, when));
        self.let_go();
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.alarm.look();
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

    fn hasten(&mut self) {
        self.hastening = true;
        self.inner.hasten();
    }

    fn stop(&mut self) {
        self.hastening = true;
        self.inner.stop();
    }

    fn put_off(&mut self, unfinished: &mut Vec<PutOff>) {
        self.inner.put_off(unfinished);
    }

    fn is_dormant(&self) -> bool {
        let waits = self.head.is_some() && self.inner.in_flight() == 0;
        (self.head.is_none() || self.alarm.is_set()) && (waits || self.inner.is_dormant())
    }
}
