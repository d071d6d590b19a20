//! The thread that has the cache.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam::channel::{Receiver, Sender, select};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::memory::{Access, GuestMemory, Mapping, MemoryFile, PinnedBuffers, SharedTable};

use super::cache::{Cache, Content, Part, Room, Survivors, Unflushed};
use super::{Counts, PowerCut};
use crate::backend::desk::Desk;
use crate::backend::uring::{Uring, Waker};
use crate::backend::{Backend, Full, Io, Op, Store};
use crate::sandbox::{Sandbox, ThreadKind};

/// Bytes that are written down at once.
const PIECE: u64 = 1 << 20;

/// Something for the thread to do.
pub(super) enum Job {
    /// An operation of a queue that was attached after so many cuts.
    Do { io: Box<Io>, desk: Arc<Desk>, cuts: u64 },
    /// Everything on stable storage.
    Flush(Sender<io::Result<()>>),
    /// A power cut.
    Cut { cut: PowerCut, seed: u64, done: Sender<io::Result<Survivors>> },
    /// Write everything down, and detach from the store.
    LetGo(Sender<io::Result<()>>),
    /// Attach to the store again.
    Attach(Sender<io::Result<()>>),
}

/// The cache, and the way to the store below.
pub(super) struct Drive {
    cache: Cache,
    medium: Medium,
    counts: Arc<Counts>,
    /// A defect has left something half done.
    broken: bool,
}

/// The store below, one operation at a time.
struct Medium {
    store: Arc<dyn Store>,
    ring: Rc<Uring>,
    /// `None` while nothing may be attached.
    backend: Option<Box<dyn Backend>>,
    /// Memory that data is written from, [`PIECE`] bytes at address 0.
    memory: GuestMemory,
}

impl Drive {
    /// On the thread that calls.
    pub(super) fn new(store: Arc<dyn Store>, limit: u64, counts: Arc<Counts>) -> io::Result<Self> {
        Ok(Self { cache: Cache::new(limit), medium: Medium::new(store)?, counts, broken: false })
    }

    /// Serves until nobody can ask for anything any more.
    pub(super) fn serve(mut self, jobs: &Receiver<Job>, sandbox: &Receiver<Sandbox>) {
        let mut first = None;
        let entered = select! {
            recv(sandbox) -> sandbox => sandbox,
            recv(jobs) -> job => match job {
                // It has to wait.
                Ok(job) => {
                    first = Some(job);
                    sandbox.recv()
                }
                Err(gone) => Err(gone),
            },
        };
        // Else the store is given up before there is a sandbox.
        let Ok(sandbox) = entered else { return };
        // What it does is what a worker does, without the guest's rings.
        sandbox.enter_as(ThreadKind::Worker);
        while let Some(job) = first.take().or_else(|| jobs.recv().ok()) {
            self.serve_one(job);
        }
    }

    fn serve_one(&mut self, job: Job) {
        // Who asked may have gone.
        match job {
            Job::Do { io, desk, cuts } => desk.receive(io, |io| {
                if cuts != self.counts.cuts.load(Ordering::Relaxed) {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                self.guarded(|drive| drive.execute(io))
            }),
            Job::Flush(done) => drop(done.send(self.guarded(Self::flush))),
            Job::Cut { cut, seed, done } => drop(done.send(self.guarded(|drive| drive.cut(cut, seed)))),
            Job::LetGo(done) => drop(done.send(self.guarded(|drive| {
                drive.flush()?;
                drive.medium.backend = None;
                Ok(())
            }))),
            Job::Attach(done) => drop(done.send(self.medium.attach())),
        }
    }

    /// Does something that must not end the thread: others wait for it.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if self.broken {
            return Err(io::Error::other("a defect has ended this store's service"));
        }
        catch_unwind(AssertUnwindSafe(|| work(self))).unwrap_or_else(|_| {
            self.broken = true;
            log::error!("a defect of this server: a store's cache panicked; all that follows fails");
            Err(io::Error::other("a defect of this server"))
        })
    }

    fn execute(&mut self, io: &Io) -> io::Result<()> {
        match io.op {
            Op::Read { offset } => self.read(io, offset),
            Op::Write { offset, durable } => {
                let len = io.buffers.len();
                if durable || self.make_room(len)? == Room::Never {
                    return self.write_through(io, offset..offset.saturating_add(len));
                }
                let mut data = vec![0; usize::try_from(len).map_err(io::Error::other)?];
                io.buffers.copy_to_slice(0, &mut data);
                self.cache.push(Unflushed::new(offset, len, Content::Data(data.into())));
                Ok(())
            }
            Op::WriteZeroes { offset, len, durable: true, .. } => {
                self.write_through(io, offset..offset.saturating_add(len))
            }
            Op::WriteZeroes { offset, len, unmap, durable: false } => {
                self.make_room(0)?;
                self.cache.push(Unflushed::new(offset, len, Content::Zeroes { unmap }));
                Ok(())
            }
            Op::Discard { .. } => self.medium.hand_on(io),
            Op::Flush => self.flush(),
        }
    }

    fn read(&mut self, io: &Io, offset: u64) -> io::Result<()> {
        self.medium.hand_on(io)?;
        let bytes = offset..offset.saturating_add(io.buffers.len());
        for (range, part) in self.cache.overlaying(&bytes) {
            let at = range.start.saturating_sub(offset);
            match part {
                Part::Data(data) => {
                    io.buffers.copy_from_slice(at, data);
                }
                Part::Zeroes { .. } => {
                    let mut zeroes = PinnedBuffers::default();
                    io.buffers.part(at, range.end.saturating_sub(range.start), &mut zeroes);
                    zeroes.fill(0);
                }
            }
        }
        Ok(())
    }

    /// Changes the store itself, which then has something newer than the cache.
    fn write_through(&mut self, io: &Io, bytes: Range<u64>) -> io::Result<()> {
        self.medium.hand_on(io)?;
        self.cache.supersede(&bytes);
        Ok(())
    }

    /// Writes down the oldest until so many bytes have room, if they ever have.
    fn make_room(&mut self, bytes: u64) -> io::Result<Room> {
        loop {
            match self.cache.room(bytes) {
                Room::Later => self.write_down_oldest()?,
                other => return Ok(other),
            }
        }
    }

    fn write_down_oldest(&mut self) -> io::Result<()> {
        if let Some(oldest) = self.cache.oldest() {
            self.medium.write_down(oldest)?;
            self.cache.pop();
            self.counts.written_down.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What cannot be written down stays in the cache, for the next time.
    fn flush(&mut self) -> io::Result<()> {
        while self.cache.oldest().is_some() {
            self.write_down_oldest()?;
        }
        self.medium.execute(Op::Flush, PinnedBuffers::default())
    }

    fn cut(&mut self, cut: PowerCut, seed: u64) -> io::Result<Survivors> {
        // Release: a queue that is attached with this number is attached after the cut.
        self.counts.cuts.fetch_add(1, Ordering::Release);
        let survivors = self.cache.cut(cut, seed);
        self.flush()?;
        Ok(survivors)
    }
}

impl Medium {
    fn new(store: Arc<dyn Store>) -> io::Result<Self> {
        let file = File::from(memfd_create(c"cache", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(PIECE)?;
        let file = Arc::new(MemoryFile::map(file).map_err(io::Error::other)?);
        let table = Arc::new(SharedTable::default());
        let mapping = Mapping::of_file(0, PIECE, Access::READ_WRITE, file, 0).map_err(io::Error::other)?;
        table.map(mapping).map_err(io::Error::other)?;
        let waker = Waker::new()?;
        // Stores that need the kernel's say so.
        let ring = Rc::new(Uring::new(&waker).unwrap_or_else(|_| Uring::without_kernel(&waker)));
        let mut medium = Self { store, ring, backend: None, memory: GuestMemory::new(table) };
        medium.attach()?;
        Ok(medium)
    }

    fn attach(&mut self) -> io::Result<()> {
        self.backend = Some(self.store.attach(&self.ring, 0)?);
        Ok(())
    }

    /// Has the store do an operation as it is.
    fn hand_on(&mut self, io: &Io) -> io::Result<()> {
        let mut buffers = PinnedBuffers::default();
        io.buffers.part(0, io.buffers.len(), &mut buffers);
        self.execute(io.op, buffers)
    }

    /// Writes what is left of a write.
    fn write_down(&mut self, write: &Unflushed) -> io::Result<()> {
        for (range, part) in write.parts() {
            match part {
                Part::Zeroes { unmap } => {
                    let len = range.end.saturating_sub(range.start);
                    let op = Op::WriteZeroes { offset: range.start, len, unmap, durable: false };
                    self.execute(op, PinnedBuffers::default())?;
                }
                Part::Data(data) => {
                    let mut offset = range.start;
                    for piece in data.chunks(PIECE as usize) {
                        let mut buffers = PinnedBuffers::default();
                        let len = piece.len() as u64;
                        self.memory.pin(0, len, Access::READ_WRITE, &mut buffers).map_err(io::Error::other)?;
                        buffers.copy_from_slice(0, piece);
                        self.execute(Op::Write { offset, durable: false }, buffers)?;
                        offset = offset.saturating_add(len);
                    }
                }
            }
        }
        Ok(())
    }

    /// Does an operation and waits for it.
    fn execute(&mut self, op: Op, buffers: PinnedBuffers) -> io::Result<()> {
        let Some(backend) = &mut self.backend else {
            return Err(io::Error::other("nothing is attached to the store"));
        };
        let mut todo = Some(Box::new(Io::new(0, op, buffers)));
        let mut done = Vec::new();
        loop {
            // One at a time there is room, unless operations of a backend before have still not ended.
            if let Some(io) = todo.take()
                && let Err(Full(io)) = backend.submit(io)
            {
                todo = Some(io);
            }
            self.ring.submit()?;
            backend.reap(&mut done);
            if let Some(completion) = done.pop() {
                return completion.result;
            }
            self.ring.wait()?;
        }
    }
}
