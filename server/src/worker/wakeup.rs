//! The flags by which a worker and those who want something of it agree on who wakes whom.

use super::sync::{AtomicBool, Ordering, fence};

/// Whether a worker sleeps.
///
/// Whoever leaves something for the worker calls [`must_wake`](Self::must_wake) afterwards; the worker calls
/// [`fall_asleep`](Self::fall_asleep) before it sleeps. Both store first and then look at what the other stores: the
/// store-buffer pattern again, and again the full barrier is inside.
///
/// The flag is only ever swapped, so that all its changes have one order and each follows the one that it has read.
/// (By the language a store would do for the worker's changes; loom would then let a sender's swap come after a store
/// that it did not read.)
#[derive(Debug, Default)]
pub(super) struct Awake {
    asleep: AtomicBool,
}

impl Awake {
    /// Whether the worker must be woken for what was left for it just before. Of several who ask, one is told so.
    pub(super) fn must_wake(&self) -> bool {
        // ORDERING: our store is what was left for the worker, our load is `asleep`. The worker's pair, in
        // `fall_asleep`: it stores `asleep`, has a full barrier, and looks at what was left. Without ours the load may
        // be done before the store is seen: we find the worker awake, it finds nothing, and it sleeps on what we left.
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }

    /// Says that the worker is about to sleep, unless `anything_left` then finds something.
    pub(super) fn fall_asleep(&self, anything_left: impl FnOnce() -> bool) -> bool {
        self.asleep.swap(true, Ordering::Relaxed);
        // ORDERING: our store is `asleep`, our load is what others leave for us: the other half of `must_wake`.
        // Without it we may find nothing while whoever just left something still finds us awake.
        fence(Ordering::SeqCst);
        let sleep = !anything_left();
        if !sleep {
            self.woke_up();
        }
        sleep
    }

    /// Says that the worker is awake.
    pub(super) fn woke_up(&self) {
        self.asleep.swap(false, Ordering::Relaxed);
    }
}

/// Whether a doorbell was rung and nobody has answered yet.
///
/// Whoever rings changes something first, for the worker to find; the worker answers first and looks afterwards.
#[derive(Debug, Default)]
pub(super) struct Rung(AtomicBool);

impl Rung {
    /// Rings. True for the one who must tell the worker; for all others somebody has told it, or is about to.
    pub(super) fn ring(&self) -> bool {
        // AcqRel, here and in `answer`: if this finds the bell rung, then the worker, when it answers, sees all that
        // was done before this ring. It must be a swap in both, since only what reads a ring acquires it.
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Stops the bell: the next ring tells the worker again.
    pub(super) fn answer(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

/// The flags under loom. A worker that sleeps in spite of something left for it is a deadlock, which loom reports.
///
/// What loom can and cannot see is said with the models of the rings (`virtio/src/queue/model/mod.rs`). Here it comes to
/// this: at most three threads, one worker and two that want something of it, and with three at most three preemptions; what they leave is stored Relaxed, weaker
/// than any queue would, so that the flags alone must order it; and the eventfd is a `Notify`, which may also wake
/// for nothing. That the fences are needed is shown by `cargo xtask mutants`.
#[cfg(all(test, loom))]
mod model {
    use std::sync::Arc;

    use loom::model::Builder;
    use loom::sync::Notify;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    /// A worker's letter box: a counter for each sender, and the flag.
    #[derive(Default)]
    struct Inbox {
        left: [AtomicUsize; 2],
        awake: Awake,
        waker: Notify,
    }

    impl Inbox {
        fn push(&self, sender: usize, letters: usize) {
            self.left[sender].store(letters, Ordering::Relaxed);
            if self.awake.must_wake() {
                self.waker.notify();
            }
        }

        fn left(&self) -> usize {
            self.left.iter().map(|left| left.load(Ordering::Relaxed)).sum()
        }

        /// The worker: sleeps until it has got `letters`.
        fn work(&self, letters: usize) {
            let mut got = 0;
            while got < letters {
                if self.awake.fall_asleep(|| self.left() > got) {
                    self.waker.wait();
                    self.awake.woke_up();
                }
                got = self.left();
            }
        }
    }

    #[test]
    fn something_is_left_while_the_worker_falls_asleep() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::default());
            let sender = Arc::clone(&inbox);
            let sender = thread::spawn(move || sender.push(0, 1));
            inbox.work(1);
            sender.join().unwrap();
        });
    }

    #[test]
    fn something_is_left_again_while_the_worker_falls_asleep_again() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::default());
            let sender = Arc::clone(&inbox);
            let sender = thread::spawn(move || {
                sender.push(0, 1);
                sender.push(0, 2);
            });
            inbox.work(2);
            sender.join().unwrap();
        });
    }

    #[test]
    fn two_leave_something_while_the_worker_falls_asleep() {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let inbox = Arc::new(Inbox::default());
            let senders = [0, 1].map(|sender| {
                let inbox = Arc::clone(&inbox);
                thread::spawn(move || inbox.push(sender, 1))
            });
            inbox.work(2);
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    /// A doorbell that two threads ring, each after it has changed an index of its own. One command waits for the worker at
    /// most, as in the letter box that ships: pushing and popping it is Release and Acquire.
    #[derive(Default)]
    struct Doorbell {
        index: [AtomicUsize; 2],
        rung: Rung,
        kicks: AtomicUsize,
    }

    impl Doorbell {
        fn ring(&self, ringer: usize, index: usize) {
            self.index[ringer].store(index, Ordering::Relaxed);
            if self.rung.ring() {
                self.kicks.fetch_add(1, Ordering::Release);
            }
        }

        /// The worker's turn: what it has seen of the indices, if there was a command.
        fn answer(&self) -> Option<usize> {
            (self.kicks.swap(0, Ordering::Acquire) > 0).then(|| {
                self.rung.answer();
                self.index.iter().map(|index| index.load(Ordering::Relaxed)).sum()
            })
        }

        /// All have rung, one turn of the worker was at the same time and may have `seen` something: what it
        /// did not see must be in the next.
        fn check(&self, seen: Option<usize>, all: usize) {
            assert!(self.kicks.load(Ordering::Relaxed) <= 1, "a ring that nobody answered was told of twice");
            assert_eq!(self.answer().or(seen), Some(all), "lost");
        }
    }

    #[test]
    fn a_bell_is_rung_twice_while_it_is_answered() {
        loom::model(|| {
            let bell = Arc::new(Doorbell::default());
            let ringer = Arc::clone(&bell);
            let ringer = thread::spawn(move || {
                ringer.ring(0, 1);
                ringer.ring(0, 2);
            });
            let seen = bell.answer();
            ringer.join().unwrap();
            bell.check(seen, 2);
        });
    }

    #[test]
    fn two_ring_while_the_bell_is_answered() {
        loom::model(|| {
            let bell = Arc::new(Doorbell::default());
            let ringers = [0, 1].map(|ringer| {
                let bell = Arc::clone(&bell);
                thread::spawn(move || bell.ring(ringer, 1))
            });
            let seen = bell.answer();
            for ringer in ringers {
                ringer.join().unwrap();
            }
            bell.check(seen, 2);
        });
    }
}
