//! One queue's way to a store that is elsewhere.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::{io, mem};

use super::Wire;
use crate::backend::hold::PutOff;
use crate::backend::timer::{Alarm, Moment};
use crate::backend::uring::Uring;
use crate::backend::{Backend, Completion, Full, Io, Op};

/// Nanoseconds in which a message arrives soon: several times those by which a sleeper is woken late.
const NEAR: Moment = 1_000_000;

pub(super) struct DistantBackend {
    inner: Box<dyn Backend>,
    wire: Arc<Wire>,
    ring: Rc<Uring>,
    alarm: Alarm,
    /// Requests on their way, and when they arrive: the first to arrive first.
    requests: VecDeque<(Moment, Box<Io>)>,
    /// Responses on their way, the same.
    responses: VecDeque<(Moment, Completion)>,
    reaped: Vec<Completion>,
    /// How many bytes the data of those are that the store has: it may consume the buffers.
    data: Vec<(u16, u64)>,
    /// Whether somebody waits for the end of what is in flight: all arrive at once then.
    hastening: bool,
}

impl DistantBackend {
    pub(super) fn new(inner: Box<dyn Backend>, wire: &Arc<Wire>, ring: &Rc<Uring>) -> io::Result<Self> {
        Ok(Self {
            inner,
            wire: Arc::clone(wire),
            ring: Rc::clone(ring),
            alarm: Alarm::new(ring)?,
            requests: VecDeque::new(),
            responses: VecDeque::new(),
            reaped: Vec::new(),
            data: Vec::new(),
            hastening: false,
        })
    }

    /// Gives the store what has arrived there; says whether that was anything.
    fn arrive(&mut self, now: Moment) -> bool {
        let mut any = false;
        while let Some((at, io)) = arrived(&mut self.requests, now, self.hastening) {
            let (token, data) = (io.token, io.buffers.len());
            let is_read = matches!(io.op, Op::Read { .. });
            if let Err(Full(io)) = self.inner.submit(io) {
                self.requests.push_front((at, io));
                break;
            }
            if is_read {
                self.data.push((token, data));
            }
            any = true;
        }
        any
    }

    /// Sends back what the store has done.
    fn respond(&mut self, now: Moment) {
        let mut reaped = mem::take(&mut self.reaped);
        self.inner.reap(&mut reaped);
        for completion in reaped.drain(..) {
            let known = self.data.iter().position(|(token, _)| *token == completion.io.token);
            let data = known.map_or(0, |at| self.data.swap_remove(at).1);
            let at = self.wire.response(completion.io.op, data, now);
            let at = self.responses.back().map_or(at, |(before, _)| at.max(*before));
            self.responses.push_back((at, completion));
        }
        self.reaped = reaped;
    }

    /// Has the worker look again when the next message arrives. What is there and waits for room goes when something has
    /// completed. Says whether the ring has to be told of it.
    fn set_alarm(&mut self, now: Moment) -> bool {
        let (request, response) = (self.requests.front().map(|next| next.0), self.responses.front().map(|next| next.0));
        let next = request.into_iter().chain(response).filter(|at| *at > now).min();
        next.is_some_and(|next| self.alarm.set(next, now))
    }
}

/// Takes a message that has arrived.
fn arrived<T>(messages: &mut VecDeque<(Moment, T)>, now: Moment, hastening: bool) -> Option<(Moment, T)> {
    let (at, _) = messages.front()?;
    if *at <= now || hastening { messages.pop_front() } else { None }
}

impl DistantBackend {
    /// When the next message arrives, which the worker may sleep for; `None` if that is none of them.
    fn next_arrival(&self) -> Option<Moment> {
        let (request, response) = (self.requests.front().map(|next| next.0), self.responses.front().map(|next| next.0));
        request.into_iter().chain(response).min().filter(|_| self.alarm.is_set())
    }
}

impl Backend for DistantBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        let credits = self.wire.fabric.credits.map_or(usize::MAX, |credits| credits.get().into());
        if self.in_flight() >= credits {
            return Err(Full(io));
        }
        let now = self.wire.clock.now();
        let at = self.wire.request(&io, now);
        let at = self.requests.back().map_or(at, |(before, _)| at.max(*before));
        self.requests.push_back((at, io));
        self.set_alarm(now);
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.alarm.look();
        if self.in_flight() == 0 {
            return;
        }
        let now = self.wire.clock.now();
        self.respond(now);
        // Again, for stores that have done what they are given when they are given it.
        let mut queued = self.arrive(now);
        if queued {
            self.respond(now);
        }
        while let Some((_, completion)) = arrived(&mut self.responses, now, self.hastening) {
            done.push(completion);
        }
        queued |= self.set_alarm(now);
        if queued && let Err(error) = self.ring.submit() {
            log::error!("io_uring: {error}");
        }
    }

    fn in_flight(&self) -> usize {
        self.requests.len() + self.inner.in_flight() + self.responses.len()
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

    /// What is near is looked for, if the policy says so: a sleeper is woken late, which would be a part of its time.
    fn is_dormant(&self) -> bool {
        let far = |next| next > self.wire.clock.now().saturating_add(NEAR);
        let others = self.inner.in_flight() == 0 || self.inner.is_dormant();
        others && self.next_arrival().map_or(self.in_flight() > 0 && self.inner.is_dormant(), far)
    }
}
