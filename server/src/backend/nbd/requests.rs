//! The requests of one queue: those that wait to be sent, and those that wait for an answer.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::export::Export;
use super::reconnect::Port;
use super::replies::{Asked, Outstanding, Violation};
use super::request::{Payload, Request, asked};
use super::transfer::{Lent, Outgoing};
use super::wire::{self, Command};
use crate::backend::{Completion, Full, Io, Op};

/// Zeroes that are copied into buffers at a time.
static ZEROES: [u8; 4096] = [0; 4096];

/// A request's place.
#[derive(Default)]
struct Slot {
    /// What its request under way is called; 0 if there is none.
    cookie: u64,
    asked: Option<Asked>,
    /// The first error that was told.
    errno: i32,
    /// Bytes of data that have come. That none came twice is not looked at: who sends wrong bytes can do so without
    /// sending any twice.
    covered: u64,
    /// All has been said, while the kernel still has its memory.
    ended: bool,
    /// Its memory could not be reached.
    faulty: bool,
    taken: bool,
    /// `None` while the kernel has its memory.
    request: Option<Box<Request>>,
}

/// All of them.
pub(super) struct Requests {
    slots: Vec<Slot>,
    free: Vec<u16>,
    to_send: VecDeque<u16>,
    done: Vec<Completion>,
    next_cookie: u64,
    /// Requests without an answer, and those among them that are answered by data.
    unanswered: usize,
    reads: usize,
    /// Counts what has come of use.
    progress: u64,
    port: Arc<Port>,
}

impl Outstanding for Requests {
    fn asked(&self, cookie: u64) -> Option<Asked> {
        let slot = self.slots.get(usize::from(cookie as u16))?;
        slot.asked.filter(|_| slot.taken && slot.cookie == cookie && !slot.ended)
    }
}

impl Requests {
    /// Operations that are taken, at most: four times what QEMU gives a queue by default.
    const SLOTS: usize = 1024;

    pub(super) fn new(port: &Arc<Port>) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            to_send: VecDeque::new(),
            done: Vec::new(),
            next_cookie: 1,
            unanswered: 0,
            reads: 0,
            progress: 0,
            port: Arc::clone(port),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.pending().saturating_add(self.done.len())
    }

    /// Operations that are not over.
    pub(super) fn pending(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    pub(super) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Whether data is to be expected.
    pub(super) fn expects_data(&self) -> bool {
        self.reads > 0
    }

    pub(super) fn has_to_send(&self) -> bool {
        !self.to_send.is_empty()
    }

    pub(super) fn progress(&self) -> u64 {
        self.progress
    }

    pub(super) fn done(&mut self) -> &mut Vec<Completion> {
        &mut self.done
    }

    /// Takes an operation.
    pub(super) fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        if self.pending() == Self::SLOTS {
            return Err(Full(io));
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len().saturating_sub(1) as u16
        });
        if matches!(io.op, Op::Flush) {
            // From here on it counts what is written after this.
            self.port.flushing();
        }
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = Slot { taken: true, request: Some(Box::new(Request::new(io))), ..Slot::default() };
            self.to_send.push_back(slot);
        }
        Ok(())
    }

    /// An operation is over.
    fn finish(&mut self, slot: u16, result: Result<(), i32>) {
        let Some(place) = self.slots.get_mut(usize::from(slot)) else { return };
        let Some(request) = place.request.take() else { return };
        *place = Slot::default();
        self.free.push(slot);
        self.progress = self.progress.wrapping_add(1);
        match (request.io.op, result) {
            (Op::Flush, Err(_)) => self.port.changed(),
            (Op::Write { durable: false, .. } | Op::WriteZeroes { durable: false, .. }, Ok(())) => self.port.changed(),
            _ => {}
        }
        self.done.push(Completion { io: request.io, result: result.map_err(io::Error::from_raw_os_error) });
    }

    /// Takes the next request that is to be sent: its command, its cookie, and what it carries. Those that need none are over,
    /// those that the export cannot take have failed.
    pub(super) fn next(&mut self, export: &Export) -> Option<(u16, u64, Command, Payload)> {
        while let Some(slot) = self.to_send.pop_front() {
            let cookie = self.next_cookie << 16 | u64::from(slot);
            let Some(place) = self.slots.get_mut(usize::from(slot)) else { continue };
            let Some(request) = &mut place.request else { continue };
            if !request.fits(export) {
                self.finish(slot, Err(libc::EINVAL));
                continue;
            }
            let Some((command, payload)) = request.next(export) else {
                self.finish(slot, Ok(()));
                continue;
            };
            let asked = asked(&command);
            (place.cookie, place.asked, place.errno, place.covered) = (cookie, Some(asked), 0, 0);
            place.ended = false;
            // 2^48 requests of a connection are years of them.
            self.next_cookie = self.next_cookie.wrapping_add(1) & (u64::MAX >> 16);
            self.unanswered = self.unanswered.saturating_add(1);
            self.reads = self.reads.saturating_add(usize::from(matches!(asked, Asked::Read { .. })));
            return Some((slot, cookie, command, payload));
        }
        None
    }

    /// Whether the next request to be sent is to go alone.
    pub(super) fn next_is_alone(&self) -> bool {
        let next = self.to_send.front().and_then(|slot| self.slots.get(usize::from(*slot)));
        next.and_then(|slot| slot.request.as_ref()).is_some_and(|request| request.alone)
    }

    /// Hands a request out to the kernel.
    pub(super) fn lend(&mut self, slot: u16) -> Option<Lent> {
        let request = self.slots.get_mut(usize::from(slot))?.request.take()?;
        Some(Lent { slot, request })
    }

    /// The kernel has given a request back.
    pub(super) fn give_back(&mut self, lent: Lent) {
        if let Some(place) = self.slots.get_mut(usize::from(lent.slot)) {
            place.request = Some(lent.request);
            if place.ended {
                self.answered(lent.slot);
            }
        }
    }

    /// The message did not go out, for its memory.
    pub(super) fn unreachable(&mut self, outgoing: &mut Outgoing) {
        let one = outgoing.lent.len() == 1;
        for lent in &mut outgoing.lent {
            lent.request.alone = true;
            if let Some(place) = self.slots.get_mut(usize::from(lent.slot)).filter(|_| one) {
                place.faulty = true;
            }
        }
    }

    /// Data could not be received into a request's memory.
    pub(super) fn faulty(&mut self, slot: u16) {
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            place.faulty = true;
        }
    }

    /// The request with a cookie that has been held against the table.
    pub(super) fn request(&self, cookie: u64) -> Option<&Request> {
        self.slots.get(usize::from(cookie as u16))?.request.as_deref()
    }

    /// `bytes` bytes of data have come.
    pub(super) fn covered(&mut self, cookie: u64, bytes: u64) -> Result<(), Violation> {
        let Some(slot) = self.slots.get_mut(usize::from(cookie as u16)) else { return Ok(()) };
        slot.covered = slot.covered.saturating_add(bytes);
        self.progress = self.progress.wrapping_add(1);
        match slot.asked {
            Some(Asked::Read { len, .. }) if slot.covered > len.into() => {
                Err(Violation::Incomplete { asked: len, got: slot.covered })
            }
            _ => Ok(()),
        }
    }

    /// Data that came elsewhere than to the buffers.
    pub(super) fn copy(&mut self, cookie: u64, at: u32, bytes: &[u8]) -> Result<(), Violation> {
        if let Some(request) = self.request(cookie) {
            request.io.buffers.copy_from_slice(request.done().saturating_add(at.into()), bytes);
        }
        self.covered(cookie, bytes.len() as u64)
    }

    /// Zeroes in place of data.
    pub(super) fn zero(&mut self, cookie: u64, at: u32, len: u32) -> Result<(), Violation> {
        // First, so that no more is written than was asked for.
        self.covered(cookie, len.into())?;
        if let Some(request) = self.request(cookie) {
            let mut place = request.done().saturating_add(at.into());
            let mut left = len as usize;
            while left > 0 {
                let piece = ZEROES.get(..left).unwrap_or(&ZEROES);
                request.io.buffers.copy_from_slice(place, piece);
                place = place.saturating_add(piece.len() as u64);
                left = left.saturating_sub(piece.len());
            }
        }
        Ok(())
    }

    /// The server cannot do it.
    pub(super) fn failed(&mut self, cookie: u64, error: u32) {
        if let Some(slot) = self.slots.get_mut(usize::from(cookie as u16)).filter(|slot| slot.errno == 0) {
            slot.errno = wire::errno(error);
        }
    }

    /// All has been said of a request.
    pub(super) fn end(&mut self, cookie: u64) -> Result<(), Violation> {
        let number = cookie as u16;
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return Ok(()) };
        if let Some(Asked::Read { len, .. }) = slot.asked
            && slot.errno == 0
            && slot.covered != u64::from(len)
        {
            return Err(Violation::Incomplete { asked: len, got: slot.covered });
        }
        slot.ended = true;
        if slot.request.is_some() {
            self.answered(number);
        }
        Ok(())
    }

    /// An answer is complete, and the request's memory is ours.
    fn answered(&mut self, slot: u16) {
        let Some(place) = self.slots.get_mut(usize::from(slot)) else { return };
        self.unanswered = self.unanswered.saturating_sub(1);
        self.reads = self.reads.saturating_sub(usize::from(matches!(place.asked, Some(Asked::Read { .. }))));
        let errno = place.errno;
        (place.cookie, place.asked, place.ended) = (0, None, false);
        if errno != 0 {
            return self.finish(slot, Err(errno));
        }
        if let Some(request) = &mut place.request {
            request.advance();
            request.alone = false;
            // What comes next, or that nothing does, shows when it is its turn.
            self.to_send.push_back(slot);
            self.progress = self.progress.wrapping_add(1);
        }
    }

    /// The connection is gone, and the kernel has given all back: what has no answer is to be sent again, in the order in
    /// which it was sent before. A server that others get answers of, and that a request cannot be sent to for `deadline`,
    /// has something against that one.
    pub(super) fn connection_lost(&mut self, deadline: Duration) {
        let now = Instant::now();
        let unanswered = |(number, slot): (usize, &Slot)| slot.asked.map(|_| (slot.cookie, number as u16));
        let mut lost: Vec<_> = self.slots.iter().enumerate().filter_map(unanswered).collect();
        lost.sort_unstable();
        (self.unanswered, self.reads) = (0, 0);
        for (_, number) in lost.into_iter().rev() {
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            (slot.cookie, slot.asked, slot.errno, slot.covered) = (0, None, 0, 0);
            let faulty = slot.faulty;
            let Some(request) = &mut slot.request else { continue };
            let since = request.restart(now);
            if faulty {
                self.finish(number, Err(libc::EFAULT));
            } else if now.saturating_duration_since(since) >= deadline {
                self.finish(number, Err(libc::EIO));
            } else {
                self.to_send.push_front(number);
            }
        }
    }

    /// All that wait to be sent have waited long enough.
    pub(super) fn fail_waiting(&mut self) {
        while let Some(slot) = self.to_send.pop_front() {
            self.finish(slot, Err(libc::EIO));
        }
    }
}
