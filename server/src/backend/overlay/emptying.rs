//! What an operator does to all of an overlay at once: has it written into its base, or forgotten.
//!
//! No queue is attached meanwhile, and none can be. What is written into the base is on stable storage there before the overlay
//! forgets anything, and until then base and overlay together are the disk, however much of it the base has: the work may be cut
//! off at any time, and done again.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::base::BaseIdentity;
use super::format::{self, Fate, Header};
use super::map::Source;
use super::{Overlay, OverlayStore};
use crate::backend::Store;
use crate::backend::file::{FileStore, RewriteError, free};
use crate::backend::memory::MemoryStore;

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// Bytes that are made zero at once.
const ZERO_PIECE: u64 = 256 << 20;
/// How often the log says how far it is.
const REPORT: Duration = Duration::from_secs(5);

/// Why an overlay was not emptied; it is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmptyError {
    /// Its base cannot be written.
    #[error(
        "its base is neither a raw image nor a block device, and can only be read; discard the overlay, or copy the disk"
    )]
    NotWritable,
    /// Other devices of this server have the same base.
    #[error("{0} more of this server's devices lie over the same base, and would change with it; remove them first")]
    Shared(usize),
    /// Others use the base.
    #[error(
        "{}: another server, or QEMU, uses the base, and what it has would change with it; stop that first", base.display()
    )]
    Busy {
        /// The base.
        base: PathBuf,
    },
    /// It cannot be made sure that nobody does.
    #[error(
        "{}: its file system has no locks, so that nobody can tell who else uses the base; copy the disk", base.display()
    )]
    NoLocks {
        /// The base.
        base: PathBuf,
    },
    /// The base has gone from its place.
    #[error("{}: another file has that name by now; put the base back", base.display())]
    Replaced {
        /// The base.
        base: PathBuf,
    },
    /// The base cannot be opened to be written.
    #[error(
        "{}: cannot open the base to write it: {source}; it takes the permission to, and in the sandbox to be named by \
         --control-allow", base.display()
    )]
    Open {
        /// The base.
        base: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The base has no room for the disk, and cannot be given any.
    #[error(
        "the disk has {disk} bytes, and its base, a block device, {base}; what is beyond has no place there, and nothing was \
         written: copy the disk"
    )]
    Larger {
        /// Bytes of the disk.
        disk: u64,
        /// Bytes of the base.
        base: u64,
    },
    /// What the base has is no disk by itself.
    #[error("it was being written into its base, which has a part of it: commit it, which does the rest")]
    HalfCommitted,
    /// Somebody is at it.
    #[error("it is being emptied already; wait for the end of that")]
    Already,
    /// The server ends.
    #[error("the server stops; the disk is whole, and can be committed after the next start if the overlay is kept")]
    Stopped,
    /// The storage.
    #[error("{action}: {source}; the disk is whole, try again")]
    System {
        /// What failed.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What an overlay had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Emptied {
    /// Bytes of storage that it had of its own.
    pub own: u64,
    /// Bytes that were written into the base.
    pub written: u64,
    /// Bytes that were made zero there.
    pub zeroed: u64,
}

impl Emptied {
    /// Both together.
    pub(crate) fn and(self, more: Self) -> Self {
        Self {
            own: self.own.saturating_add(more.own),
            written: self.written.saturating_add(more.written),
            zeroed: self.zeroed.saturating_add(more.zeroed),
        }
    }
}

/// How far a commit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Progress {
    /// Bytes of the disk that need no second look.
    pub(crate) looked_at: u64,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes that were written into the base.
    pub(crate) written: u64,
}

/// The storage of an overlay's own, as the store that it is.
pub(super) enum Own {
    Memory(Arc<MemoryStore>),
    Temporary(Arc<FileStore>),
    Kept(Arc<FileStore>, Mutex<Header>),
}

impl Own {
    pub(super) fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Memory(memory) => Arc::clone(memory) as _,
            Self::Temporary(file) | Self::Kept(file, _) => Arc::clone(file) as _,
        }
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        match self {
            Self::Memory(memory) => memory.read_at(offset, to),
            Self::Temporary(file) | Self::Kept(file, _) => file.buffered().read_exact_at(to, offset),
        }
    }

    /// Notes what is being done to it, where that outlives the server.
    fn mark(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let Self::Kept(file, header) = self else { return Ok(()) };
        let mut header = header.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = *header;
        change(&mut changed);
        changed.rewrite(file.buffered())?;
        *header = changed;
        Ok(())
    }

    fn fate(&self) -> Fate {
        match self {
            Self::Kept(_, header) => header.lock().unwrap_or_else(PoisonError::into_inner).fate,
            _ => Fate::Kept,
        }
    }

    /// Forgets what it holds.
    fn clear(&self) -> io::Result<()> {
        match self {
            Self::Memory(memory) => memory.clear(),
            Self::Temporary(file) => {
                // Where holes cannot be made it stays, and is written again.
                free(file.buffered(), 0, file.info().capacity);
                Ok(())
            }
            Self::Kept(file, header) => {
                let header = *header.lock().unwrap_or_else(PoisonError::into_inner);
                format::forget(file.buffered(), &header)
            }
        }
    }
}

/// What this work needs of an overlay.
pub(super) struct Whole {
    own: Own,
    /// Held by who works on all of it.
    alone: Mutex<()>,
    emptying: AtomicBool,
    /// How far a commit is; `None` if there is none under way.
    progress: Mutex<Option<Progress>>,
}

impl Whole {
    pub(super) fn new(own: Own) -> Self {
        Self { own, alone: Mutex::default(), emptying: AtomicBool::new(false), progress: Mutex::default() }
    }

    /// Waits for the end of such work, and keeps it from being begun.
    pub(super) fn alone(&self) -> MutexGuard<'_, ()> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, progress: Option<Progress>) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

/// An overlay to which no queue can be attached until this is dropped.
pub(crate) struct Emptying(Arc<Overlay>);

impl Drop for Emptying {
    fn drop(&mut self) {
        self.0.whole.note(None);
        self.0.whole.emptying.store(false, Ordering::Release);
    }
}

impl OverlayStore {
    /// Whether [`Emptying`] it is going on.
    pub(crate) fn is_being_emptied(&self) -> bool {
        self.0.whole.emptying.load(Ordering::Acquire)
    }

    /// How far a commit is; `None` if there is none under way.
    pub(crate) fn progress(&self) -> Option<Progress> {
        *self.0.whole.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has nobody attach a queue any more. Those that are attached are the caller's to detach before anything is done.
    ///
    /// # Errors
    /// If somebody else is at it.
    pub(crate) fn begin_emptying(&self) -> Result<Emptying, EmptyError> {
        match self.0.whole.emptying.swap(true, Ordering::AcqRel) {
            true => Err(EmptyError::Already),
            false => Ok(Emptying(Arc::clone(&self.0))),
        }
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> EmptyError {
    move |source| EmptyError::System { action, source }
}

impl Emptying {
    /// Writes what the overlay has into its base, and has it forget that. Asks `go_on` from time to time.
    ///
    /// # Errors
    /// If the base cannot be written, or others use it; the disk is what it was.
    pub(crate) fn commit(&self, go_on: &dyn Fn() -> bool) -> Result<Emptied, EmptyError> {
        let Overlay { base, map, stored, info, whole, .. } = &*self.0;
        let _alone = whole.alone();
        let Some((base_file, path)) = &base.file else { return Err(EmptyError::NotWritable) };
        let others = Arc::strong_count(&base.users).saturating_sub(1);
        if others > 0 {
            return Err(EmptyError::Shared(others));
        }
        let base_len = base.store.info().capacity;
        let grows = info.capacity > base_len;
        if grows && base_file.device_size().is_some() {
            return Err(EmptyError::Larger { disk: info.capacity, base: base_len });
        }
        let rewriting = base_file.rewrite(path).map_err(|error| {
            let base = path.clone();
            match error {
                RewriteError::Busy => EmptyError::Busy { base },
                RewriteError::NoLocks => EmptyError::NoLocks { base },
                RewriteError::Replaced => EmptyError::Replaced { base },
                RewriteError::System(source) => EmptyError::Open { base, source },
            }
        })?;
        stored.iter().try_for_each(|stored| stored.store()).map_err(failed("cannot flush the overlay"))?;
        let mark = |change: &dyn Fn(&mut Header)| whole.own.mark(change).map_err(failed("cannot write its header"));
        let fate = whole.own.fate();
        mark(&|header| header.fate = Fate::Committed)?;
        if grows {
            // Where the overlay has nothing either, what is new there is zero, as it was.
            if let Err(error) = rewriting.grow(info.capacity) {
                if base.store.info().capacity == base_len {
                    mark(&|header| header.fate = fate)?;
                }
                return Err(failed("cannot make the base larger")(error));
            }
            map.grow_base(info.capacity);
        }

        let mut emptied = Emptied { own: map.own_bytes(), ..Emptied::default() };
        let mut piece = vec![0; PIECE];
        let zeroes = vec![0; PIECE];
        let (mut at, mut reported) = (0, Instant::now());
        while at < info.capacity {
            if !go_on() {
                return Err(EmptyError::Stopped);
            }
            let (source, run) = map.source(&(at..info.capacity));
            let len = match source {
                Source::Base => run,
                // Most file systems free it without writing it; for others that is long enough to be asked in between.
                Source::Zero => run.min(ZERO_PIECE),
                Source::Own => run.min(PIECE as u64),
            };
            match source {
                Source::Base => {}
                Source::Zero => {
                    rewriting.zero(at, len, &zeroes).map_err(failed("cannot write the base"))?;
                    emptied.zeroed += len;
                }
                Source::Own => {
                    let piece = piece.get_mut(..len as usize).unwrap_or_default();
                    whole.own.read(piece, self.0.own_offset + at).map_err(failed("cannot read the overlay"))?;
                    rewriting.write(piece, at).map_err(failed("cannot write the base"))?;
                    emptied.written += len;
                }
            }
            at += len;
            whole.note(Some(Progress { looked_at: at, size: info.capacity, written: emptied.written }));
            if reported.elapsed() >= REPORT {
                log::info!(
                    "{}: {} % of the disk looked at, {} MiB written",
                    path.display(),
                    at * 100 / info.capacity.max(1),
                    emptied.written >> 20
                );
                reported = Instant::now();
            }
        }
        rewriting.sync().map_err(failed("cannot flush the base"))?;
        self.forget()?;
        let identity = BaseIdentity::of_file(base_file).map_err(failed("cannot look at the base"))?;
        mark(&|header| (header.fate, header.base) = (Fate::Kept, identity))?;
        Ok(emptied)
    }

    /// Has the overlay forget all that it has: its disk is the base again.
    ///
    /// # Errors
    /// If the storage fails.
    pub(crate) fn discard(&self) -> Result<Emptied, EmptyError> {
        let Overlay { map, stored, whole, .. } = &*self.0;
        let _alone = whole.alone();
        if whole.own.fate() == Fate::Committed {
            return Err(EmptyError::HalfCommitted);
        }
        // No round is under way after this.
        stored.iter().try_for_each(|stored| stored.store()).map_err(failed("cannot flush the overlay"))?;
        let emptied = Emptied { own: map.own_bytes(), ..Emptied::default() };
        let mark = |fate| whole.own.mark(|header| header.fate = fate).map_err(failed("cannot write its header"));
        mark(Fate::Discarded)?;
        self.forget()?;
        mark(Fate::Kept)?;
        Ok(emptied)
    }

    fn forget(&self) -> Result<(), EmptyError> {
        // First here: whatever becomes of the storage, the map does not speak of what has gone from it.
        self.0.map.clear();
        self.0.whole.own.clear().map_err(failed("cannot free the overlay's storage"))
    }
}

#[cfg(test)]
mod tests;
