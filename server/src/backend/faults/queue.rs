//! One queue's way to a store through what goes wrong.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use virtio::memory::PinnedBuffers;

use super::{Fate, Rules};
use crate::backend::timer::Asleep;
use crate::backend::uring::{Client, Uring};
use crate::backend::{Backend, Completion, Full, Io, Op};

/// An operation that was judged.
struct Judged {
    io: Box<Io>,
    latency: Duration,
    fate: Fate,
}

pub(super) struct FaultyBackend {
    inner: Box<dyn Backend>,
    rules: Arc<Rules>,
    ring: Rc<Uring>,
    /// Operations that wait, if any ever do.
    asleep: Option<Client<Asleep<Judged>>>,
    /// Operations that were judged and for which there was no room.
    held: VecDeque<Judged>,
    /// What torn operations were: token, operation, buffers.
    torn: Vec<(u16, Op, PinnedBuffers)>,
    done: Vec<Completion>,
    reaped: Vec<Completion>,
    /// Whether something was started that the ring has not been told of.
    queued: bool,
}

impl FaultyBackend {
    pub(super) fn new(inner: Box<dyn Backend>, rules: &Arc<Rules>, ring: &Rc<Uring>) -> io::Result<Self> {
        let asleep = if rules.have_latency() { Some(Client::new(ring, ())?) } else { None };
        Ok(Self {
            inner,
            rules: Arc::clone(rules),
            ring: Rc::clone(ring),
            asleep,
            held: VecDeque::new(),
            torn: Vec::new(),
            done: Vec::new(),
            reaped: Vec::new(),
            queued: false,
        })
    }

    /// Has an operation wait, or meet its fate; gives it back if there is no room for it.
    fn go_on(&mut self, judged: Judged) -> Result<(), Judged> {
        if judged.latency > Duration::ZERO
            && let Some(asleep) = &mut self.asleep
        {
            let latency = judged.latency;
            let started = asleep.start(Asleep::new(judged, latency));
            return started.map(|()| self.queued = true).map_err(Asleep::wake);
        }
        let Judged { mut io, fate, .. } = judged;
        match fate {
            Fate::Failed(errno) => self.end(io, Err(io::Error::from_raw_os_error(errno))),
            Fate::Lost => self.end(io, Ok(())),
            Fate::Done | Fate::Torn(_) => {
                if let Fate::Torn(bytes) = fate {
                    self.tear(&mut io, bytes);
                }
                if let Err(Full(mut io)) = self.inner.submit(io) {
                    self.mend(&mut io);
                    return Err(Judged { io, latency: Duration::ZERO, fate });
                }
                self.queued = true;
            }
        }
        Ok(())
    }

    fn end(&mut self, io: Box<Io>, result: Result<(), io::Error>) {
        self.done.push(Completion { io, result });
    }

    /// Leaves the first bytes of an operation that changes something.
    fn tear(&mut self, io: &mut Io, bytes: u64) {
        let mut first = PinnedBuffers::default();
        io.buffers.part(0, bytes, &mut first);
        self.torn.push((io.token, io.op, mem::replace(&mut io.buffers, first)));
        match &mut io.op {
            Op::Discard { len, .. } | Op::WriteZeroes { len, .. } => *len = bytes,
            _ => {}
        }
    }

    /// Makes an operation what it was before it was torn, if it was.
    fn mend(&mut self, io: &mut Io) {
        if let Some(index) = self.torn.iter().position(|(token, ..)| *token == io.token) {
            (_, io.op, io.buffers) = self.torn.swap_remove(index);
        }
    }

    /// Tries again with those that were held, in their order.
    fn go_on_with_held(&mut self) {
        while let Some(judged) = self.held.pop_front() {
            if let Err(judged) = self.go_on(judged) {
                self.held.push_front(judged);
                break;
            }
        }
    }
}

impl Backend for FaultyBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        // Judged once: what is given back here has not been.
        if !self.held.is_empty() {
            return Err(Full(io));
        }
        let (latency, fate) = self.rules.judge(&io);
        if let Err(judged) = self.go_on(Judged { io, latency, fate }) {
            self.held.push_back(judged);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut reaped = mem::take(&mut self.reaped);
        // Again, for stores that have done what they are given when they are given it.
        loop {
            self.queued = false;
            let mut woken = Vec::new();
            if let Some(asleep) = &mut self.asleep {
                asleep.reap(|asleep| woken.push(asleep.wake()));
            }
            self.held.extend(woken.into_iter().map(|judged| Judged { latency: Duration::ZERO, ..judged }));
            self.go_on_with_held();
            self.inner.reap(&mut reaped);
            for mut completion in reaped.drain(..) {
                self.mend(&mut completion.io);
                self.done.push(completion);
            }
            if !self.queued {
                break;
            }
            if let Err(error) = self.ring.submit() {
                log::error!("io_uring: {error}");
            }
        }
        self.reaped = reaped;
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        let asleep = self.asleep.as_ref().map_or(0, Client::in_flight);
        self.inner.in_flight() + asleep + self.held.len() + self.done.len()
    }
}
