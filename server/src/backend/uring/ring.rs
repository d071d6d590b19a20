//! The io_urings of a thread: entries in, completions out to the clients they belong to.

use std::any::Any;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use std::{fmt, io, mem, thread};

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};

use super::Waker;
use super::accounts::{Accounts, Landing, Over};
use super::lane::{FixedBuffers, Lane, Queues};

/// How long a ring that is dropped waits for operations whose backends are gone.
pub(super) const LAST_WAIT: Duration = Duration::from_secs(5);

/// Where the counters of wakers are read to. Nobody looks at them, so that one place serves all rings, for ever:
/// whatever becomes of a ring, the kernel writes here and nowhere else.
static SINK: AtomicU64 = AtomicU64::new(0);

/// Who an entry belongs to, as it travels through the kernel.
#[derive(Clone, Copy)]
enum Owner {
    Wake,
    Slot(u32, u16),
}

impl Owner {
    const WAKE: u64 = u64::MAX;

    fn to_user_data(self) -> u64 {
        match self {
            Self::Wake => Self::WAKE,
            Self::Slot(client, slot) => u64::from(client) << 16 | u64::from(slot),
        }
    }

    fn from_user_data(data: u64) -> Self {
        match data {
            Self::WAKE => Self::Wake,
            _ => Self::Slot((data >> 16) as u32, data as u16),
        }
    }
}

/// The read on the waker's eventfd.
///
/// It waits in the kernel until the counter is not zero, and takes it back to zero. A counter that was raised before
/// is found by the read as it starts, so that it does not matter which came first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// There is none.
    Idle,
    /// It is queued, or in the kernel.
    Armed,
    /// It has ended, and no wait has said so yet: the next one must not sleep.
    Rung,
}

/// The io_urings of one thread, and their clients.
pub(super) struct Ring {
    interrupt: Queues,
    polled: Option<Queues>,
    /// Entries on the polled lane that have not completed.
    in_polled: u32,
    accounts: Accounts,
    waker: Waker,
    wake: Wake,
}

impl Ring {
    /// Serves clients, as many operations at a time as each io_uring has completions.
    pub(super) fn new(interrupt: IoUring, polled: Option<IoUring>, waker: &Waker) -> Self {
        let interrupt = Queues::new(interrupt, waker);
        let polled = polled.map(|kernel| Queues::new(kernel, waker));
        let capacity = polled.as_ref().map_or(u32::MAX, Queues::capacity).min(interrupt.capacity());
        // One completion is the wake's.
        let accounts = Accounts::new(capacity.saturating_sub(1));
        Self { interrupt, polled, in_polled: 0, accounts, waker: waker.clone(), wake: Wake::Idle }
    }

    /// The clients' accounts.
    pub(super) fn accounts(&mut self) -> &mut Accounts {
        &mut self.accounts
    }

    /// Whether there is a polled lane.
    pub(super) fn has_polled(&self) -> bool {
        self.polled.is_some()
    }

    /// The io_uring of a lane, which is the only one if there is no polled one.
    fn lane(&mut self, lane: Lane) -> &mut Queues {
        match (lane, &mut self.polled) {
            (Lane::Polled, Some(polled)) => polled,
            _ => &mut self.interrupt,
        }
    }

    /// Registers a file; says where, if the table has room.
    pub(super) fn add_file(&mut self, lane: Lane, file: BorrowedFd<'_>) -> Option<u32> {
        self.lane(lane).add_file(file)
    }

    pub(super) fn remove_file(&mut self, lane: Lane, entry: u32) {
        self.lane(lane).remove_file(entry);
    }

    pub(super) fn fixed_buffers(&mut self, lane: Lane) -> FixedBuffers<'_> {
        self.lane(lane).fixed_buffers()
    }

    /// How many files and pieces of memory are registered.
    #[cfg(test)]
    pub(super) fn registered(&self) -> (usize, usize) {
        let (polled_files, polled_pieces) = self.polled.as_ref().map_or((0, 0), Queues::registered);
        let (files, pieces) = self.interrupt.registered();
        (files + polled_files, pieces + polled_pieces)
    }

    pub(super) fn system_calls(&self) -> u64 {
        self.interrupt.system_calls() + self.polled.as_ref().map_or(0, Queues::system_calls)
    }

    /// Whether there are completions to be looked for, which nothing tells of.
    pub(super) fn is_polling(&self) -> bool {
        self.in_polled > 0
    }

    /// Queues an operation's entry.
    ///
    /// # Safety
    /// What the entry leads to must stay as it is until its completion comes out of [`Accounts::take`], or what
    /// [`Accounts::close`] was given is dropped.
    pub(super) unsafe fn push(&mut self, lane: Lane, client: u32, slot: u16, entry: squeue::Entry) {
        if self.accounts.depart(client) {
            self.in_polled += u32::from(lane == Lane::Polled && self.polled.is_some());
            // SAFETY: the caller's promise.
            unsafe { self.lane(lane).queue(entry.user_data(Owner::Slot(client, slot).to_user_data())) };
        }
    }

    /// Starts what is queued.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.polled.as_mut().map_or(Ok(()), Queues::submit)?;
        self.interrupt.submit()
    }

    /// Starts what is queued and sleeps until there is a completion or a wake; does not sleep while completions have to be
    /// looked for.
    pub(super) fn wait(&mut self) -> io::Result<Over> {
        let mut over = self.reap()?;
        let busy = self.wake == Wake::Rung || self.accounts.any_landed() || self.is_polling() || self.is_stale();
        if busy || !over.is_empty() {
            self.submit()?;
        } else {
            self.arm();
            self.interrupt.wait()?;
            over.append(&mut self.reap()?);
        }
        if self.wake == Wake::Rung {
            self.wake = Wake::Idle;
        }
        Ok(over)
    }

    /// Whether there may be guest memory to give back.
    fn is_stale(&self) -> bool {
        self.interrupt.is_stale() || self.polled.as_ref().is_some_and(Queues::is_stale)
    }

    /// Queues the read on the waker's eventfd, unless it is there or has ended.
    pub(super) fn arm(&mut self) {
        if self.wake == Wake::Idle {
            self.wake = Wake::Armed;
            let read = opcode::Read::new(Fd(self.waker.0.as_raw_fd()), SINK.as_ptr().cast(), size_of_val(&SINK) as u32);
            // SAFETY: it writes to a static that allows it, and the descriptor is open as long as this ring. A read
            // that the kernel has accepted holds the file itself.
            unsafe { self.interrupt.queue(read.build().user_data(Owner::Wake.to_user_data())) };
        }
    }

    /// Sorts the kernel's completions into the accounts.
    pub(super) fn reap(&mut self) -> io::Result<Over> {
        let mut over = Over::new();
        self.interrupt.sweep();
        // Deferred completions are made by a system call, which the kernel asks for by a flag.
        if !self.sort(&mut over) && self.interrupt.holds_completions() {
            self.interrupt.poll()?;
            self.sort(&mut over);
        }
        if let Some(polled) = &mut self.polled {
            polled.sweep();
            if self.in_polled > 0 {
                polled.poll()?;
                self.sort_polled(&mut over);
            }
        }
        Ok(over)
    }

    /// Whether there were completions.
    fn sort(&mut self, over: &mut Over) -> bool {
        let mut any = false;
        for completion in self.interrupt.completions() {
            any = true;
            match Owner::from_user_data(completion.user_data()) {
                // Also if it failed: that costs a wait that returns for no reason, and it is queued again.
                Owner::Wake => self.wake = Wake::Rung,
                Owner::Slot(client, slot) => {
                    self.accounts.land(client, Landing { slot, result: completion.result() }, over);
                }
            }
        }
        any
    }

    fn sort_polled(&mut self, over: &mut Over) {
        for completion in self.polled.iter_mut().flat_map(Queues::completions) {
            self.in_polled -= 1;
            if let Owner::Slot(client, slot) = Owner::from_user_data(completion.user_data()) {
                self.accounts.land(client, Landing { slot, result: completion.result() }, over);
            }
        }
    }

    /// Waits for the operations whose clients are gone, for a while.
    fn wait_for_orphans(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + LAST_WAIT;
        loop {
            self.submit()?;
            drop(self.reap()?);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.accounts.has_orphans() {
                return Ok(());
            }
            if self.is_polling() {
                thread::yield_now();
            } else {
                self.interrupt.wait_for(left)?;
            }
        }
    }

    #[cfg(test)]
    pub(super) fn has_rung(&self) -> bool {
        self.wake == Wake::Rung
    }
}

impl Drop for Ring {
    /// By now all clients are gone, for they share the ring.
    fn drop(&mut self) {
        if let Err(error) = self.wait_for_orphans() {
            log::error!("io_uring: {error}");
        }
        for orphan in self.accounts.orphans() {
            log::error!("the storage has not answered for {LAST_WAIT:?}: the memory of its last requests is not freed");
            // The kernel may still use it.
            mem::forget::<Box<dyn Any>>(orphan);
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (operations, limit) = self.accounts.operations();
        write!(f, "Ring({operations} operations of {limit})")
    }
}
