//! One queue's way to a store that may fail, and back to it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use virtio::memory::PinnedBuffers;

use super::{Counted, Held, OnError, PutOff};
use crate::backend::timer::Asleep;
use crate::backend::uring::{Client, Uring};
use crate::backend::{Backend, Completion, Full, Io, Op};

/// How long an operation waits when it has failed for the first time; each time after that twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// How long it waits at most. Less than a ring waits for its timers at its end.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Copies kept to be used again.
const MAX_SPARE: usize = 64;

/// An operation that was taken.
struct Taken {
    /// As it came: the store below is given a copy, of which it may use up the list of buffers.
    io: Box<Io>,
    /// How often they had been sent again when this was sent.
    resumed: u64,
    /// If it has failed.
    trouble: Option<Trouble>,
}

/// An operation's bad luck so far.
struct Trouble {
    error: io::Error,
    since: Instant,
    pause: Duration,
    counted: Counted,
}

/// An operation that waits.
struct Waiting {
    token: u16,
    /// Until then, if not until it is told to go on.
    until: Option<Instant>,
}

pub(super) struct HoldBackend {
    inner: Box<dyn Backend>,
    on_error: OnError,
    held: Arc<Held>,
    /// Our number among those who hear of a resume.
    number: u64,
    /// The resumes that were heard of.
    resumed: u64,
    ring: Rc<Uring>,
    /// By token; tokens are small.
    taken: Vec<Option<Taken>>,
    /// Operations in `taken`.
    open: usize,
    waiting: Vec<Waiting>,
    /// Tokens of those that are to be sent again.
    unsent: VecDeque<u16>,
    /// What wakes this thread when the first pause is over.
    alarms: Option<Client<Asleep<Instant>>>,
    alarm: Option<Instant>,
    /// Nothing waits any more.
    stopping: bool,
    done: Vec<Completion>,
    reaped: Vec<Completion>,
    #[expect(clippy::vec_box, reason = "the boxes are what is used again")]
    spare: Vec<Box<Io>>,
    /// Whether something was started that the ring has not been told of.
    queued: bool,
}

impl HoldBackend {
    pub(super) fn new(
        inner: Box<dyn Backend>,
        on_error: OnError,
        held: &Arc<Held>,
        ring: &Rc<Uring>,
    ) -> io::Result<Self> {
        let alarms = match on_error {
            OnError::Hold => None,
            OnError::Retry(_) => Some(Client::new(ring, ())?),
        };
        Ok(Self {
            inner,
            on_error,
            held: Arc::clone(held),
            number: held.join(ring.waker()),
            resumed: held.resumed(),
            ring: Rc::clone(ring),
            taken: Vec::new(),
            open: 0,
            waiting: Vec::new(),
            unsent: VecDeque::new(),
            alarms,
            alarm: None,
            stopping: false,
            done: Vec::new(),
            reaped: Vec::new(),
            spare: Vec::new(),
            queued: false,
        })
    }

    /// Gives the store below a copy; whether it has room.
    fn send(&mut self, io: &Io) -> bool {
        let new = || Box::new(Io::new(0, Op::Flush, PinnedBuffers::default()));
        let mut copy = self.spare.pop().unwrap_or_else(new);
        (copy.token, copy.op) = (io.token, io.op);
        io.buffers.part(0, io.buffers.len(), &mut copy.buffers);
        match self.inner.submit(copy) {
            Ok(()) => {
                self.queued = true;
                true
            }
            Err(Full(copy)) => {
                self.put_back(copy);
                false
            }
        }
    }

    fn put_back(&mut self, mut copy: Box<Io>) {
        // It must not keep guest memory.
        copy.buffers.clear();
        if self.spare.len() < MAX_SPARE {
            self.spare.push(copy);
        }
    }

    /// Sends what is to be sent again, as far as there is room.
    fn send_again(&mut self) {
        while let Some(token) = self.unsent.pop_front() {
            let resumed = self.resumed;
            let Some(mut taken) = self.taken.get_mut(usize::from(token)).and_then(Option::take) else { continue };
            taken.resumed = resumed;
            let sent = self.send(&taken.io);
            if let Some(place) = self.taken.get_mut(usize::from(token)) {
                *place = Some(taken);
            }
            if !sent {
                self.unsent.push_front(token);
                break;
            }
        }
    }

    /// The store below is done with an operation.
    fn landed(&mut self, Completion { io, result }: Completion) {
        let token = io.token;
        self.put_back(io);
        let Err(error) = result else { return self.end(token, Some(Ok(()))) };
        if self.stopping || !is_the_storages(&error) {
            return self.end(token, Some(Err(error)));
        }
        let (now, on_error, resumed) = (Instant::now(), self.on_error, self.resumed);
        let Some(taken) = self.taken.get_mut(usize::from(token)).and_then(Option::as_mut) else { return };
        let trouble = taken.trouble.as_ref();
        let (since, pause) = trouble.map_or((now, FIRST_PAUSE), |trouble| (trouble.since, trouble.pause));
        let until = match on_error {
            OnError::Hold => None,
            OnError::Retry(deadline) => {
                let end = since.checked_add(deadline);
                if end.is_some_and(|end| end <= now) {
                    self.held.is_over(&error);
                    return self.end(token, Some(Err(error)));
                }
                let again = now.checked_add(pause);
                again.map(|again| end.map_or(again, |end| again.min(end)))
            }
        };
        // It was on its way when they were told to go on, and may have failed before.
        let missed = taken.resumed != resumed;
        let counted = taken.trouble.take().map_or_else(|| Counted::new(&self.held), |trouble| trouble.counted);
        // Whoever hears of it finds it counted.
        if !missed {
            self.held.tell(&error);
        }
        taken.trouble = Some(Trouble { error, since, pause: pause.saturating_mul(2).min(LONGEST_PAUSE), counted });
        if missed {
            self.unsent.push_back(token);
        } else {
            self.waiting.push(Waiting { token, until });
        }
    }

    /// Gives an operation back, with the last error that it met if there is no other result.
    fn end(&mut self, token: u16, result: Option<io::Result<()>>) {
        let Some(Taken { io, trouble, .. }) = self.taken.get_mut(usize::from(token)).and_then(Option::take) else {
            return;
        };
        self.open = self.open.saturating_sub(1);
        let result = result.unwrap_or_else(|| trouble.map_or(Ok(()), |trouble| Err(trouble.error)));
        self.done.push(Completion { io, result });
    }

    /// Ends what waits, with the error that it met.
    fn give_up(&mut self) {
        let waiting = mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.token);
        for token in waiting.chain(mem::take(&mut self.unsent)) {
            self.end(token, None);
        }
    }

    /// Finds what has waited long enough.
    fn look_who_waits(&mut self) {
        if self.stopping {
            return self.give_up();
        }
        let resumed = self.held.resumed();
        let told = resumed != self.resumed;
        self.resumed = resumed;
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let over = |waiting: &mut Waiting| told || waiting.until.is_some_and(|until| until <= now);
        self.unsent.extend(self.waiting.extract_if(.., over).map(|waiting| waiting.token));
    }

    /// Sees to it that this thread is awake when the first pause is over.
    fn set_alarm(&mut self) {
        let Some(alarms) = &mut self.alarms else { return };
        alarms.reap(|asleep| {
            let rung = asleep.wake();
            if self.alarm == Some(rung) {
                self.alarm = None;
            }
        });
        let Some(first) = self.waiting.iter().filter_map(|waiting| waiting.until).min() else { return };
        if self.alarm.is_some_and(|alarm| alarm <= first) {
            return;
        }
        let pause = first.saturating_duration_since(Instant::now());
        // With no room for it there are others, and completions, that wake this thread.
        if alarms.start(Asleep::new(first, pause)).is_ok() {
            self.alarm = Some(first);
            alarms.commit();
        }
    }
}

/// Whether an operation failed for something that may be put in order, and not for what it was.
fn is_the_storages(error: &io::Error) -> bool {
    let guests = [libc::EFAULT, libc::EINVAL].map(Some).contains(&error.raw_os_error());
    !guests && !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

impl Backend for HoldBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        // What was taken before goes first.
        if !self.unsent.is_empty() || !self.send(&io) {
            return Err(Full(io));
        }
        let place = usize::from(io.token);
        if self.taken.len() <= place {
            self.taken.resize_with(place.saturating_add(1), || None);
        }
        if let Some(place) = self.taken.get_mut(place) {
            *place = Some(Taken { io, resumed: self.resumed, trouble: None });
            self.open = self.open.saturating_add(1);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut reaped = mem::take(&mut self.reaped);
        // Again, for stores that have done what they are given when they are given it.
        loop {
            self.queued = false;
            self.look_who_waits();
            self.send_again();
            self.inner.reap(&mut reaped);
            reaped.drain(..).for_each(|completion| self.landed(completion));
            if !self.queued {
                break;
            }
            if let Err(error) = self.ring.submit() {
                log::error!("io_uring: {error}");
            }
        }
        self.reaped = reaped;
        self.set_alarm();
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.open + self.done.len()
    }

    fn hasten(&mut self) {
        self.inner.hasten();
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.inner.stop();
    }

    fn put_off(&mut self, unfinished: &mut Vec<PutOff>) {
        let waiting = mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.token);
        for token in waiting.chain(mem::take(&mut self.unsent)) {
            let taken = self.taken.get_mut(usize::from(token)).and_then(Option::take);
            let Some(Taken { io, trouble: Some(trouble), .. }) = taken else { continue };
            self.open = self.open.saturating_sub(1);
            unfinished.push(PutOff { io, _counted: trouble.counted });
        }
    }

    fn is_dormant(&self) -> bool {
        let waits = self.open > 0 && self.inner.in_flight() == 0;
        !self.stopping && self.unsent.is_empty() && self.done.is_empty() && (waits || self.inner.is_dormant())
    }
}

impl Drop for HoldBackend {
    fn drop(&mut self) {
        self.held.leave(self.number);
    }
}
