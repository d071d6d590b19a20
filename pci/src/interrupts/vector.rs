//! One MSI-X vector: a line that may be swapped, masked or removed at any moment, and the pending
//! bit that keeps the interrupts which find no line.
//!
//! Two parties: workers [`signal`](Vector::signal), and the session [`install`](Vector::install)s
//! and removes the line, one call at a time. An interrupt is never lost: when both are done, it was
//! delivered to a line that was installed at that moment, or it is pending and no line is installed.
//! It may be delivered twice, which a driver must tolerate from any interrupt.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::slot::{Line, Slot, same};
use crate::sync::{AtomicBool, Ordering, fence};

/// A vector. The slot holds the line only while nothing masks the vector.
pub(crate) struct Vector<S = ArcSwapOption<Line>> {
    slot: S,
    /// The vector's bit in the Pending Bit Array.
    pending: AtomicBool,
}

impl<S: Slot> Vector<S> {
    pub(crate) fn new() -> Self {
        Vector { slot: S::default(), pending: AtomicBool::new(false) }
    }

    /// Signals the installed line, or sets the pending bit if there is none. Lock-free: a turn of
    /// the loop is repeated only after the session changed the line in the middle of it.
    pub(crate) fn signal(&self) {
        let mut seen = self.slot.load();
        loop {
            match &seen {
                Some(line) => line.signal(),
                // A swap, not a store: a store would end the release sequence of another worker's,
                // and whoever takes the bit delivers for both.
                None => {
                    self.pending.swap(true, Ordering::AcqRel);
                }
            }
            // ORDERING: store buffering. Our store is the signal in the line, our load is the slot.
            // The session stores the slot, fences in `install`, and then has its client look into
            // the line it took out for the last time. One of the two sees the other's store. Without
            // this fence both may see the old value: the signal sits in a line that nobody reads any
            // more, and the driver waits for ever. (A pending bit that we set needs no fence: both
            // sides swap it, and the later swap acquires what came before the earlier one.)
            fence(Ordering::SeqCst);
            let now = self.slot.load();
            if same(&seen, &now) {
                return;
            }
            if seen.is_none() && !self.take_pending() {
                // The session took the bit, and with it the duty to deliver.
                return;
            }
            seen = now;
        }
    }

    /// Puts `line` into the slot, or empties it, and delivers what is pending. On return no signal
    /// depends on the line that was there before. Calls must not overlap.
    pub(crate) fn install(&self, line: Option<Arc<Line>>) {
        self.slot.store(line.clone());
        // ORDERING: store buffering, the other half. Our store is the slot, our load is the client's
        // last look into the line that we took out. A worker signals that line, fences in `signal`,
        // and loads the slot. Without this fence the client may find the line silent while the
        // worker finds it still installed: the interrupt is lost.
        fence(Ordering::SeqCst);
        if let Some(line) = line
            && self.take_pending()
        {
            line.signal();
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Sets the pending bit of a vector that nobody signals yet. Delivered by the next `install`.
    pub(crate) fn set_pending(&self, pending: bool) {
        self.pending.store(pending, Ordering::Release);
    }

    /// Clears the pending bit; true for the one caller who must now deliver it. AcqRel: whoever
    /// delivers a worker's interrupt has seen what the worker wrote before it.
    fn take_pending(&self) -> bool {
        self.pending.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use loom::model::Builder;
    use loom::sync::Notify;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;
    use crate::interrupts::Interrupt;
    use crate::interrupts::slot::model::{Counter, ModelSlot};

    struct Bench {
        vector: Arc<Vector<ModelSlot>>,
        counters: [Arc<Counter>; 2],
        lines: [Arc<Line>; 2],
    }

    impl Bench {
        fn new() -> Bench {
            let counters = [Arc::new(Counter::default()), Arc::new(Counter::default())];
            let lines = counters.clone().map(|counter| Line::new(counter));
            Bench { vector: Arc::new(Vector::new()), counters, lines }
        }

        fn install(&self, line: usize) {
            self.vector.install(Some(self.lines[line].clone()));
        }

        fn signaller(&self) -> thread::JoinHandle<()> {
            let vector = self.vector.clone();
            thread::spawn(move || vector.signal())
        }

        /// `seen`: the signals found by the client's last look into a line, after its removal.
        fn check(&self, seen: usize, installed: Option<usize>) {
            let pending = self.vector.is_pending();
            let delivered = seen + installed.map_or(0, |line| self.counters[line].count());
            assert!(!(pending && installed.is_some()), "pending with a line installed");
            assert!(delivered > 0 || pending, "lost");
        }
    }

    #[test]
    fn a_line_is_installed_while_signalled() {
        loom::model(|| {
            let bench = Bench::new();
            let signaller = bench.signaller();
            bench.install(0);
            signaller.join().unwrap();
            bench.check(0, Some(0));
        });
    }

    #[test]
    fn a_line_is_masked_while_signalled() {
        loom::model(|| {
            let bench = Bench::new();
            bench.install(0);
            let signaller = bench.signaller();
            bench.vector.install(None);
            let seen = bench.counters[0].count();
            signaller.join().unwrap();
            bench.check(seen, None);
        });
    }

    #[test]
    fn a_line_is_swapped_while_signalled() {
        loom::model(|| {
            let bench = Bench::new();
            bench.install(0);
            let signaller = bench.signaller();
            bench.install(1);
            let seen = bench.counters[0].count();
            signaller.join().unwrap();
            bench.check(seen, Some(1));
        });
    }

    #[test]
    fn a_line_is_masked_and_unmasked_while_signalled() {
        loom::model(|| {
            let bench = Bench::new();
            bench.install(0);
            let signaller = bench.signaller();
            bench.vector.install(None);
            bench.install(0);
            signaller.join().unwrap();
            bench.check(0, Some(0));
        });
    }

    #[test]
    fn a_line_is_masked_and_another_installed_while_signalled() {
        loom::model(|| {
            let bench = Bench::new();
            bench.install(0);
            let signaller = bench.signaller();
            bench.vector.install(None);
            let seen = bench.counters[0].count();
            bench.install(1);
            signaller.join().unwrap();
            bench.check(seen, Some(1));
        });
    }

    /// A line that somebody sleeps on.
    #[derive(Default)]
    struct Bell(Notify);

    impl Interrupt for Bell {
        fn signal(&self) {
            self.0.notify();
        }
    }

    /// Two workers publish something each and signal; the driver sleeps until it has seen both. Who delivers the
    /// pending bit delivers for all who set it, and so must have seen what they published. (A driver that sleeps on is
    /// a deadlock, which loom reports.)
    #[test]
    fn a_driver_sees_what_two_workers_published_before_they_signalled() {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| {
            let vector = Arc::new(Vector::<ModelSlot>::new());
            let published = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
            let workers = [0, 1].map(|worker| {
                let (vector, published) = (vector.clone(), published.clone());
                thread::spawn(move || {
                    published[worker].store(1, Ordering::Relaxed);
                    vector.signal();
                })
            });
            let bell = Arc::new(Bell::default());
            vector.install(Some(Line::new(bell.clone())));
            while published.iter().any(|published| published.load(Ordering::Relaxed) == 0) {
                bell.0.wait();
            }
            for worker in workers {
                worker.join().unwrap();
            }
        });
    }

    #[test]
    fn two_workers_signal_while_a_line_is_installed() {
        loom::model(|| {
            let bench = Bench::new();
            let signallers = [bench.signaller(), bench.signaller()];
            bench.install(0);
            for signaller in signallers {
                signaller.join().unwrap();
            }
            bench.check(0, Some(0));
        });
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::interrupts::testing::Counter;

    #[test]
    fn pending_until_a_line_is_installed_then_delivered_once() {
        let vector: Vector = Vector::new();
        let counter = Counter::new();
        vector.signal();
        vector.signal();
        assert!(vector.is_pending());
        vector.install(Some(Line::new(counter.clone())));
        assert_eq!((counter.count(), vector.is_pending()), (1, false));
        vector.signal();
        assert_eq!((counter.count(), vector.is_pending()), (2, false));
        vector.install(None);
        vector.signal();
        assert_eq!((counter.count(), vector.is_pending()), (2, true));
    }
}
