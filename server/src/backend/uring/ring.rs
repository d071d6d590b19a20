//! The io_uring: entries in, completions out to the clients they belong to.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use std::{fmt, io, mem};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Submitter, opcode, squeue};
use virtio::memory::PinnedBuffers;

use super::Waker;
use super::files::FileTable;
use super::memory::FixedMemory;

/// How long a ring that is dropped waits for operations whose backends are gone.
const LAST_WAIT: Duration = Duration::from_secs(5);

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

/// A completion of the kernel's, for a client's slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landing {
    pub(super) slot: u16,
    pub(super) result: i32,
}

/// What one client has in the kernel and has got from it.
#[derive(Default)]
struct Account {
    taken: bool,
    /// Entries without completion.
    in_kernel: u32,
    landed: Vec<Landing>,
    /// What the entries lead to, once the client is gone.
    orphan: Option<Box<dyn Any>>,
}

/// What became of clients that were dropped before, to be dropped by the caller when the ring is free again.
pub(super) type Over = Vec<Box<dyn Any>>;

/// One io_uring and its clients.
pub(super) struct Ring {
    kernel: IoUring,
    waker: Waker,
    wake: Wake,
    /// Entries that the submission queue had no room for when the kernel took none.
    backlog: VecDeque<squeue::Entry>,
    accounts: Vec<Account>,
    /// Operations that may still make completions: never more than the completion queue holds.
    operations: u32,
    limit: u32,
    /// Completions that lie in the accounts.
    landed: usize,
    system_calls: u64,
    files: FileTable,
    memory: FixedMemory,
}

/// Where an operation that makes its entry asks for a fixed buffer.
pub(in crate::backend) struct FixedBuffers<'a> {
    kernel: Submitter<'a>,
    memory: &'a mut FixedMemory,
}

impl FixedBuffers<'_> {
    /// The index of the fixed buffer that all pieces of `buffers` lie in, if there is one.
    pub(in crate::backend) fn find(&mut self, buffers: &PinnedBuffers) -> Option<u16> {
        self.memory.buffer(&self.kernel, buffers)
    }
}

impl Ring {
    /// Serves clients, as many operations at a time as the io_uring has completions.
    pub(super) fn new(kernel: IoUring, waker: &Waker) -> Self {
        // One completion is the wake's.
        let limit = kernel.params().cq_entries().saturating_sub(1);
        Self {
            kernel,
            waker: waker.clone(),
            wake: Wake::Idle,
            backlog: VecDeque::new(),
            accounts: Vec::new(),
            operations: 0,
            limit,
            landed: 0,
            system_calls: 0,
            files: FileTable::default(),
            memory: FixedMemory::new(waker),
        }
    }

    /// Registers a file; says where, if the table has room.
    pub(super) fn add_file(&mut self, file: BorrowedFd<'_>) -> Option<u32> {
        self.files.add(&self.kernel.submitter(), file)
    }

    pub(super) fn remove_file(&mut self, entry: u32) {
        self.files.remove(&self.kernel.submitter(), entry);
    }

    pub(super) fn fixed_buffers(&mut self) -> FixedBuffers<'_> {
        FixedBuffers { kernel: self.kernel.submitter(), memory: &mut self.memory }
    }

    /// How many files and pieces of memory are registered.
    #[cfg(test)]
    pub(super) fn registered(&self) -> (usize, usize) {
        (self.files.len(), self.memory.registered())
    }

    pub(super) fn system_calls(&self) -> u64 {
        self.system_calls
    }

    /// A new client's number.
    pub(super) fn register(&mut self) -> u32 {
        let client = self.accounts.iter().position(|account| !account.taken).unwrap_or_else(|| {
            self.accounts.push(Account::default());
            self.accounts.len() - 1
        });
        if let Some(account) = self.accounts.get_mut(client) {
            account.taken = true;
        }
        client as u32
    }

    /// Ends a client that holds `operations` operations. What its entries lead to lies in `held`, which comes back if
    /// the kernel has none of them.
    pub(super) fn leave(&mut self, client: u32, operations: u32, held: Box<dyn Any>) -> Option<Box<dyn Any>> {
        let Some(account) = self.accounts.get_mut(client as usize) else {
            return Some(held);
        };
        self.landed -= account.landed.len();
        account.landed.clear();
        self.operations -= operations - account.in_kernel;
        if account.in_kernel == 0 {
            account.taken = false;
            return Some(held);
        }
        account.orphan = Some(held);
        None
    }

    /// Makes room for an operation, if there is any.
    pub(super) fn begin(&mut self) -> bool {
        let room = self.operations < self.limit;
        self.operations += u32::from(room);
        room
    }

    /// Gives an operation's room back.
    pub(super) fn end(&mut self) {
        self.operations -= 1;
    }

    /// Queues an operation's entry.
    ///
    /// # Safety
    /// What the entry leads to must stay as it is until its completion comes out of [`take`](Self::take), or what
    /// [`leave`](Self::leave) was given is dropped.
    pub(super) unsafe fn push(&mut self, client: u32, slot: u16, entry: squeue::Entry) {
        if let Some(account) = self.accounts.get_mut(client as usize) {
            account.in_kernel += 1;
            // SAFETY: the caller's promise.
            unsafe { self.queue(entry.user_data(Owner::Slot(client, slot).to_user_data())) };
        }
    }

    /// # Safety
    /// As for [`push`](Self::push).
    unsafe fn queue(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller's promise.
        if self.backlog.is_empty() && unsafe { self.kernel.submission().push(&entry) }.is_ok() {
            return;
        }
        self.backlog.push_back(entry);
        // An error will come again where it can be told: on the next submission.
        let _ = self.refill();
    }

    /// Moves the backlog into the submission queue, which is submitted when it is full; stops where the kernel does.
    fn refill(&mut self) -> io::Result<()> {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: promised to `queue`, which put it there.
            if unsafe { self.kernel.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
            } else {
                self.enter(0)?;
                if self.kernel.submission().is_full() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Submits the queue and waits for so many completions. May do less of both.
    fn enter(&mut self, completions: usize) -> io::Result<()> {
        self.system_calls += 1;
        may_do_less(self.kernel.submitter().submit_and_wait(completions))
    }

    /// Starts what is queued.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.refill()?;
        let queue = self.kernel.submission();
        let needed = !queue.is_empty() || queue.taskrun();
        drop(queue);
        if needed { self.enter(0) } else { Ok(()) }
    }

    /// Starts what is queued and sleeps until there is a completion or a wake.
    pub(super) fn wait(&mut self) -> io::Result<Over> {
        let mut over = self.reap()?;
        if self.wake == Wake::Rung || self.landed > 0 || !over.is_empty() || self.memory.is_stale() {
            self.submit()?;
        } else {
            self.arm();
            self.refill()?;
            // Without the wake's entry in the queue there is no sleep; the caller just comes again.
            self.enter(usize::from(self.backlog.is_empty()))?;
            over.append(&mut self.reap()?);
        }
        if self.wake == Wake::Rung {
            self.wake = Wake::Idle;
        }
        Ok(over)
    }

    /// Queues the read on the waker's eventfd, unless it is there or has ended.
    pub(super) fn arm(&mut self) {
        if self.wake == Wake::Idle {
            self.wake = Wake::Armed;
            let read = opcode::Read::new(Fd(self.waker.0.as_raw_fd()), SINK.as_ptr().cast(), size_of_val(&SINK) as u32);
            // SAFETY: it writes to a static that allows it, and the descriptor is open as long as this ring. A read
            // that the kernel has accepted holds the file itself.
            unsafe { self.queue(read.build().user_data(Owner::Wake.to_user_data())) };
        }
    }

    /// Sorts the kernel's completions into the accounts.
    pub(super) fn reap(&mut self) -> io::Result<Over> {
        let mut over = Over::new();
        if self.memory.is_stale() {
            self.memory.sweep(&self.kernel.submitter());
        }
        // Deferred completions are made by a system call, which the kernel asks for by a flag.
        if !self.sort(&mut over) && self.kernel.submission().taskrun() {
            self.enter(0)?;
            self.sort(&mut over);
        }
        Ok(over)
    }

    /// Whether there were completions.
    fn sort(&mut self, over: &mut Over) -> bool {
        let mut any = false;
        for completion in self.kernel.completion() {
            any = true;
            let (client, slot) = match Owner::from_user_data(completion.user_data()) {
                Owner::Wake => {
                    // Also if it failed: that costs a wait that returns for no reason, and it is queued again.
                    self.wake = Wake::Rung;
                    continue;
                }
                Owner::Slot(client, slot) => (client, slot),
            };
            let Some(account) = self.accounts.get_mut(client as usize) else {
                continue;
            };
            account.in_kernel -= 1;
            match &account.orphan {
                None => {
                    account.landed.push(Landing { slot, result: completion.result() });
                    self.landed += 1;
                }
                Some(_) => {
                    self.operations -= 1;
                    if account.in_kernel == 0 {
                        over.extend(account.orphan.take());
                        account.taken = false;
                    }
                }
            }
        }
        any
    }

    /// Exchanges `landed`, which is empty, for a client's completions.
    pub(super) fn take(&mut self, client: u32, landed: &mut Vec<Landing>) {
        if let Some(account) = self.accounts.get_mut(client as usize) {
            self.landed -= account.landed.len();
            mem::swap(&mut account.landed, landed);
        }
    }

    /// Waits for the operations whose clients are gone, for a while.
    fn wait_for_orphans(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + LAST_WAIT;
        loop {
            self.refill()?;
            drop(self.reap()?);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.accounts.iter().all(|account| account.orphan.is_none()) {
                return Ok(());
            }
            let limit = Timespec::from(left);
            self.system_calls += 1;
            may_do_less(self.kernel.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit)))?;
        }
    }

    #[cfg(test)]
    pub(super) fn has_rung(&self) -> bool {
        self.wake == Wake::Rung
    }
}

/// Of the system call's errors, those that mean no more than that it is to be made again.
fn may_do_less(result: io::Result<usize>) -> io::Result<()> {
    match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) | Err((Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME), _)) => Ok(()),
        Err((_, error)) => Err(error),
    }
}

impl Drop for Ring {
    /// By now all clients are gone, for they share the ring.
    fn drop(&mut self) {
        if let Err(error) = self.wait_for_orphans() {
            log::error!("io_uring: {error}");
        }
        for orphan in self.accounts.iter_mut().filter_map(|account| account.orphan.take()) {
            log::error!("the storage has not answered for {LAST_WAIT:?}: the memory of its last requests is not freed");
            mem::forget(orphan);
        }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} operations of {})", self.operations, self.limit)
    }
}
