//! What workers tell a session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crossbeam::queue::SegQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio::memory::Loss;

use crate::backend::faults::Breakdown;

/// Something that happened on the data path and that is the session's to deal with.
pub(crate) enum Event {
    /// The driver broke a queue's rules.
    Fault { queue: u16, error: String },
    /// The driver kicked a queue in which nothing was ever written, as far as we can see.
    BlankRing { queue: u16 },
    /// The device is to break down, on purpose.
    Breakdown(Breakdown),
}

/// A session's letter box.
pub(crate) struct Events {
    events: SegQueue<Event>,
    ring_lost: AtomicBool,
    memory_lost: Arc<Loss>,
    wake: EventFd,
}

impl Events {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let memory_lost = Arc::new(Loss::new()?);
        Ok(Self { events: SegQueue::new(), ring_lost: AtomicBool::new(false), memory_lost, wake })
    }

    /// A queue stopped since its driver broke the rules.
    pub(crate) fn fault(&self, queue: u16, error: String) {
        self.push(Event::Fault { queue, error });
    }

    /// A queue was kicked, but its ring is blank.
    pub(crate) fn blank_ring(&self, queue: u16) {
        self.push(Event::BlankRing { queue });
    }

    /// The device is to break down, on purpose.
    pub(crate) fn breakdown(&self, breakdown: Breakdown) {
        self.push(Event::Breakdown(breakdown));
    }

    /// The kernel did not find the client's memory (EFAULT), though it is mapped: as when we find it gone ourselves.
    pub(crate) fn memory_lost(&self) {
        self.memory_lost.tell();
    }

    /// Says that bytes of the client's memory are gone: its session ends.
    pub(super) fn loss(&self) -> &Arc<Loss> {
        &self.memory_lost
    }

    /// A queue's ring is not mapped: it wants to hear of the next mapping. Look for the ring once more afterwards.
    pub(crate) fn ring_lost(&self) {
        self.ring_lost.store(true, Ordering::Relaxed);
        // ORDERING: our store is `ring_lost`, our load is the table of mappings, looked at once more after this. The
        // session's pair: it stores the table, has a full barrier, and loads `ring_lost` in `take_ring_lost`. Without
        // ours we may find the old table while the session finds nobody waiting: the ring is mapped, and the queue rests
        // for ever.
        fence(Ordering::SeqCst);
    }

    /// Whether a queue waits for a mapping, asked after each; says so once.
    pub(super) fn take_ring_lost(&self) -> bool {
        // ORDERING: the other half of `ring_lost`: our store is the table, our load is `ring_lost`.
        fence(Ordering::SeqCst);
        self.ring_lost.swap(false, Ordering::Relaxed)
    }

    /// The oldest event.
    pub(super) fn pop(&self) -> Option<Event> {
        self.events.pop()
    }

    /// Forgets what the queues have told: they have been reset, and what they are started with is not to blame.
    pub(super) fn forget(&self) {
        while self.pop().is_some() {}
    }

    /// Becomes readable with an event; call [`drain`](Self::drain), then [`pop`](Self::pop) all.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn drain(&self) {
        // EAGAIN says that it is empty already.
        let _empty = self.wake.read();
    }

    fn push(&self, event: Event) {
        self.events.push(event);
        if let Err(error) = self.wake.write(1) {
            log::error!("cannot wake a session: {error}");
        }
    }
}
