//! A worker thread's way into the kernel, shared by all backends on that thread.
//!
//! - [`Uring`]: what the worker holds. It starts what was queued, and sleeps until there is something to do.
//! - [`Waker`]: ends that sleep, from any thread.
//! - `Client`: one backend's place on the ring, with the operations it has in flight.
//! - `Ring`: the io_urings themselves: one that the thread sleeps in, and one that is polled for devices that ask for it.
//!   Where operations outlive their backend, it keeps them.
//! - `FileTable`, `FixedMemory`: files and guest memory that the kernel has been told of once, for all requests.
//!
//! # Safety
//! What an entry of the ring leads to must stay as it is until the kernel is done with it. The argument in three parts:
//! 1. An `Operation` owns or shares everything its entry leads to, at addresses that stay when it is moved.
//! 2. A `Client` keeps each operation in its slot, untouched, until the kernel's completion of its last entry.
//! 3. A client that is dropped before leaves its operations to the ring, which keeps them until their completions.
//!    A ring that is dropped before waits for them; what is still in flight after that is never freed.

mod accounts;
mod client;
mod elsewhere;
mod files;
mod lane;
mod memory;
mod probe;
mod restrictions;
mod ring;
mod setup;
#[cfg(test)]
pub(crate) mod testing;

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

pub(super) use client::{Client, Operation, Step};
pub(super) use elsewhere::Elsewhere;
use elsewhere::Left;
pub(super) use files::{FileName, RegisteredFile};
pub(super) use lane::{FixedBuffers, Lane};
pub(super) use probe::can_poll;
use ring::Ring;
pub use setup::{SqPoll, UringError};

/// What a ring is to have beyond what all have.
#[derive(Clone, Copy, Debug, Default)]
pub struct UringOptions {
    /// A thread of the kernel's that submits in place of the ring's own.
    pub sqpoll: Option<SqPoll>,
    /// A second io_uring, for files whose completions are looked for.
    pub iopoll: bool,
}

/// Ends the sleep of one thread in [`Uring::wait`].
///
/// A wake is never lost: if the thread does not sleep, its next wait returns at once.
#[derive(Clone, Debug)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// A new one, for one ring.
    ///
    /// # Errors
    /// If the system is out of descriptors.
    pub fn new() -> io::Result<Self> {
        // Blocking, for a ring reads it: a nonblocking one would answer at once that there is nothing to read.
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?)))
    }

    /// Wakes the thread, now or as soon as it wants to sleep.
    pub fn wake(&self) {
        // Fails or blocks only when the counter is at its end, 2^64 wakes ahead of a thread that sleeps.
        if let Err(error) = self.0.write(1) {
            log::error!("cannot wake a worker: {error}");
        }
    }

    /// Sleeps until woken.
    fn sleep(&self) -> io::Result<()> {
        match self.0.read() {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One thread's io_uring, or its stand-in where there is none.
#[derive(Debug)]
pub struct Uring {
    waker: Waker,
    ring: Option<Rc<RefCell<Ring>>>,
    left: Left,
}

impl Uring {
    /// A ring for the thread that calls, which sleeps until `waker` wakes it.
    ///
    /// # Errors
    /// If the kernel offers none.
    pub fn new(waker: &Waker) -> Result<Self, UringError> {
        Self::with(waker, UringOptions::default())
    }

    /// A ring as [`new`](Self::new) makes it, with more.
    ///
    /// # Errors
    /// If the kernel does not offer all of it.
    pub fn with(waker: &Waker, options: UringOptions) -> Result<Self, UringError> {
        let polled = if options.iopoll { Some(setup::polled()?) } else { None };
        let ring = Ring::new(setup::best(options.sqpoll)?, polled, waker);
        Ok(Self { waker: waker.clone(), ring: Some(Rc::new(RefCell::new(ring))), left: Left::default() })
    }

    /// A stand-in that only sleeps, for stores that need no kernel; the others refuse to attach to it.
    pub fn without_kernel(waker: &Waker) -> Self {
        Self { waker: waker.clone(), ring: None, left: Left::default() }
    }

    /// Starts what all backends have queued and is not started yet, in one system call if there is anything.
    ///
    /// # Errors
    /// If the ring is broken. That the kernel is out of resources is no error: what is left goes with the next call.
    pub fn submit(&self) -> io::Result<()> {
        self.ring.as_ref().map_or(Ok(()), |ring| ring.borrow_mut().submit())
    }

    /// Starts what all backends have queued and sleeps until one of them has something to reap or the thread is
    /// woken, in one system call. May return for no reason.
    ///
    /// # Errors
    /// If the ring is broken.
    pub fn wait(&self) -> io::Result<()> {
        let Some(ring) = &self.ring else {
            return self.waker.sleep();
        };
        // Dropped only when the ring is not borrowed any more: they may own more than bytes.
        let _over = ring.borrow_mut().wait()?;
        Ok(())
    }

    /// Whether completions have to be looked for now: a wait does not sleep then.
    pub fn is_polling(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.borrow().is_polling())
    }

    /// Looks for what has completed, and says whether the kernel or another thread is still at work for backends that are
    /// gone.
    pub(crate) fn has_orphans(&self) -> bool {
        let elsewhere = self.left.any();
        let Some(ring) = &self.ring else { return elsewhere };
        // An error comes again where it can be told: on the next wait. Dropped when the ring is not borrowed, as in `wait`.
        let _over = ring.borrow_mut().reap();
        ring.borrow_mut().accounts().has_orphans() || elsewhere
    }

    /// What ends the sleep of this ring's thread.
    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Keeps an eye on what other threads do for a backend that is gone. They wake this thread when it is over.
    pub(super) fn leave(&self, work: Arc<dyn Elsewhere>) {
        self.left.add(work);
    }

    /// Whether it is the kernel's, and no stand-in.
    pub(super) fn has_kernel(&self) -> bool {
        self.ring.is_some()
    }
    /// Whether it has a [`Lane::Polled`].
    pub(super) fn has_polled_lane(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.borrow().has_polled())
    }

    /// Registers a file with a lane; `None` if there is no room, and the file's descriptor must do.
    pub(super) fn register(&self, lane: Lane, file: &impl AsFd) -> Option<RegisteredFile> {
        let ring = self.ring.as_ref()?;
        let entry = ring.borrow_mut().add_file(lane, file.as_fd())?;
        Some(RegisteredFile { ring: Rc::downgrade(ring), lane, entry })
    }

    /// Lets an operation make its entry outside of a client.
    #[cfg(test)]
    pub(super) fn with_fixed_buffers<R>(&self, make: impl FnOnce(&mut FixedBuffers<'_>) -> R) -> R {
        make(&mut self.ring.as_ref().unwrap().borrow_mut().fixed_buffers(Lane::Interrupt))
    }

    /// How many files and pieces of guest memory are registered.
    #[cfg(test)]
    pub(super) fn registered(&self) -> (usize, usize) {
        self.ring.as_ref().unwrap().borrow().registered()
    }

    /// How many system calls the ring has made.
    pub fn system_calls(&self) -> u64 {
        self.ring.as_ref().map_or(0, |ring| ring.borrow().system_calls())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use io_uring::{opcode, squeue};

    use super::setup::Setup;
    use super::*;
    use crate::backend::contract::Rig;
    use crate::backend::file::{Cache, FileOptions, FileStore};
    use crate::backend::{Op, Store};

    /// A thread that falls asleep as often as it can.
    const SQPOLL: SqPoll = SqPoll { idle: 1, cpu: None };

    /// All ways to have the kernel submit.
    fn setups() -> impl Iterator<Item = Setup> {
        Setup::plain().into_iter().chain([Setup::threaded(SQPOLL)])
    }

    /// All forms that the system offers.
    fn forms(waker: &Waker) -> Vec<Uring> {
        let rings = setups().filter_map(|setup| setup.build(8).ok()).map(|kernel| Ring::new(kernel, None, waker));
        let mut forms: Vec<_> = rings
            .map(|ring| Uring { waker: waker.clone(), ring: Some(Rc::new(RefCell::new(ring))), left: Left::default() })
            .collect();
        assert!(!forms.is_empty(), "no io_uring here: {:?}", Uring::new(waker));
        forms.push(Uring::without_kernel(waker));
        forms
    }

    #[test]
    fn a_wake_before_the_wait_ends_it() {
        let waker = Waker::new().unwrap();
        for form in forms(&waker) {
            for _ in 0..3 {
                waker.wake();
                waker.wake();
                form.wait().unwrap();
            }
        }
    }

    #[test]
    fn a_wake_that_is_reaped_while_awake_ends_the_next_wait() {
        let waker = Waker::new().unwrap();
        for form in forms(&waker) {
            waker.wake();
            form.wait().unwrap();
            let Some(ring) = &form.ring else { continue };
            // Leaves the wake's entry with the kernel; a fault in the order of things would hang here.
            ring.borrow_mut().arm();
            form.submit().unwrap();
            waker.wake();
            while !ring.borrow().has_rung() {
                ring.borrow_mut().reap().unwrap();
            }
            form.wait().unwrap();
        }
    }

    fn store(dir: &tempfile::TempDir) -> FileStore {
        let path = dir.path().join("image");
        let size = Some(1 << 20);
        FileStore::open(&FileOptions {
            path,
            read_only: false,
            cache: Cache::None,
            size,
            fixed_buffers: false,
            iopoll: false,
        })
        .unwrap()
    }

    #[test]
    fn batches_may_be_larger_than_the_queue() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        for setup in setups() {
            let Ok(kernel) = setup.build(8) else { continue };
            let kernel = Cell::new(Some(kernel));
            let mut rig = Rig::on(&store, |waker| {
                let ring = Ring::new(kernel.take().unwrap(), None, waker);
                Uring { waker: waker.clone(), ring: Some(Rc::new(RefCell::new(ring))), left: Left::default() }
            });
            for _ in 0..3 {
                for n in 0..100 {
                    let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
                    rig.submit(Op::Read { offset: n * 4096 }, buffers).unwrap();
                }
                let done = rig.finish();
                assert_eq!(done.len(), 100);
                assert!(done.iter().all(|done| done.result.is_ok()));
            }
        }
    }

    #[test]
    fn there_are_never_more_completions_than_the_ring_holds() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let mut rig = Rig::new(&store);
        let mut others = Vec::new();
        let mut taken = 0;
        loop {
            let buffers = rig.guest.buffers(&[(0, 512)]);
            if rig.submit(Op::Read { offset: 0 }, buffers).is_ok() {
                taken += 1;
            } else if rig.backend.in_flight() == 0 {
                break;
            } else {
                // The backend is full: another one, until the ring is.
                rig.ring.submit().unwrap();
                others.push(std::mem::replace(&mut rig.backend, store.attach(&rig.ring, 0).unwrap()));
                rig.forget();
            }
            assert!(taken < 1 << 16, "without a bound");
        }
        let mut done = Vec::new();
        while others.iter().any(|other| other.in_flight() > 0) {
            others.iter_mut().for_each(|other| other.reap(&mut done));
        }
        assert_eq!(done.len(), taken);
        let buffers = rig.guest.buffers(&[(0, 512)]);
        rig.one(Op::Read { offset: 0 }, buffers).result.unwrap();
    }

    #[test]
    fn no_wake_is_lost() {
        const ROUNDS: u64 = 20_000;
        let waker = Waker::new().unwrap();
        for form in forms(&waker) {
            let (asked, answered) = (AtomicU64::new(0), AtomicU64::new(0));
            thread::scope(|scope| {
                scope.spawn(|| {
                    for round in 1..=ROUNDS {
                        asked.store(round, Ordering::SeqCst);
                        waker.wake();
                        // Alternates between a sleeping thread and one that is awake.
                        while round % 2 == 0 && answered.load(Ordering::SeqCst) < round {
                            thread::yield_now();
                        }
                    }
                });
                while answered.load(Ordering::SeqCst) < ROUNDS {
                    form.wait().unwrap();
                    answered.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
                }
            });
        }
    }

    /// Thousands of requests, each of which finds the submission thread awake, asleep, or about to fall asleep.
    #[test]
    fn no_request_is_lost_on_a_thread_that_falls_asleep() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let mut rig =
            Rig::on(&store, |waker| Uring::with(waker, UringOptions { sqpoll: Some(SQPOLL), iopoll: false }).unwrap());
        let pause = |micros: u64| {
            let end = std::time::Instant::now() + std::time::Duration::from_micros(micros);
            while std::time::Instant::now() < end {
                std::hint::spin_loop();
            }
        };
        for round in 0..1000 {
            let buffers = rig.guest.buffers(&[(0, 512)]);
            rig.one(Op::Read { offset: round % 2048 * 512 }, buffers).result.unwrap();
            // Around the millisecond after which the thread sleeps.
            if round % 4 == 0 {
                pause(900 + round * 7 % 400);
            }
        }
    }

    #[test]
    fn a_thread_that_submits_spares_the_system_calls() {
        const READS: u64 = 2000;
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let sqpoll = Some(SqPoll { idle: 10_000, cpu: None });
        let mut rig = Rig::on(&store, |waker| Uring::with(waker, UringOptions { sqpoll, iopoll: false }).unwrap());
        for n in 0..READS {
            let buffers = rig.guest.buffers(&[(0, 4096)]);
            rig.submit(Op::Read { offset: n % 256 * 4096 }, buffers).unwrap();
            rig.ring.submit().unwrap();
            rig.look_until_done();
        }
        assert!(rig.ring.system_calls() < READS / 10, "{} calls", rig.ring.system_calls());
    }

    /// Does nothing, `left` times, on a lane; nothing is what a polled lane does without a device too.
    struct Nothing {
        lane: Lane,
        left: u8,
    }

    // SAFETY: its entries lead nowhere.
    unsafe impl Operation for Nothing {
        type Context = Rc<()>;

        fn lane(&self, _: &Rc<()>) -> Lane {
            self.lane
        }

        fn entry(&mut self, _: &Rc<()>, _: &mut FixedBuffers<'_>) -> squeue::Entry {
            opcode::Nop::new().build()
        }

        fn landed(&mut self, _: &Rc<()>, result: i32) -> Step {
            assert_eq!(result, 0);
            self.left -= 1;
            // Now the other one.
            self.lane = if self.lane == Lane::Polled { Lane::Interrupt } else { Lane::Polled };
            if self.left > 0 { Step::Again } else { Step::Over }
        }
    }

    fn polled_ring() -> Uring {
        Uring::with(&Waker::new().unwrap(), UringOptions { sqpoll: None, iopoll: true }).unwrap()
    }

    #[test]
    fn operations_may_change_lanes() {
        let ring = polled_ring();
        let mut client = Client::new(&ring, Rc::new(())).unwrap();
        for _ in 0..3 {
            for n in 0..200 {
                let lane = if n % 2 == 0 { Lane::Polled } else { Lane::Interrupt };
                assert!(client.start(Nothing { lane, left: 1 + n % 5 }).is_ok());
            }
            assert!(ring.is_polling());
            let mut done = 0;
            while client.in_flight() > 0 {
                // Neither sleeps as long as there is something to look for.
                ring.wait().unwrap();
                client.reap(|_| done += 1);
            }
            assert_eq!(done, 200);
            assert!(!ring.is_polling());
        }
    }

    #[test]
    fn a_polled_lane_is_emptied_for_clients_that_are_gone() {
        for submitted in [false, true] {
            let (ring, context) = (polled_ring(), Rc::new(()));
            let mut client = Client::new(&ring, Rc::clone(&context)).unwrap();
            for _ in 0..100 {
                assert!(client.start(Nothing { lane: Lane::Polled, left: 1 }).is_ok());
            }
            if submitted {
                ring.submit().unwrap();
            }
            drop(client);
            assert_eq!(Rc::strong_count(&context), 2, "kept until the kernel is done");
            drop(ring);
            assert_eq!(Rc::strong_count(&context), 1);
        }
    }

    #[test]
    fn a_ring_without_a_polled_lane_has_one_lane() {
        let ring = Uring::new(&Waker::new().unwrap()).unwrap();
        assert!(!ring.has_polled_lane() && polled_ring().has_polled_lane());
        let mut client = Client::new(&ring, Rc::new(())).unwrap();
        assert!(client.start(Nothing { lane: Lane::Polled, left: 2 }).is_ok());
        assert!(!ring.is_polling());
        while client.in_flight() > 0 {
            ring.wait().unwrap();
            client.reap(drop);
        }
    }
}
