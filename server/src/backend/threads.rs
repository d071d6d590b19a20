//! The queue of a store whose operations block: threads of the store's own do them, and wake the worker when one is done.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::{fmt, io};

use crossbeam::channel::{Receiver, Sender, bounded, select, unbounded};
use virtio::memory::PinnedBuffers;

use super::desk::{Desk, Queue};
use super::immediate::Execute;
use super::uring::Uring;
use super::{Backend, Io, Op};
use crate::sandbox::{Entrance, Sandbox, ThreadKind};

/// Threads of one store, shared by all of its queues. Dropped, they end after what they were given.
pub(super) struct Threads<S> {
    jobs: Option<Sender<Job<S>>>,
    threads: Vec<JoinHandle<()>>,
}

enum Job<S> {
    Do(Box<Io>, Arc<Desk>),
    Call(Call<S>),
}

/// What one of them is to do besides operations.
type Call<S> = Box<dyn FnOnce(&Shared<S>) + Send>;

/// What all threads of a store have.
struct Shared<S> {
    name: String,
    store: S,
    /// An operation has panicked: what the store knows of itself may be wrong from then on.
    broken: AtomicBool,
}

impl<S: Execute + Send + Sync + 'static> Threads<S> {
    /// Starts so many threads, which do nothing before `entrance` is open. They own the store, which is dropped by the last.
    ///
    /// # Errors
    /// If the system has no threads.
    pub(super) fn start(store: S, name: &str, count: usize, entrance: &Entrance) -> io::Result<Self> {
        let (jobs, queue) = unbounded();
        let mut all = Self { jobs: Some(jobs), threads: Vec::new() };
        let shared = Arc::new(Shared { name: name.to_owned(), store, broken: AtomicBool::new(false) });
        for index in 0..count {
            let (shared, queue, sandbox) = (Arc::clone(&shared), queue.clone(), entrance.queue_up());
            let thread = thread::Builder::new().name(format!("store-{index}"));
            all.threads.push(thread.spawn(move || shared.serve(&queue, &sandbox))?);
        }
        Ok(all)
    }

    /// One queue's access.
    pub(super) fn attach(&self, ring: &Rc<Uring>) -> io::Result<Box<dyn Backend>> {
        let jobs = self.jobs.clone().ok_or_else(gone)?;
        // Not refused as long as there is a thread, and they end with the store.
        let hand_in = move |io, desk| jobs.send(Job::Do(io, desk)).map_err(|error| error.into_inner());
        Ok(Box::new(Queue::new(ring, move |io, desk| {
            if let Err(Job::Do(io, desk)) = hand_in(io, desk) {
                desk.receive(io, |_| Err(gone()));
            }
        })))
    }

    /// Has one of the threads flush the store, and waits for it.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.call("a flush", |store| store.execute(&Io::new(0, Op::Flush, PinnedBuffers::default())))
    }

    /// Has one of the threads do something, `what`, to the store, and waits for it.
    pub(super) fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&S) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (done, result) = bounded(1);
        let job = Job::Call(Box::new(move |shared: &Shared<S>| {
            // Who asked has gone.
            let _ = done.send(shared.guarded(&what, work));
        }));
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(gone)?;
        result.recv().map_err(|_| gone())?
    }
}

impl<S> Drop for Threads<S> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of a store panicked");
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the store's threads have ended")
}

impl<S: Execute> Shared<S> {
    fn serve(&self, queue: &Receiver<Job<S>>, sandbox: &Receiver<Sandbox>) {
        let mut first = None;
        let entered = select! {
            recv(sandbox) -> sandbox => sandbox,
            recv(queue) -> job => match job {
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
        sandbox.enter_as(ThreadKind::Store);
        while let Some(job) = first.take().or_else(|| queue.recv().ok()) {
            match job {
                Job::Do(io, desk) => desk.receive(io, |io| self.guarded(&io.op, |store| store.execute(io))),
                Job::Call(work) => work(self),
            }
        }
    }

    /// Does something, `what`, unless the store is broken; a panic breaks it.
    fn guarded<T>(&self, what: &dyn fmt::Debug, work: impl FnOnce(&S) -> io::Result<T>) -> io::Result<T> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("a defect has ended this store's service"));
        }
        catch_unwind(AssertUnwindSafe(|| work(&self.store))).unwrap_or_else(|panic| {
            self.broken.store(true, Ordering::Relaxed);
            let why = message(&*panic);
            log::error!("{}: {what:?} panicked: {why}; all that follows fails", self.name);
            Err(io::Error::other(why.to_owned()))
        })
    }
}

/// What a panic says.
pub(super) fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::Completion;
    use crate::backend::contract::Guest;
    use crate::backend::uring::Waker;
    use crate::config::SandboxMode;

    /// Guards against hanging only.
    const LIMIT: Duration = Duration::from_secs(60);

    /// An entrance to no sandbox.
    fn open() -> Entrance {
        let entrance = Entrance::default();
        entrance.open(&Sandbox::new(SandboxMode::Off, &[], &[]).unwrap());
        entrance
    }

    /// Each read takes until a message comes; a flush is a defect.
    struct Slow(Mutex<mpsc::Receiver<()>>);

    impl Execute for Slow {
        fn execute(&self, io: &Io) -> io::Result<()> {
            match io.op {
                Op::Flush => panic!("no such luck"),
                _ => self.0.lock().unwrap().recv_timeout(LIMIT).map_err(io::Error::other),
            }
        }
    }

    fn slow(threads: usize, entrance: &Entrance) -> (Threads<Slow>, mpsc::Sender<()>) {
        let (go, gone) = mpsc::channel();
        (Threads::start(Slow(Mutex::new(gone)), "slow", threads, entrance).unwrap(), go)
    }

    fn read(guest: &mut Guest, token: u16) -> Box<Io> {
        Box::new(Io::new(token, Op::Read { offset: 0 }, guest.buffers(&[(u64::from(token) * 512, 512)])))
    }

    fn wait(ring: &Uring, backend: &mut dyn Backend) -> Vec<Completion> {
        let mut done = Vec::new();
        while backend.in_flight() > 0 {
            ring.wait().unwrap();
            backend.reap(&mut done);
        }
        done
    }

    /// Says whether there was a sandbox.
    struct Watchful(Arc<AtomicBool>);

    impl Execute for Watchful {
        fn execute(&self, _: &Io) -> io::Result<()> {
            if self.0.load(Ordering::SeqCst) { Ok(()) } else { Err(io::Error::other("outside")) }
        }
    }

    #[test]
    fn nothing_is_done_before_there_is_a_sandbox() {
        let (entrance, made) = (Entrance::default(), Arc::new(AtomicBool::new(false)));
        let threads = Threads::start(Watchful(Arc::clone(&made)), "watchful", 2, &entrance).unwrap();
        let ring = Rc::new(Uring::without_kernel(&Waker::new().unwrap()));
        let mut backend = threads.attach(&ring).unwrap();
        backend.submit(read(&mut Guest::new(), 0)).unwrap();
        // Time enough for a thread that does not wait.
        (0..1000).for_each(|_| thread::yield_now());
        made.store(true, Ordering::SeqCst);
        entrance.open(&Sandbox::new(SandboxMode::Off, &[], &[]).unwrap());
        assert!(wait(&ring, &mut *backend).pop().unwrap().result.is_ok());
    }

    #[test]
    fn a_store_that_is_given_up_before_there_is_a_sandbox_ends() {
        let entrance = Entrance::default();
        drop(slow(3, &entrance).0);
        let threads = slow(3, &entrance).0;
        drop(entrance);
        drop(threads);
    }

    #[test]
    fn a_ring_knows_of_operations_whose_backend_is_gone() {
        let (threads, go) = slow(1, &open());
        let ring = Rc::new(Uring::without_kernel(&Waker::new().unwrap()));
        let mut guest = Guest::new();
        let mut backend = threads.attach(&ring).unwrap();
        for token in 0..3 {
            backend.submit(read(&mut guest, token)).unwrap();
        }
        drop(backend);
        let release = guest.release();
        assert!(ring.has_orphans());
        assert!(!release.wait(Instant::now()));
        // One for the operation that runs at most; the others are not begun.
        go.send(()).unwrap();
        while ring.has_orphans() {
            ring.wait().unwrap();
        }
        assert!(release.wait(Instant::now()));
        assert!(!ring.has_orphans());
    }

    #[test]
    fn a_panic_ends_the_stores_service_and_nothing_else() {
        let (threads, go) = slow(2, &open());
        let ring = Rc::new(Uring::without_kernel(&Waker::new().unwrap()));
        let mut backend = threads.attach(&ring).unwrap();
        let mut guest = Guest::new();
        go.send(()).unwrap();
        backend.submit(read(&mut guest, 0)).unwrap();
        assert!(wait(&ring, &mut *backend).pop().unwrap().result.is_ok());
        assert!(threads.flush().unwrap_err().to_string().contains("no such luck"));
        backend.submit(read(&mut guest, 1)).unwrap();
        assert!(wait(&ring, &mut *backend).pop().unwrap().result.is_err());
        assert!(threads.flush().is_err());
    }
}
