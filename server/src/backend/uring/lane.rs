//! One io_uring of a ring: entries on their way into the kernel, and what is registered with it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, Submitter, cqueue, squeue};
use virtio::memory::PinnedBuffers;

use super::Waker;
use super::files::FileTable;
use super::memory::FixedMemory;

/// Which of a ring's io_urings an entry goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) enum Lane {
    /// The one that the thread sleeps in: devices tell of completions by interrupts.
    Interrupt,
    /// The one that has the thread look for completions in the devices' queues (`IORING_SETUP_IOPOLL`). It takes nothing
    /// but reads and writes past the page cache, of files that have such queues.
    Polled,
}

/// Entries that are started before all of a batch are queued, if the kernel has no more than these at work: a device that has
/// nothing to do begins while we make the rest, and while the kernel, which passes on together what it is given together, does.
const EARLY: usize = 4;

/// One io_uring.
pub(super) struct Queues {
    kernel: IoUring,
    /// Entries that the submission queue had no room for when the kernel took none.
    backlog: VecDeque<squeue::Entry>,
    /// Entries that were queued and have not completed.
    owed: usize,
    files: FileTable,
    memory: FixedMemory,
    system_calls: u64,
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

impl Queues {
    pub(super) fn new(kernel: IoUring, waker: &Waker) -> Self {
        Self {
            kernel,
            backlog: VecDeque::new(),
            owed: 0,
            files: FileTable::default(),
            memory: FixedMemory::new(waker),
            system_calls: 0,
        }
    }

    /// Completions that the completion queue holds.
    pub(super) fn capacity(&self) -> u32 {
        self.kernel.params().cq_entries()
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

    /// Whether there may be guest memory to give back.
    pub(super) fn is_stale(&self) -> bool {
        self.memory.is_stale()
    }

    /// Gives some of it back.
    pub(super) fn sweep(&mut self) {
        if self.memory.is_stale() {
            self.memory.sweep(&self.kernel.submitter());
        }
    }

    /// How many files and pieces of memory are registered.
    #[cfg(test)]
    pub(super) fn registered(&self) -> (usize, usize) {
        (self.files.len(), self.memory.registered())
    }

    pub(super) fn system_calls(&self) -> u64 {
        self.system_calls
    }

    /// Queues an entry.
    ///
    /// # Safety
    /// What it leads to must stay as it is until its completion comes out of [`completions`](Self::completions).
    pub(super) unsafe fn queue(&mut self, entry: squeue::Entry) {
        self.owed = self.owed.wrapping_add(1);
        // Errors will come again where they can be told: on the next submission.
        // SAFETY: the caller's promise.
        if self.backlog.is_empty() && unsafe { self.kernel.submission().push(&entry) }.is_ok() {
            let queued = self.kernel.submission().len();
            if queued >= EARLY && queued >= self.owed.wrapping_sub(queued) {
                let _ = self.enter(0);
            }
            return;
        }
        self.backlog.push_back(entry);
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
        // A submission thread of the kernel's that is awake finds the entries by itself. Whether it is, `need_wakeup` asks
        // behind a full barrier: the thread says that it sleeps and then looks at the queue once more, we have filled
        // the queue and then look whether it sleeps.
        if completions == 0 && self.kernel.params().is_setup_sqpoll() && !self.kernel.submission().need_wakeup() {
            return Ok(());
        }
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

    /// Starts what is queued and sleeps until there is a completion.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.refill()?;
        // Without the last entry in the queue there is no sleep; the caller just comes again.
        self.enter(usize::from(self.backlog.is_empty()))
    }

    /// As [`wait`](Self::wait), for `limit` at most.
    pub(super) fn wait_for(&mut self, limit: Duration) -> io::Result<()> {
        self.refill()?;
        self.system_calls += 1;
        let limit = Timespec::from(limit);
        may_do_less(self.kernel.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit)))
    }

    /// Starts what is queued and has the kernel look for completions, once.
    pub(super) fn poll(&mut self) -> io::Result<()> {
        self.refill()?;
        self.enter(0)
    }

    /// Whether the kernel has completions that it makes in a system call only.
    pub(super) fn holds_completions(&mut self) -> bool {
        self.kernel.submission().taskrun()
    }

    /// What has completed.
    pub(super) fn completions(&mut self) -> impl Iterator<Item = cqueue::Entry> + '_ {
        let Self { kernel, owed, .. } = self;
        kernel.completion().inspect(|_| *owed = owed.wrapping_sub(1))
    }
}

/// Of the system call's errors, those that mean no more than that it is to be made again.
pub(super) fn may_do_less(result: io::Result<usize>) -> io::Result<()> {
    match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) | Err((Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME), _)) => Ok(()),
        Err((_, error)) => Err(error),
    }
}
