//! The block device's queues: where virtio's requests meet a store's operations.

mod outcome;
mod service;

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::{io, mem};

use pci::Interrupt;
use virtio::block::{Limits, Operation, Request, SECTOR, SharedConfig, Status, parse};
use virtio::memory::{GuestMemory, MappedQueue, PinnedBuffers, RingMapError};
use virtio::queue::{Armed, Head, Signal, Virtqueue, Written};

use outcome::{end, failure, kind, success};
pub(crate) use service::BlockService;

use crate::backend::hold::PutOff;
use crate::backend::{Backend, Completion, Full, Io, Op, Origin};
use crate::device::QueuePlace;
use crate::metrics::Meter;
use crate::session::Events;
use crate::worker::{Left, QueueTask, Round, Share};

/// Requests that are taken off the ring together, before the first of them is looked into: while one is worked on, the
/// memory of the next is on its way.
const BATCH: usize = 8;
/// Requests of one round where other queues wait for theirs.
const SHARED_ROUND: usize = 4;

/// A queue's memory, which the client may take away and give back while the queue runs: firmware remaps pieces of
/// its RAM under a live disk.
enum Ring<Q: Virtqueue> {
    Mapped(Q),
    /// Where it stood, and what has completed since and could not be given back.
    Lost(Q::Parked, Vec<(Head, Written)>),
    /// Only while it changes from one to the other.
    Changing,
}

/// What a queue leaves that has been stopped with requests which wait for more than their store: `P` is the queue without its
/// memory.
struct Unfinished<P> {
    queue: P,
    /// What has completed, and could not be given back.
    completed: Vec<(Head, Written)>,
    requests: Vec<PutOff>,
}

impl<P> Unfinished<P> {
    /// The queue over its memory, and the requests that it is to go on with.
    fn go_on<Q: Virtqueue<Parked = P>>(self, memory: Q::Memory) -> (Q, Vec<PutOff>) {
        let mut queue = Q::resume(self.queue, memory);
        for (head, written) in self.completed {
            queue.complete(head, written);
        }
        (queue, self.requests)
    }
}

/// One request queue.
struct BlockQueue<Q: Virtqueue> {
    index: u16,
    place: QueuePlace,
    queue: Ring<Q>,
    /// Whether the queue wants to know if all that may be written was.
    in_order: bool,
    memory: GuestMemory,
    /// What the next requests become: as many as are taken off the ring together.
    #[expect(clippy::vec_box, reason = "the boxes go on to the store")]
    batch: Vec<Box<Io>>,
    config: Arc<SharedConfig>,
    /// What requests are checked against: the driver's features do not change while there is a queue.
    limits: Limits,
    backend: Box<dyn Backend>,
    /// Requests that were taken and not given back.
    in_flight: usize,
    /// Operations that the backend had no room for: the next to go.
    stalled: VecDeque<Box<Io>>,
    completions: Vec<Completion>,
    /// Operations to be used again, each with a token of its own.
    #[expect(clippy::vec_box, reason = "the boxes are what is used again")]
    spare: Vec<Box<Io>>,
    /// Operations that there are: one for each entry at most, and one at hand for the next request.
    made: u16,
    interrupt: Arc<dyn Interrupt>,
    events: Arc<Events>,
    /// Whether requests are taken: not when stopped, nor after the driver broke the rules.
    accepting: bool,
    /// Whether it is to come to rest, and what waits to be put off for that.
    resting: bool,
    /// Requests that the backend has given back as it came to rest: they are left to the next task.
    put_off: Vec<PutOff>,
    warned_blank: bool,
    /// Counts what is done here.
    meter: Meter,
}

impl<Q: Virtqueue<Memory: MappedQueue>> BlockQueue<Q> {
    fn take_requests(&mut self, share: Share) -> Round {
        let mut round = Round::Nothing;
        while let Some(io) = self.stalled.pop_front() {
            if let Err(Full(io)) = self.backend.submit(io) {
                self.stalled.push_front(io);
                return round;
            }
            round = Round::Progress;
        }
        // A round takes no more than a queue's size, however fast the driver adds.
        let mut left = match share {
            Share::Whole => usize::from(self.place.size),
            Share::Part => SHARED_ROUND,
        };
        while left > 0 && self.accepting && self.stalled.is_empty() {
            let most = left.min(BATCH);
            let taken = self.fill_batch(most);
            if taken == 0 {
                break;
            }
            round = Round::Progress;
            // Where there were fewer, the ring has no more for now.
            left = if taken < most { 0 } else { left.saturating_sub(most) };
            self.meter.taken();
            let resolved = self.resolve_batch(taken);
            self.start_batch(resolved);
        }
        round
    }

    /// Takes some requests off the ring, `most` of them, and asks for the memory that will be looked at first: that of all
    /// of them is on its way at the same time. Says how many there were.
    #[inline(never)]
    fn fill_batch(&mut self, most: usize) -> usize {
        let Ring::Mapped(queue) = &mut self.queue else { return 0 };
        let mut taken: usize = 0;
        for io in self.batch.get_mut(..most).unwrap_or_default() {
            match queue.pop(&mut self.memory, &mut io.buffers) {
                Ok(Some(head)) => io.origin.head = Some(head),
                Ok(None) => break,
                Err(error) => {
                    self.fault(&error);
                    break;
                }
            }
            taken = taken.wrapping_add(1);
        }
        taken
    }

    /// Finds the buffers of the requests that were taken, as far as they are not known, and asks for their memory. Says of how
    /// many.
    #[inline(never)]
    fn resolve_batch(&mut self, taken: usize) -> usize {
        let Ring::Mapped(queue) = &mut self.queue else { return 0 };
        let mut resolved: usize = 0;
        for io in self.batch.get_mut(..taken).unwrap_or_default() {
            let Some(head) = &io.origin.head else { break };
            if let Err(error) = queue.resolve(head, &mut self.memory, &mut io.buffers) {
                self.fault(&error);
                break;
            }
            resolved = resolved.wrapping_add(1);
        }
        resolved
    }

    /// Starts the first requests that were taken off the ring.
    #[inline(never)]
    fn start_batch(&mut self, resolved: usize) {
        self.limits.capacity = self.config.capacity();
        let before = self.in_flight;
        let mut batch = mem::take(&mut self.batch);
        for io in batch.get_mut(..resolved).unwrap_or_default() {
            self.start(io);
        }
        self.batch = batch;
        let handed_over = self.in_flight.wrapping_sub(before);
        self.meter.started(|| resolved.saturating_sub(handed_over));
    }

    #[inline(always)]
    fn start(&mut self, io: &mut Box<Io>) {
        match parse(&mut io.buffers, &self.limits) {
            Ok(Request::Store { operation: Operation::Read { sector }, written }) => {
                io.op = Op::Read { offset: sector * SECTOR };
                self.perform(io, written);
            }
            Ok(Request::Store { operation, written }) => {
                io.op = self.change(operation);
                self.perform(io, written);
            }
            Ok(Request::Done { status, written }) => self.answer(io, status, written),
            Err(error) => self.fault(&error),
        }
    }

    /// Gives back a request that has not come to the store.
    #[cold]
    fn answer(&mut self, io: &mut Io, status: Status, written: u32) {
        self.meter.answered();
        self.finish(io, status, Written::First(written));
    }

    /// What an operation that is no read is to the store.
    fn change(&self, operation: Operation) -> Op {
        let durable = self.config.writes_are_durable();
        let bytes = |sectors: u32| u64::from(sectors) * SECTOR;
        match operation {
            Operation::Read { sector } => Op::Read { offset: sector * SECTOR },
            Operation::Write { sector } => Op::Write { offset: sector * SECTOR, durable },
            Operation::Flush => Op::Flush,
            Operation::Discard { sector, sectors } => Op::Discard { offset: sector * SECTOR, len: bytes(sectors) },
            Operation::WriteZeroes { sector, sectors, unmap } => {
                Op::WriteZeroes { offset: sector * SECTOR, len: bytes(sectors), unmap, durable }
            }
        }
    }

    /// Has the backend do an operation at once, if it does such things, and gives it back; hands it over otherwise.
    #[inline(always)]
    fn perform(&mut self, io: &mut Box<Io>, written: u32) {
        let since = self.meter.submitted(kind(io.op), io.buffers.len());
        if let Some(result) = self.backend.perform(io) {
            return self.complete(io, result, written);
        }
        io.origin.since = since;
        io.origin.written = written;
        let next = self.spare.pop().unwrap_or_else(|| another(&mut self.made));
        self.submit(mem::replace(io, next));
    }

    /// Goes on with a request of the task before. The disk may have fewer bytes by now.
    fn take_up(&mut self, mut io: Box<Io>) {
        io.token = self.made;
        self.made = self.made.wrapping_add(1);
        self.in_flight = self.in_flight.wrapping_add(1);
        self.meter.in_flight(self.in_flight);
        if end(&io) <= self.limits.capacity.saturating_mul(SECTOR) {
            self.stalled.push_back(io);
        } else {
            self.completions.push(Completion { io, result: Err(io::Error::from_raw_os_error(libc::EIO)) });
        }
    }

    /// Hands an operation to the backend, or has it wait for room there, behind those that wait already.
    #[inline(always)]
    fn submit(&mut self, io: Box<Io>) {
        self.in_flight = self.in_flight.wrapping_add(1);
        self.meter.in_flight(self.in_flight);
        if !self.stalled.is_empty() {
            self.stalled.push_back(io);
        } else if let Err(Full(io)) = self.backend.submit(io) {
            self.stalled.push_back(io);
        }
    }

    #[inline]
    fn give_back(&mut self) -> Round {
        self.backend.reap(&mut self.completions);
        let mut round = if self.resting { self.put_off() } else { Round::Nothing };
        if !self.completions.is_empty() {
            round = Round::Progress;
            self.meter.reaped();
            self.complete_all();
        }
        let signal = match &mut self.queue {
            Ring::Mapped(queue) => queue.publish(),
            _ => Signal::Idle,
        };
        if signal == Signal::Needed {
            self.interrupt.signal();
        }
        self.meter.published(signal);
        round
    }

    /// Takes back what waits for more than the store. There is room for others then, which wait behind it.
    #[cold]
    fn put_off(&mut self) -> Round {
        let before = self.put_off.len();
        self.backend.put_off(&mut self.put_off);
        if self.put_off.len() > before { Round::Progress } else { Round::Nothing }
    }

    /// Gives all that has completed back to the queue.
    #[inline(never)]
    fn complete_all(&mut self) {
        let mut completions = mem::take(&mut self.completions);
        for Completion { mut io, result } in completions.drain(..) {
            self.in_flight = self.in_flight.wrapping_sub(1);
            let Origin { written, since, .. } = io.origin;
            self.meter.completed(since);
            self.complete(&mut io, result, written);
            self.spare.push(io);
        }
        self.completions = completions;
        self.meter.in_flight(self.in_flight);
        self.meter.completed_all();
    }

    /// Gives one back.
    #[inline(always)]
    fn complete(&mut self, io: &mut Io, result: io::Result<()>, written: u32) {
        let (status, written) = match result {
            Ok(()) if self.in_order => (Status::Ok, success(io, written)),
            Ok(()) => (Status::Ok, written.into()),
            Err(error) => self.failed(&error, io, written),
        };
        self.finish(io, status, written);
    }

    /// What the driver is told of a request that the store failed.
    #[cold]
    fn failed(&mut self, error: &io::Error, io: &Io, written: u32) -> (Status, Written) {
        self.meter.failed(error);
        // Not the storage's doing: the client's memory is not there.
        if error.raw_os_error() == Some(libc::EFAULT) {
            self.events.memory_lost();
        }
        failure(error, io, written)
    }

    #[inline(always)]
    fn finish(&mut self, io: &mut Io, status: Status, written: Written) {
        io.buffers.write_trailer(status as u8);
        io.buffers.recycle(&self.memory);
        let Some(head) = io.origin.head.take() else { return };
        if let Ring::Mapped(queue) = &mut self.queue {
            queue.complete(head, written);
        } else if let Ring::Lost(_, completed) = &mut self.queue {
            completed.push((head, written));
        }
    }

    /// The ring in guest memory as it is now.
    fn map_ring(&mut self) -> Result<Q::Memory, RingMapError> {
        self.memory.refresh();
        self.spare.iter_mut().chain(&mut self.batch).for_each(|io| io.buffers.clear());
        Q::Memory::map(&mut self.memory, self.place.addresses, self.place.size)
    }

    /// The driver broke the rules: nothing more is taken from this queue until the device is reset.
    fn fault(&mut self, error: &dyn Error) {
        self.accepting = false;
        self.events.fault(self.index, error.to_string());
    }
}

/// An operation more.
#[cold]
fn another(made: &mut u16) -> Box<Io> {
    let token = *made;
    *made = token.wrapping_add(1);
    Box::new(Io::new(token, Op::Flush, PinnedBuffers::default()))
}

impl<Q: Virtqueue<Memory: MappedQueue, Parked: Send + 'static>> QueueTask for BlockQueue<Q> {
    fn run(&mut self, share: Share) -> Round {
        let taken = self.take_requests(share);
        let given = self.give_back();
        let round = if taken == Round::Progress { taken } else { given };
        self.meter.polled(round == Round::Progress);
        round
    }

    fn arm(&mut self) -> Armed {
        match &mut self.queue {
            Ring::Mapped(queue) if self.accepting && self.stalled.is_empty() => queue.arm(),
            _ => Armed::Sleep,
        }
    }

    fn kicked(&mut self) {
        self.meter.kicked();
        let Ring::Mapped(queue) = &self.queue else { return };
        if !self.warned_blank && queue.state() == Q::START && queue.memory().is_blank() {
            self.warned_blank = true;
            self.events.blank_ring(self.index);
        }
    }

    fn refresh(&mut self) {
        let ring = self.map_ring().or_else(|_| {
            // Before the last look, and before the old ring goes: a mapping that comes after either must be told to us.
            self.events.ring_lost();
            self.map_ring()
        });
        let (parked, completed) = match mem::replace(&mut self.queue, Ring::Changing) {
            Ring::Mapped(queue) => (queue.park(), Vec::new()),
            Ring::Lost(queue, completed) => (queue, completed),
            Ring::Changing => return,
        };
        self.queue = match ring {
            Ok(ring) => {
                let mut queue = Q::resume(parked, ring);
                for (head, written) in completed {
                    queue.complete(head, written);
                }
                Ring::Mapped(queue)
            }
            Err(error) => {
                log::debug!("queue {}: {error}; it rests until that is mapped again", self.index);
                Ring::Lost(parked, completed)
            }
        };
    }

    fn stop(&mut self) {
        (self.accepting, self.resting) = (false, true);
        self.backend.hasten();
    }

    fn hurry(&mut self) {
        self.backend.stop();
    }

    fn in_flight(&self) -> usize {
        self.in_flight.saturating_sub(self.put_off.len())
    }

    fn is_dormant(&self) -> bool {
        self.backend.is_dormant()
    }

    fn leave(&mut self) -> Left {
        let (queue, completed) = match mem::replace(&mut self.queue, Ring::Changing) {
            Ring::Mapped(queue) => (queue.park(), Vec::new()),
            Ring::Lost(queue, completed) => (queue, completed),
            Ring::Changing => return Left::default(),
        };
        let state = Q::parked_state(&queue);
        let requests = mem::take(&mut self.put_off);
        let any = !requests.is_empty() || !completed.is_empty();
        Left { state, unfinished: any.then(|| Box::new(Unfinished { queue, completed, requests }) as _) }
    }

    fn give_up(&mut self, why: &str) {
        self.events.fault(self.index, why.to_owned());
    }
}
