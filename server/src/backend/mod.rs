//! Where the blocks live.
//!
//! A [`Store`] is what a device opens once: a file, a piece of memory. A [`Backend`] is one queue's access to it, on
//! the thread of the worker that serves the queue. It knows bytes, offsets and pinned guest memory, and never virtio.
//!
//! # The contract
//!
//! The caller guarantees that
//! - offsets and lengths are multiples of 512 bytes and end within [`StoreInfo::capacity`];
//! - for [`Op::Read`] and [`Op::Write`] the buffers hold as many bytes as are to be moved; for the rest they hold none;
//! - nothing that changes the store is submitted to one that is [`StoreInfo::read_only`];
//! - [`Uring::submit`] or [`Uring::wait`] follows each batch of submissions, of all backends of the thread together, and
//!   a [`reap`](Backend::reap) comes between the submissions and a wait: stores that need no kernel are done by then,
//!   and do not end the sleep.
//!
//! The backend guarantees that
//! - each [`Io`] that it took comes back once, in one [`Completion`], by its own token, in any order, in the same box with its
//!   buffers;
//! - buffers and what they pin stay alive until the store is done with them, also when the backend is dropped before;
//! - a completed read has filled all of its buffers; a completed write is seen by every read submitted after it;
//! - a completed [`Op::Flush`] has put every write that was completed before it was submitted on stable storage, as has
//!   a completed write that was `durable` itself; stores without stable storage say so in their documentation;
//! - what was written as zeroes reads as zeroes; what was discarded reads as anything, the same each time or not;
//! - no call blocks on the store, and none panics.

#[cfg(test)]
pub(crate) mod contract;
mod desk;
pub mod fabric;
pub mod faults;
pub mod file;
pub mod hold;
pub mod image;
mod immediate;
pub mod limits;
mod lock;
pub mod memory;
#[cfg(test)]
mod moody;
pub mod nbd;
pub mod null;
pub mod overlay;
pub mod power_cut;
mod random;
mod threads;
mod timer;
pub mod uring;

use std::io;
use std::rc::Rc;

use virtio::memory::PinnedBuffers;
use virtio::queue::Head;

use hold::PutOff;
use uring::Uring;

/// Bytes of a sector, the unit in which virtio counts (virtio 1.3 §5.2).
pub const SECTOR: u64 = 512;

/// What a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreInfo {
    /// Bytes, a multiple of 512.
    pub capacity: u64,
    /// Bytes of the block that the store can read and write without more ado: a power of two from 512 on.
    pub block_size: u32,
    /// Bytes of the block that the storage below prefers, `block_size` times a power of two.
    pub physical_block_size: u32,
    /// Bytes of a good size for a large transfer; 0 if there is none.
    pub optimal_io_size: u32,
    /// Whether nothing may be changed.
    pub read_only: bool,
    /// Whether [`Op::Discard`] frees anything.
    pub discard: bool,
    /// Whether [`Op::WriteZeroes`] with `unmap` frees anything.
    pub write_zeroes_unmap: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// From the store, from byte `offset` on, into the buffers.
    Read {
        /// First byte in the store.
        offset: u64,
    },
    /// From the buffers into the store, from byte `offset` on.
    Write {
        /// First byte in the store.
        offset: u64,
        /// Complete only once the data is on stable storage.
        durable: bool,
    },
    /// Puts all completed writes on stable storage.
    Flush,
    /// The bytes are not needed any more.
    Discard {
        /// First byte in the store.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The bytes become zero.
    WriteZeroes {
        /// First byte in the store.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The store may free them.
        unmap: bool,
        /// Complete only once that is on stable storage.
        durable: bool,
    },
}

/// One operation, which owns the guest memory it works on. It is handed on in a box, which goes from one request to the
/// next.
#[derive(Debug)]
pub struct Io {
    /// The caller's name for it; not used twice at the same time on one backend.
    pub token: u16,
    /// What is to be done.
    pub op: Op,
    /// From where or to where; empty but for reads and writes.
    pub buffers: PinnedBuffers,
    /// What it is for.
    pub(crate) origin: Origin,
}

impl Io {
    /// An operation that is for nobody but who hands it on.
    pub fn new(token: u16, op: Op, buffers: PinnedBuffers) -> Self {
        Self { token, op, buffers, origin: Origin::default() }
    }
}

/// The request that an operation is for. Its maker finds that here again when the operation comes back; nobody else looks.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    /// Its place in the queue.
    pub(crate) head: Option<Head>,
    /// Bytes to report as written if it succeeds.
    pub(crate) written: u32,
    /// When it was taken, by the clock of the queue's meter.
    pub(crate) since: u64,
}

/// The end of an [`Io`].
#[derive(Debug)]
pub struct Completion {
    /// The operation, buffers and all. Pieces of the buffers that the store has consumed may be gone from the list.
    pub io: Box<Io>,
    /// How it went.
    pub result: Result<(), io::Error>,
}

/// The store has no room for another operation now; there will be when one has completed, of this backend or of another
/// on the same ring, or when the kernel next wakes the thread.
#[derive(Debug)]
pub struct Full(pub Box<Io>);

/// A store as it was opened, shared by all queues of a device.
pub trait Store: Send + Sync {
    /// What it is.
    fn info(&self) -> StoreInfo;

    /// The access of the device's request queue with this number, on the thread that calls; `ring` is that thread's.
    ///
    /// # Errors
    /// If the system refuses.
    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>>;

    /// Puts every completed write on stable storage, and waits for that: for the end of a device's service.
    ///
    /// # Errors
    /// If the storage fails.
    fn flush(&self) -> io::Result<()>;

    /// Queues that may be attached at the same time, at least 1.
    fn max_queues(&self) -> u16;

    /// What it needs a thread of its own for, once: whoever opened the store starts it before queues are attached.
    fn service(&self) -> Option<Service>;

    /// Gives it `capacity` bytes, or as many as the storage below has by now, and says how many these are: a multiple of 512
    /// and not zero. What lies below is as before; what is new in a store of its own reads as zeroes. Nothing is attached
    /// meanwhile.
    ///
    /// # Errors
    /// If it cannot have that many ([`Unsupported`](io::ErrorKind::Unsupported) if it cannot change at all); it is as before
    /// then.
    fn resize(&self, capacity: Option<u64>) -> io::Result<u64>;
}

/// Work of a store's that is not done on its users' threads.
pub struct Service {
    /// TCP ports that it connects to.
    pub ports: Vec<u16>,
    /// Returns when the store and all that was attached to it are gone.
    pub run: Box<dyn FnOnce() + Send>,
}

/// One queue's access to a store; see the [contract](self).
pub trait Backend {
    /// Takes an operation, which is started by the ring's next call at the latest.
    ///
    /// # Errors
    /// The operation itself, if there is no room for it now.
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full>;

    /// Does an operation at once, where that takes no longer than to take it, and says how it went: there is no [`Completion`]
    /// of it. `None` if it is to be [submitted](Self::submit).
    fn perform(&mut self, _: &Io) -> Option<io::Result<()>> {
        None
    }

    /// Adds what has completed to `done`.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Operations that were taken and not yet given back.
    fn in_flight(&self) -> usize;

    /// The queue rests, and somebody waits for the end of what is in flight: what waits for nothing but its time may end early.
    fn hasten(&mut self) {}

    /// The queue is stopped for good, and somebody waits for the end of what is in flight: what does not depend on the kernel
    /// alone, as on a server that does not answer, may fail soon. May be said more than once.
    fn stop(&mut self) {}

    /// The queue rests: takes back what waits for somebody's word, or for nothing that lies below. When the queue goes on, it is
    /// submitted anew to another backend of the same store.
    fn put_off(&mut self, _unfinished: &mut Vec<PutOff>) {}

    /// Whether nothing will come of what is in flight before the kernel wakes the thread: to look for it awake is in vain.
    fn is_dormant(&self) -> bool {
        false
    }
}
