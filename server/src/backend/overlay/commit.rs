//! Putting a map on stable storage, after what it speaks of.
//!
//! A *round* copies the pages of the map that have changed, syncs the file, writes the copies, and syncs it again. What the
//! copies speak of was written before they were made, so the first sync puts it on stable storage; only then do they follow.
//! Whatever is cut off in between, the map that is found speaks of nothing that is not there.
//!
//! One round runs at a time, led by one of the queues that wait for it, on its ring. Flushes of other queues that come
//! meanwhile share the next round. Who leads tells all others when it is over, by their wakers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{io, mem};

use io_uring::types::FsyncFlags;
use io_uring::{opcode, squeue};

use super::map::{Map, PAGE};
use crate::backend::file::FileStore;
use crate::backend::uring::{FileName, FixedBuffers, Lane, Operation, Step, Waker};

/// How often an entry that the kernel interrupted, or had no resources for, is tried again.
const MAX_RETRIES: u8 = 100;

/// How long the end of a device's service waits for a round that a queue has left behind.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a round has ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    /// All that was completed before it began is on stable storage.
    Stored,
    /// It is not, by this error of the system's.
    Failed(i32),
    /// Its leader has gone: another round will do it.
    Abandoned,
}

/// One round, before it begins, while it runs, and for those who wait for its outcome.
#[derive(Debug, Default)]
pub(super) struct Round {
    outcome: OnceLock<Outcome>,
    waiting: Mutex<Vec<Waker>>,
}

impl Round {
    /// How it has ended, once it has.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.outcome.get().copied()
    }

    fn wake_all(&self) {
        lock(&self.waiting).iter().for_each(Waker::wake);
    }
}

/// A map and the file that it is stored in.
#[derive(Debug)]
pub(super) struct StoredMap {
    map: Arc<Map>,
    store: Arc<FileStore>,
    /// Where the map is in the file.
    offset: u64,
    rounds: Mutex<Rounds>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Rounds {
    running: bool,
    /// The one that begins next, if anybody waits for it.
    next: Option<Arc<Round>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StoredMap {
    pub(super) fn new(map: Arc<Map>, store: Arc<FileStore>, offset: u64) -> Arc<Self> {
        Arc::new(Self { map, store, offset, rounds: Mutex::default(), ended: Condvar::new() })
    }

    /// Whether all that the map's list of changes has ever had is on stable storage.
    pub(super) fn is_stored(&self) -> bool {
        // In this order: a round runs before it takes the list.
        self.map.is_unchanged() && !lock(&self.rounds).running
    }

    /// A round that has not begun; `waker` is told when it is over, or when somebody must lead it.
    pub(super) fn join(&self, waker: Option<&Waker>) -> Arc<Round> {
        let round = Arc::clone(lock(&self.rounds).next.get_or_insert_default());
        lock(&round.waiting).extend(waker.cloned());
        round
    }

    /// Begins the next round, if there is one and none runs.
    pub(super) fn lead(self: &Arc<Self>) -> Option<Leading> {
        let mut rounds = lock(&self.rounds);
        if rounds.running {
            return None;
        }
        let round = rounds.next.take()?;
        rounds.running = true;
        drop(rounds);
        let pages = self.map.take_changed();
        let mut copies = Vec::with_capacity(pages.len() * PAGE);
        pages.iter().for_each(|page| self.map.copy_page(*page, &mut copies));
        let stored = Arc::clone(self);
        Some(Leading { stored, round, pages, copies, written: 0, work: Work::SyncData, retries: 0, outcome: None })
    }

    /// Does a round, and waits for it.
    ///
    /// # Errors
    /// If the storage fails, or a round that was begun before does not end.
    pub(super) fn store(self: &Arc<Self>) -> io::Result<()> {
        let round = self.join(None);
        let free = |rounds: &mut Rounds| rounds.running;
        let (rounds, _) =
            self.ended.wait_timeout_while(lock(&self.rounds), PATIENCE, free).unwrap_or_else(PoisonError::into_inner);
        drop(rounds);
        if let Some(mut leading) = self.lead() {
            let result = leading.store();
            leading.outcome = Some(match &result {
                Ok(()) => Outcome::Stored,
                Err(error) => Outcome::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
            });
            return result;
        }
        match round.outcome() {
            Some(Outcome::Stored) => Ok(()),
            Some(Outcome::Failed(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::Error::new(io::ErrorKind::TimedOut, "the map of the overlay is still being stored")),
        }
    }

    fn file(&self) -> &File {
        self.store.buffered()
    }
}

/// What a round does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    SyncData,
    WriteMap,
    SyncMap,
}

/// The round that runs. Dropped when it is over, or when the kernel is done with one whose leader has gone.
#[derive(Debug)]
pub(super) struct Leading {
    stored: Arc<StoredMap>,
    round: Arc<Round>,
    /// The pages of the map that have changed, in order.
    pages: Vec<usize>,
    /// What they were when the round began, one after the other.
    copies: Vec<u8>,
    /// Bytes of them that were written.
    written: usize,
    work: Work,
    retries: u8,
    outcome: Option<Outcome>,
}

impl Leading {
    /// Copies that belong next to each other in the file and are to be written next, and their place there.
    fn next_write(&self) -> (&[u8], u64) {
        let (first, within) = (self.written / PAGE, self.written % PAGE);
        let pages = self.pages.get(first..).unwrap_or_default();
        let neighbours = pages.windows(2).take_while(|pair| matches!(pair, [one, next] if one + 1 == *next)).count();
        let end = (first + neighbours + 1) * PAGE;
        let copies = self.copies.get(self.written..end).unwrap_or_default();
        let place = pages.first().map_or(0, |page| page * PAGE) + within;
        (copies, self.stored.offset + place as u64)
    }

    /// The whole round, by calls that wait.
    fn store(&mut self) -> io::Result<()> {
        let stored = Arc::clone(&self.stored);
        stored.file().sync_data()?;
        if self.pages.is_empty() {
            return Ok(());
        }
        while self.written < self.copies.len() {
            let (copies, place) = self.next_write();
            stored.file().write_all_at(copies, place)?;
            self.written += copies.len();
        }
        stored.file().sync_data()
    }

    fn end(&mut self, outcome: Outcome) -> Step {
        self.outcome = Some(outcome);
        Step::Over
    }
}

// SAFETY: entries lead to the copies, which lie on the heap and are not changed, and to the descriptor of the store, which
// `stored` shares.
unsafe impl Operation for Leading {
    type Context = ();

    fn lane(&self, (): &()) -> Lane {
        Lane::Interrupt
    }

    fn entry(&mut self, (): &(), _: &mut FixedBuffers<'_>) -> squeue::Entry {
        let FileName { fd, flags } = FileName::descriptor(self.stored.file());
        match self.work {
            Work::SyncData | Work::SyncMap => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build().flags(flags),
            Work::WriteMap => {
                let (copies, place) = self.next_write();
                // The map of the largest disk is smaller; a write that ends short goes on.
                let len = u32::try_from(copies.len()).unwrap_or(1 << 30);
                opcode::Write::new(fd, copies.as_ptr(), len).offset(place).build().flags(flags)
            }
        }
    }

    fn landed(&mut self, (): &(), result: i32) -> Step {
        match (u32::try_from(result), self.work) {
            (Ok(_), Work::SyncData) if self.pages.is_empty() => self.end(Outcome::Stored),
            (Ok(_), Work::SyncData) => {
                self.work = Work::WriteMap;
                Step::Again
            }
            (Ok(0), Work::WriteMap) => self.end(Outcome::Failed(libc::EIO)),
            (Ok(bytes), Work::WriteMap) => {
                self.written = self.written.saturating_add(bytes as usize);
                if self.written >= self.copies.len() {
                    self.work = Work::SyncMap;
                }
                Step::Again
            }
            (Ok(_), Work::SyncMap) => self.end(Outcome::Stored),
            (Err(_), _) if matches!(-result, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES => {
                self.retries += 1;
                Step::Again
            }
            (Err(_), _) => self.end(Outcome::Failed(result.saturating_neg())),
        }
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or(Outcome::Abandoned);
        if !matches!(outcome, Outcome::Stored) {
            // Before the round is over: who finds none running finds these.
            mem::take(&mut self.pages).into_iter().for_each(|page| self.stored.map.list(page));
        }
        let mut rounds = lock(&self.stored.rounds);
        rounds.running = false;
        let next = rounds.next.clone();
        // Set once, here.
        let _ = self.round.outcome.set(outcome);
        drop(rounds);
        self.stored.ended.notify_all();
        self.round.wake_all();
        next.into_iter().for_each(|next| next.wake_all());
    }
}
