//! One queue's way to a store through what goes wrong.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use virtio::memory::PinnedBuffers;

use super::timers::Timers;
use super::{Fate, Faults};
use crate::backend::uring::Uring;
use crate::backend::{Backend, Completion, Full, Io, Op};

/// An operation that was judged.
struct Judged {
    io: Box<Io>,
    latency: Duration,
    fate: Fate,
}

pub(super) struct FaultyBackend {
    inner: Box<dyn Backend>,
    faults: Arc<Faults>,
    queue: u16,
    ring: Rc<Uring>,
    /// Operations that wait; none does where the kernel has no ring.
    asleep: Option<Timers<Judged>>,
    /// Operations that were judged and for which there was no room.
    held: VecDeque<Judged>,
    /// Operations that a rule holds, its number, and how often it had let go of some before.
    stuck: Vec<(Box<Io>, u32, u64)>,
    /// What torn operations were: token, operation, buffers.
    torn: Vec<(u16, Op, PinnedBuffers)>,
    done: Vec<Completion>,
    reaped: Vec<Completion>,
    /// Whether something was started that the ring has not been told of.
    queued: bool,
    /// Whether nothing is to be held any more.
    stopping: bool,
}

impl FaultyBackend {
    pub(super) fn new(inner: Box<dyn Backend>, faults: &Arc<Faults>, queue: u16, ring: &Rc<Uring>) -> Self {
        let asleep = Timers::new(ring).inspect_err(|error| log::warn!("no operation will be late: {error}")).ok();
        Self {
            inner,
            faults: Arc::clone(faults),
            queue,
            ring: Rc::clone(ring),
            asleep,
            held: VecDeque::new(),
            stuck: Vec::new(),
            torn: Vec::new(),
            done: Vec::new(),
            reaped: Vec::new(),
            queued: false,
            stopping: false,
        }
    }

    /// Has an operation wait, or meet its fate; gives it back if there is no room for it.
    fn go_on(&mut self, judged: Judged) -> Result<(), Judged> {
        if judged.latency > Duration::ZERO
            && !self.stopping
            && let Some(asleep) = &mut self.asleep
        {
            let latency = judged.latency;
            return asleep.start(judged, latency).map(|()| self.queued = true);
        }
        let Judged { mut io, fate, .. } = judged;
        match fate {
            Fate::Failed(errno) => self.end(io, Err(io::Error::from_raw_os_error(errno))),
            Fate::Lost => self.end(io, Ok(())),
            Fate::Stuck { .. } if self.stopping => self.give_up(io),
            Fate::Stuck { rule, released } => self.stuck.push((io, rule, released)),
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

    /// Ends what was stuck, for somebody waits for that.
    fn give_up(&mut self, io: Box<Io>) {
        self.end(io, Err(io::Error::from_raw_os_error(libc::EIO)));
    }

    /// Goes on with what rules hold no more.
    fn let_go(&mut self) {
        let faults = &self.faults;
        let free = self.stuck.extract_if(.., |(_, rule, released)| faults.lets_go(*rule, *released));
        self.held.extend(free.map(|(io, ..)| Judged { io, latency: Duration::ZERO, fate: Fate::Done }));
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
        let (latency, fate) = self.faults.judge(self.queue, &io);
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
                asleep.reap(|judged| woken.push(judged));
            }
            self.held.extend(woken.into_iter().map(|judged| Judged { latency: Duration::ZERO, ..judged }));
            self.let_go();
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
        let asleep = self.asleep.as_ref().map_or(0, Timers::in_flight);
        self.inner.in_flight() + asleep + self.held.len() + self.stuck.len() + self.done.len()
    }

    /// What waits is early. What is stuck stays so.
    fn hasten(&mut self) {
        self.asleep.iter_mut().for_each(Timers::hurry);
        self.inner.hasten();
    }

    /// Nobody waits for what goes wrong on purpose.
    fn stop(&mut self) {
        self.stopping = true;
        self.asleep.iter_mut().for_each(Timers::hurry);
        for (io, ..) in mem::take(&mut self.stuck) {
            self.give_up(io);
        }
        self.inner.stop();
    }

    fn is_dormant(&self) -> bool {
        let asleep = self.asleep.as_ref().map_or(0, Timers::in_flight);
        let waits = self.inner.in_flight() == 0 && asleep + self.stuck.len() > 0;
        self.held.is_empty() && self.done.is_empty() && (waits || self.inner.is_dormant())
    }
}
