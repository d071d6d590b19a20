//! Where a panic in a queue's task ends.
//!
//! A panic is a defect of this server's, and what the task was doing is half done: it is not called again. But it is the
//! fault of one queue, and no reason to take the others, of other guests, with it. The queue's device needs a reset, and
//! all that belonged to the task goes, but for what the kernel is still at work on: the ring keeps that until it is over, and
//! until then the queue counts as one with something in flight, so that no reset is said to be done before.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use virtio::queue::{Armed, QueueState};

use super::{Left, QueueTask, Round, Share, TaskBuilder};
use crate::backend::uring::Uring;

#[cfg(not(panic = "unwind"))]
compile_error!("a panic must end one queue and not the process: build with panic = \"unwind\"");

/// A queue's task, or what is left when it has panicked: a queue that takes nothing and gives nothing back.
pub(super) struct Guarded {
    /// `None` when it has panicked.
    task: Option<Box<dyn QueueTask>>,
    /// Where it stood then.
    state: QueueState,
    ring: Rc<Uring>,
}

impl Guarded {
    /// Makes the task.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(super) fn build(build: TaskBuilder, ring: &Rc<Uring>) -> io::Result<Self> {
        let task =
            guarded(|| build(ring)).map_err(|why| io::Error::other(format!("making its task panicked: {why}")))?;
        Ok(Self { task: Some(task?), state: QueueState::default(), ring: Rc::clone(ring) })
    }

    fn call<R>(&mut self, when_given_up: R, call: impl FnOnce(&mut dyn QueueTask) -> R) -> R {
        let Some(task) = self.task.as_mut() else { return when_given_up };
        match guarded(|| call(task.as_mut())) {
            Ok(result) => result,
            Err(why) => {
                self.give_up(&format!("a defect of this server: serving it panicked: {why}"));
                when_given_up
            }
        }
    }

    /// Whether the kernel is done with what tasks of this thread have left behind, this one and others: they are not told apart.
    fn is_at_rest(&self) -> bool {
        !self.ring.has_orphans()
    }
}

impl QueueTask for Guarded {
    fn run(&mut self, share: Share) -> Round {
        if self.task.is_none() {
            // What the kernel gives back is let go of here, as nobody else may look.
            let _told_when_asked = self.is_at_rest();
        }
        self.call(Round::Nothing, |task| task.run(share))
    }

    fn arm(&mut self) -> Armed {
        self.call(Armed::Sleep, |task| task.arm())
    }

    fn kicked(&mut self) {
        self.call((), |task| task.kicked());
    }

    fn refresh(&mut self) {
        self.call((), |task| task.refresh());
    }

    fn stop(&mut self) {
        self.call((), |task| task.stop());
    }

    fn hurry(&mut self) {
        self.call((), |task| task.hurry());
    }

    fn in_flight(&self) -> usize {
        match &self.task {
            Some(task) => task.in_flight(),
            None => usize::from(!self.is_at_rest()),
        }
    }

    fn is_dormant(&self) -> bool {
        self.task.as_ref().is_some_and(|task| task.is_dormant())
    }

    fn leave(&mut self) -> Left {
        self.call(None, |task| Some(task.leave())).unwrap_or(self.state.into())
    }

    #[cold]
    fn give_up(&mut self, why: &str) {
        let Some(mut task) = self.task.take() else { return };
        let told = guarded(|| task.give_up(why));
        self.state = guarded(|| task.leave().state).unwrap_or_default();
        if let Err(why) = told.and(guarded(|| drop(task))) {
            log::error!("giving up a queue panicked too: {why}");
        }
    }
}

/// What the call returns, or the message of its panic.
pub(super) fn guarded<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    // What a panic leaves half done is not looked at: its owner drops it.
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| message(&*payload))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::fd::OwnedFd;
    use std::thread;
    use std::time::{Duration, Instant};

    use crossbeam::channel::{Receiver, Sender, unbounded};

    use super::*;
    use crate::backend::uring::Waker;
    use crate::backend::uring::testing::client_at_work;
    use crate::config::{PollPolicy, SandboxMode};
    use crate::sandbox::Sandbox;
    use crate::worker::{Attached, Pool, WorkerPlan};

    /// Guards against hanging only.
    const LIMIT: Duration = Duration::from_secs(60);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Call {
        Run,
        Arm,
        Kicked,
        Refresh,
        Stop,
        InFlight,
    }

    /// What a task says of itself.
    #[derive(Debug, PartialEq, Eq)]
    enum Told {
        Kicked,
        GivenUp(String),
    }

    /// Panics in one of its calls, once it was kicked or otherwise called to; may have a read in flight, which goes on.
    struct Task {
        defect: Option<Call>,
        kicked: Cell<bool>,
        told: Sender<Told>,
        read: Option<Box<dyn Any>>,
    }

    impl Task {
        fn called(&self, call: Call) {
            assert!(!(self.defect == Some(call) && self.kicked.get()), "in {call:?}");
        }
    }

    impl QueueTask for Task {
        fn hurry(&mut self) {}

        fn run(&mut self, _: Share) -> Round {
            self.called(Call::Run);
            Round::Nothing
        }

        fn arm(&mut self) -> Armed {
            self.called(Call::Arm);
            Armed::Sleep
        }

        fn kicked(&mut self) {
            self.kicked.set(true);
            self.told.send(Told::Kicked).unwrap();
            self.called(Call::Kicked);
        }

        fn refresh(&mut self) {
            self.called(Call::Refresh);
        }

        fn stop(&mut self) {
            self.called(Call::Stop);
        }

        fn in_flight(&self) -> usize {
            self.called(Call::InFlight);
            usize::from(self.read.is_some())
        }

        fn is_dormant(&self) -> bool {
            false
        }

        fn leave(&mut self) -> Left {
            QueueState { next_avail: 7, ..QueueState::default() }.into()
        }

        fn give_up(&mut self, why: &str) {
            self.told.send(Told::GivenUp(why.to_owned())).unwrap();
            assert!(self.defect.is_none(), "once more");
        }
    }

    fn given_up(told: &Receiver<Told>, in_call: Call) {
        match told.recv_timeout(LIMIT).unwrap() {
            Told::GivenUp(why) => assert!(why.ends_with(&format!("panicked: in {in_call:?}")), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    fn pool(workers: usize) -> Pool {
        Pool::new(vec![WorkerPlan::default(); workers], &Sandbox::new(SandboxMode::Off, &[], &[]).unwrap()).unwrap()
    }

    /// What makes a task, what the task then says, and what ends its read.
    fn task(defect: Option<Call>, at_work: bool) -> (TaskBuilder, Receiver<Told>, Receiver<OwnedFd>) {
        let (told, hear) = unbounded();
        let (give_end, end) = unbounded();
        let build = move |ring: &Rc<Uring>| -> io::Result<Box<dyn QueueTask>> {
            let read = at_work.then(|| {
                let (client, end) = client_at_work(ring);
                give_end.send(end).unwrap();
                client
            });
            Ok(Box::new(Task { defect, kicked: Cell::new(false), told, read }))
        };
        (Box::new(build), hear, end)
    }

    /// Has a pool's only worker serve a task.
    fn attach(pool: &Pool, defect: Option<Call>, at_work: bool) -> (Attached, Receiver<Told>, Option<OwnedFd>) {
        let (build, hear, end) = task(defect, at_work);
        let attached = pool.attach(build, PollPolicy::Never, None).unwrap();
        (attached, hear, end.recv().ok())
    }

    #[test]
    fn a_panic_ends_the_task_wherever_it_comes() {
        let ring = Rc::new(Uring::new(&Waker::new().unwrap()).unwrap());
        for call in [Call::Run, Call::Arm, Call::Kicked, Call::Refresh, Call::Stop] {
            let (build, hear, end) = task(Some(call), true);
            let mut task = Guarded::build(build, &ring).unwrap();
            task.kicked();
            for _ in 0..2 {
                assert_eq!(task.run(Share::Whole), Round::Nothing);
                assert_eq!(task.arm(), Armed::Sleep);
                task.refresh();
                task.stop();
                task.kicked();
            }
            assert_eq!(hear.recv_timeout(LIMIT), Ok(Told::Kicked));
            given_up(&hear, call);
            assert!(hear.recv().is_err(), "nothing more is asked of it, and it is gone");
            assert_eq!(task.leave().state.next_avail, 7);
            assert_eq!(task.in_flight(), 1, "the kernel is still at work");
            drop(end);
            let limit = Instant::now() + LIMIT;
            while task.in_flight() > 0 {
                assert!(Instant::now() < limit);
                thread::yield_now();
            }
        }
    }

    #[test]
    fn other_queues_of_the_worker_go_on() {
        let pool = pool(1);
        let (good, heard, _) = attach(&pool, None, false);
        let (bad, told, end) = attach(&pool, Some(Call::Run), true);
        bad.doorbell().ring();
        assert_eq!(told.recv_timeout(LIMIT), Ok(Told::Kicked));
        given_up(&told, Call::Run);
        bad.doorbell().ring();
        let detaching = bad.detach();
        for _ in 0..3 {
            good.doorbell().ring();
            assert_eq!(heard.recv_timeout(LIMIT), Ok(Told::Kicked));
        }
        assert!(detaching.wait_until(Instant::now()).is_none(), "the kernel is still at work");
        drop(end);
        assert_eq!(detaching.wait_until(Instant::now() + LIMIT).map(|left| left.state.next_avail), Some(7));
        good.doorbell().ring();
        assert_eq!(heard.recv_timeout(LIMIT), Ok(Told::Kicked));
        assert!(good.detach().wait_until(Instant::now() + LIMIT).is_some());
    }

    #[test]
    fn a_task_that_cannot_be_made_is_an_error() {
        let pool = pool(1);
        let result = pool.attach(Box::new(|_| panic!("no such luck")), PollPolicy::Never, None);
        let error = result.map(drop).unwrap_err().to_string();
        assert!(error.contains("no such luck"), "{error}");
        let (queue, ..) = attach(&pool, None, false);
        assert!(queue.detach().wait_until(Instant::now() + LIMIT).is_some());
    }

    #[test]
    fn a_worker_that_panics_gives_up_its_queues_and_serves_new_ones() {
        let pool = pool(1);
        let (good, heard, _) = attach(&pool, None, false);
        // Nothing guards a call that changes nothing: the panic is the worker's.
        let (bad, told, _) = attach(&pool, Some(Call::InFlight), false);
        bad.doorbell().ring();
        assert_eq!(told.recv_timeout(LIMIT), Ok(Told::Kicked));
        given_up(&told, Call::InFlight);
        given_up(&heard, Call::InFlight);
        for queue in [good, bad] {
            assert!(queue.detach().wait_until(Instant::now() + LIMIT).is_some());
        }
        let (queue, heard, _) = attach(&pool, None, false);
        queue.doorbell().ring();
        assert_eq!(heard.recv_timeout(LIMIT), Ok(Told::Kicked));
        assert!(queue.detach().wait_until(Instant::now() + LIMIT).is_some());
    }
}
