//! One queue's access to an overlay: splits operations between the base and the overlay's own storage.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::{io, mem};

use virtio::memory::PinnedBuffers;

use super::Overlay;
use super::commit::{Leading, Outcome, Round, StoredMap};
use super::map::{BLOCK, Reservation, Source};
use super::slab::Slab;
use crate::backend::uring::{Client, Uring};
use crate::backend::{Backend, Completion, Full, Io, Op};

/// Operations in flight, at most: four times what QEMU gives a queue by default.
const MAX_REQUESTS: u16 = 1024;
/// Parts of them in flight, at most. A read of sectors that lie by turns here and there has as many as sectors.
const MAX_PARTS: u16 = 4096;
/// Operations kept to be parts again.
const MAX_SPARE: usize = 64;

/// The store that does a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Base,
    Own,
}

/// What of an operation no store has been given yet.
#[derive(Debug)]
enum Left {
    Nothing,
    /// A read's bytes from this one of the disk on.
    Read(u64),
    /// Bytes of the overlay's own that are to go.
    Erase(Range<u64>),
}

/// An operation that was taken.
struct Request {
    token: u16,
    op: Op,
    /// The operation itself, unless it was handed on as it is.
    io: Option<Box<Io>>,
    left: Left,
    /// Whether it is in the list of those of which something is left.
    unissued: bool,
    /// Parts in flight.
    parts: u16,
    error: Option<io::Error>,
    /// What is the overlay's own when all parts have succeeded, and the room for it.
    written: Option<(Range<u64>, Reservation)>,
    /// Whether it is complete only when the map is on stable storage.
    commit: bool,
}

impl Request {
    fn new(io: &Io) -> Self {
        let (token, op) = (io.token, io.op);
        let left = Left::Nothing;
        Self { token, op, io: None, left, unissued: false, parts: 0, error: None, written: None, commit: false }
    }
}

/// Rounds that a queue waits for, or leads.
struct Commits {
    stored: Arc<StoredMap>,
    leading: Client<Leading>,
    waiting: Vec<(Arc<Round>, u16)>,
}

pub(super) struct OverlayBackend {
    overlay: Arc<Overlay>,
    ring: Rc<Uring>,
    base: Box<dyn Backend>,
    own: Box<dyn Backend>,
    requests: Slab<Request>,
    /// The request of each part.
    parts: Slab<u16>,
    /// Requests of which something is left, because a store was full.
    unissued: VecDeque<u16>,
    commits: Option<Commits>,
    done: Vec<Completion>,
    reaped: Vec<Completion>,
    #[expect(clippy::vec_box, reason = "the boxes are what is used again")]
    spare: Vec<Box<Io>>,
    /// Whether something was handed on that the ring has not been told to start.
    queued: bool,
}

impl OverlayBackend {
    pub(super) fn new(overlay: &Arc<Overlay>, ring: &Rc<Uring>, queue: u16) -> io::Result<Self> {
        let commits = match &overlay.stored {
            Some(stored) => {
                let (stored, leading) = (Arc::clone(stored), Client::new(ring, ())?);
                Some(Commits { stored, leading, waiting: Vec::new() })
            }
            None => None,
        };
        Ok(Self {
            base: overlay.base.store.attach(ring, queue)?,
            own: overlay.own.attach(ring, queue)?,
            overlay: Arc::clone(overlay),
            ring: Rc::clone(ring),
            requests: Slab::new(MAX_REQUESTS),
            parts: Slab::new(MAX_PARTS),
            unissued: VecDeque::new(),
            commits,
            done: Vec::new(),
            reaped: Vec::new(),
            spare: Vec::new(),
            queued: false,
        })
    }

    fn read(&mut self, io: Box<Io>, offset: u64) -> Result<(), Full> {
        let bytes = offset..offset.saturating_add(io.buffers.len());
        let (source, len) = self.overlay.map.source(&bytes);
        let whole = len == bytes.end - offset;
        match source {
            Source::Zero if whole => {
                io.buffers.fill(0);
                self.done.push(Completion { io, result: Ok(()) });
                Ok(())
            }
            Source::Base if whole => self.hand_on(Target::Base, io, |_| ()),
            Source::Own if whole => self.hand_on(Target::Own, io, |_| ()),
            _ => self.hold(io, |request| request.left = Left::Read(offset)),
        }
    }

    /// A write, or zeroes that are to have storage.
    fn write(&mut self, io: Box<Io>, bytes: Range<u64>, durable: bool) -> Result<(), Full> {
        let Some(reservation) = self.overlay.map.reserve(&bytes) else {
            self.done.push(Completion { io, result: Err(io::Error::from_raw_os_error(libc::ENOSPC)) });
            return Ok(());
        };
        // What the stored map has is durable when the bytes are; the rest when the map is.
        let map_is_stored = |stored: &Arc<StoredMap>| self.overlay.map.is_settled(&bytes) && stored.is_stored();
        let commit = durable && self.overlay.stored.as_ref().is_some_and(|stored| !map_is_stored(stored));
        self.hand_on(Target::Own, io, |request| {
            request.written = Some((bytes, reservation));
            request.commit = commit;
        })
    }

    /// Makes bytes zero, or lets go of them, without storage for that.
    fn zero(&mut self, io: Box<Io>, bytes: &Range<u64>, durable: bool) -> Result<(), Full> {
        let commit = durable && self.commits.is_some();
        // First the map and then the storage: what another queue writes here meanwhile is then counted as long as it takes room.
        let own = self.overlay.map.zero(bytes);
        self.hold(io, |request| {
            request.left = own.map_or(Left::Nothing, Left::Erase);
            request.commit = commit;
        })
    }

    /// Gives an operation to one store as it is.
    fn hand_on(&mut self, target: Target, io: Box<Io>, prepare: impl FnOnce(&mut Request)) -> Result<(), Full> {
        let mut request = Request::new(&io);
        prepare(&mut request);
        let (token, op) = (request.token, request.op);
        // What a commit follows need not be durable before.
        let durable = self.commits.is_some() && !request.commit;
        let Ok(number) = self.requests.insert(request) else { return Err(Full(io)) };
        let mut part = io;
        part.op = self.shifted(target, op, durable);
        self.submit_part(target, number, part).map_err(|mut io| {
            self.requests.remove(number);
            (io.token, io.op) = (token, op);
            Full(io)
        })
    }

    /// Keeps an operation that is to be done in parts, or in none.
    fn hold(&mut self, io: Box<Io>, prepare: impl FnOnce(&mut Request)) -> Result<(), Full> {
        let mut request = Request::new(&io);
        prepare(&mut request);
        if self.requests.is_full() {
            return Err(Full(io));
        }
        request.io = Some(io);
        if let Ok(number) = self.requests.insert(request) {
            self.issue(number);
        }
        Ok(())
    }

    /// An operation as a store understands it.
    fn shifted(&self, target: Target, op: Op, may_be_durable: bool) -> Op {
        let shift = if target == Target::Own { self.overlay.own_offset } else { 0 };
        let at = |offset: u64| offset.saturating_add(shift);
        match op {
            Op::Read { offset } => Op::Read { offset: at(offset) },
            Op::Write { offset, durable } => Op::Write { offset: at(offset), durable: durable && may_be_durable },
            Op::Flush => Op::Flush,
            Op::Discard { offset, len } => Op::Discard { offset: at(offset), len },
            Op::WriteZeroes { offset, len, unmap, durable } => {
                Op::WriteZeroes { offset: at(offset), len, unmap, durable: durable && may_be_durable }
            }
        }
    }

    fn submit_part(&mut self, target: Target, number: u16, mut io: Box<Io>) -> Result<(), Box<Io>> {
        let Ok(part) = self.parts.insert(number) else { return Err(io) };
        io.token = part;
        let backend = if target == Target::Base { &mut self.base } else { &mut self.own };
        if let Err(Full(io)) = backend.submit(io) {
            self.parts.remove(part);
            return Err(io);
        }
        self.queued = true;
        if let Some(request) = self.requests.get_mut(number) {
            request.parts = request.parts.saturating_add(1); // no more than there are tokens
        }
        Ok(())
    }

    /// Gives the stores what is left of a request, or sees to it later.
    fn issue(&mut self, number: u16) {
        let all = self.issue_all(number);
        if let Some(request) = self.requests.get_mut(number) {
            request.unissued = !all;
        }
        if all {
            self.settle(number);
        } else {
            self.unissued.push_back(number);
        }
    }

    /// Whether nothing is left.
    fn issue_all(&mut self, number: u16) -> bool {
        loop {
            let mut part =
                self.spare.pop().unwrap_or_else(|| Box::new(Io::new(0, Op::Flush, PinnedBuffers::default())));
            let Some(request) = self.requests.get_mut(number) else { return true };
            let (target, next, taken) = match (&request.left, request.op, &mut request.io) {
                (Left::Read(at), _, Some(whole)) => {
                    // The buffers lose what was issued.
                    let (at, end) = (*at, at.saturating_add(whole.buffers.len()));
                    let (source, len) = self.overlay.map.source(&(at..end));
                    whole.buffers.part(0, len, &mut part.buffers);
                    let next = if at + len < end { Left::Read(at + len) } else { Left::Nothing };
                    if source == Source::Zero {
                        part.buffers.fill(0);
                        whole.buffers.advance(len);
                        request.left = next;
                        self.put_back(part);
                        continue;
                    }
                    let target = if source == Source::Base { Target::Base } else { Target::Own };
                    part.op = self.shifted(target, Op::Read { offset: at }, false);
                    (target, next, len)
                }
                (Left::Erase(bytes), op, _) => {
                    let (offset, len) = (bytes.start, bytes.end - bytes.start);
                    // Zeroes must be there in the end, what is discarded need not.
                    let op = match op {
                        Op::Discard { .. } => Op::Discard { offset, len },
                        _ => Op::WriteZeroes { offset, len, unmap: true, durable: false },
                    };
                    part.op = self.shifted(Target::Own, op, false);
                    (Target::Own, Left::Nothing, 0)
                }
                _ => {
                    self.put_back(part);
                    return true;
                }
            };
            if let Err(part) = self.submit_part(target, number, part) {
                self.put_back(part);
                return false;
            }
            if let Some(request) = self.requests.get_mut(number) {
                request.left = next;
                request.io.iter_mut().for_each(|whole| whole.buffers.advance(taken));
            }
        }
    }

    fn put_back(&mut self, mut part: Box<Io>) {
        part.buffers.clear();
        if self.spare.len() < MAX_SPARE {
            self.spare.push(part);
        }
    }

    /// A store has done a part.
    fn landed(&mut self, Completion { io, result }: Completion) {
        let Some(number) = self.parts.remove(io.token) else { return };
        let Some(request) = self.requests.get_mut(number) else { return };
        request.parts = request.parts.saturating_sub(1);
        if let Err(error) = result {
            // What is left of it is left undone.
            request.error.get_or_insert(error);
            request.left = Left::Nothing;
        }
        if request.io.is_none() {
            request.io = Some(io);
        } else {
            self.put_back(io);
        }
        self.settle(number);
    }

    /// Ends a request, or goes on to what follows its parts, if there is nothing else left of it.
    fn settle(&mut self, number: u16) {
        let Some(request) = self.requests.get_mut(number) else { return };
        if request.parts > 0 || request.unissued {
            return;
        }
        if let Some((bytes, reservation)) = request.written.take() {
            if request.error.is_none() {
                self.overlay.map.publish(&bytes);
            }
            drop(reservation);
        }
        match &mut self.commits {
            Some(commits) if request.commit && request.error.is_none() => {
                commits.waiting.push((commits.stored.join(Some(self.ring.waker())), number));
            }
            _ => self.end(number, None),
        }
    }

    fn end(&mut self, number: u16, error: Option<io::Error>) {
        let Some(Request { token, op, io: Some(mut io), error: earlier, .. }) = self.requests.remove(number) else {
            return;
        };
        (io.token, io.op) = (token, op);
        self.done.push(Completion { io, result: error.or(earlier).map_or(Ok(()), Err) });
    }

    /// Ends what waited for a round that is over; has one begin if nobody else does.
    fn commit(&mut self) {
        let Some(Commits { stored, leading, waiting }) = &mut self.commits else { return };
        // Over by being dropped.
        leading.reap(drop);
        let mut over = Vec::new();
        waiting.retain_mut(|(round, number)| match round.outcome() {
            None => true,
            Some(Outcome::Stored) => {
                over.push((*number, None));
                false
            }
            Some(Outcome::Failed(errno)) => {
                over.push((*number, Some(io::Error::from_raw_os_error(errno))));
                false
            }
            Some(Outcome::Abandoned) => {
                *round = stored.join(Some(self.ring.waker()));
                true
            }
        });
        if !waiting.is_empty()
            && let Some(round) = stored.lead()
        {
            // With no room on the ring for it, it is abandoned, and the next look tries again.
            self.queued |= leading.start(round).is_ok();
        }
        for (number, error) in over {
            self.end(number, error);
        }
    }
}

impl Backend for OverlayBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        // What was taken before goes first.
        if !self.unissued.is_empty() || self.requests.is_full() {
            return Err(Full(io));
        }
        match io.op {
            Op::Read { offset } => self.read(io, offset),
            Op::Write { offset, durable } => {
                let bytes = offset..offset.saturating_add(io.buffers.len());
                self.write(io, bytes, durable)
            }
            Op::WriteZeroes { offset, len, unmap: false, durable } => {
                self.write(io, offset..offset.saturating_add(len), durable)
            }
            Op::WriteZeroes { offset, len, unmap: true, durable } => {
                self.zero(io, &(offset..offset.saturating_add(len)), durable)
            }
            Op::Discard { offset, len } => {
                // Blocks that it has not all of stay as they are.
                let (start, end) = (offset.next_multiple_of(BLOCK), offset.saturating_add(len) / BLOCK * BLOCK);
                self.zero(io, &(start.min(end)..end), false)
            }
            Op::Flush => match &self.commits {
                Some(commits) if commits.stored.is_stored() => self.hand_on(Target::Own, io, |_| ()),
                // Nothing of it is to survive.
                None => {
                    self.done.push(Completion { io, result: Ok(()) });
                    Ok(())
                }
                Some(_) => self.hold(io, |request| request.commit = true).map(|()| self.commit()),
            },
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut reaped = mem::take(&mut self.reaped);
        // Again and again, for a store that has done what it was given when it was given: it ends no sleep.
        loop {
            self.queued = false;
            self.base.reap(&mut reaped);
            self.own.reap(&mut reaped);
            reaped.drain(..).for_each(|completion| self.landed(completion));
            for _ in 0..self.unissued.len() {
                if let Some(number) = self.unissued.pop_front() {
                    self.issue(number);
                }
            }
            self.commit();
            if !self.queued {
                break;
            }
            // What follows from completions is started here, where the worker's next call may be too late.
            if let Err(error) = self.ring.submit() {
                log::error!("io_uring: {error}");
            }
        }
        self.reaped = reaped;
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.requests.len() + self.done.len()
    }

    fn stop(&mut self) {
        self.base.stop();
        self.own.stop();
    }
}
