//! The queues against drivers, under [loom](loom): every interleaving of the two, and every old value that a load
//! may still return.
//!
//! The device's side is the code that ships, [`SplitQueue`] or [`PackedQueue`] with its walk and its ring, over memory
//! whose fields are loom's atomics. The drivers' sides are written from the specification (virtio 1.3 §2.7.7, §2.7.10,
//! §2.7.13, §2.7.14; §2.8.10, §2.8.19 to §2.8.22), each field with the weakest ordering that the specification leaves it.
//! Each scenario is played with both formats. A wakeup is lost when both sides sleep and there is news for one of them: the
//! models that end look for that at the end, those that loop end in a deadlock, which loom reports.
//!
//! # What loom sees
//! Each load returns any store that coherence, happens-before and the fences allow, so that a missing Release or
//! Acquire shows as an element, a head or a descriptor from before, and a missing full barrier as an old index.
//!
//! # What loom cannot see
//! - It is stricter than the language about `fence(SeqCst)`: it has each such fence acquire all that came before the
//!   earlier ones, as if each released and acquired one common location. The store-buffer pattern needs just what both
//!   have in common, that of two such fences one is the first. So no model here may lean on a fence for anything else,
//!   and none does: what must be visible hangs on the Release and Acquire of an index, or of a descriptor's flags.
//! - It takes a SeqCst *access* as AcqRel. That can only make a model fail that should pass; we use no such access.
//! - Loads are not moved below later stores (load buffering), and no more than a few threads and operations fit. The
//!   queue has two entries, the driver adds one or two requests. The rules are about two neighbouring decisions, and the
//!   positions are arithmetic: what comes with large numbers is in the exhaustive test of the event index.
//! - It is a model of the language, not of a processor, and of our side's Rust, not of the guest's kernel. The stress
//!   test runs the same code on real cores.
//!
//! # Why it is evidence nevertheless
//! A model that passes says little until it is seen to fail. `cargo xtask mutants` weakens and removes every ordering of
//! the ring, one at a time, and for each some model here fails.

mod packed;
mod split;

use std::sync::{Arc, LazyLock};

use loom::model::Builder;
use loom::sync::Notify;
use loom::thread;

use super::{Armed, Head, RingFeatures, Signal, Virtqueue, Written};
use crate::memory::testing::guest_table;
use crate::memory::{GuestMemory, PinnedBuffers, SharedTable};

/// Entries of the queue.
const SIZE: u16 = 2;

/// A driver. Its request `n` is one buffer to read at the address `n + 1`, by the name of `n` modulo the size; the device
/// reports [`written`]`(n)` of it.
trait Driver: Sized {
    /// The queue that it is for.
    type Queue: Virtqueue + Send + 'static;

    /// Both sides of a new queue.
    fn pair(features: RingFeatures) -> (Self::Queue, Self);

    /// Writes a request.
    fn add(&mut self);

    /// How many were written.
    fn added(&self) -> u16;

    /// Shows what was added, without a word to the device.
    fn show(&mut self);

    /// Shows what was added, and says whether to kick.
    fn publish(&mut self) -> bool;

    /// Takes everything that was used, which must be the requests in order, each with its length.
    fn take(&mut self);

    /// How many were taken.
    fn taken(&self) -> u16;

    /// Asks for no interrupts.
    fn disable_interrupts(&self);

    /// Asks for an interrupt, and says whether it may sleep.
    fn enable_interrupts(&self) -> bool;

    /// Takes what is there until there is nothing, and sleeps.
    fn fall_asleep(&mut self) {
        while !self.enable_interrupts() {
            self.disable_interrupts();
            self.take();
        }
    }
}

/// What the device reports of request `n`.
fn written(n: u16) -> u16 {
    n + 7
}

/// The device: the queue that ships, and nothing but what its user must do.
struct Device<Q> {
    queue: Q,
    memory: GuestMemory,
    buffers: PinnedBuffers,
    popped: u16,
    completed: u16,
}

impl<Q: Virtqueue> Device<Q> {
    /// Takes the next request, whose name and buffer must be those that the driver gave it.
    fn pop(&mut self) -> Option<Head> {
        self.buffers.clear();
        let head = self.queue.pop(&mut self.memory, &mut self.buffers).unwrap()?;
        assert_eq!(head.id(), self.popped % SIZE, "head {} is an old one", self.popped);
        let [readable, writable] = self.buffers.pieces();
        let ([piece], []) = (&*readable, &*writable) else { panic!("{:?}", self.buffers) };
        let place = self.buffers.file().and_then(|file| file.offset_of(piece));
        let expected = (Some(u64::from(self.popped) + 1), 8);
        assert_eq!((place, piece.iov_len), expected, "descriptor {} is an old one", self.popped);
        self.popped += 1;
        Some(head)
    }

    fn complete(&mut self, head: Head) {
        self.queue.complete(head, Written::All(u32::from(written(self.completed))));
        self.completed += 1;
    }
}

/// Both sides of a queue.
fn queue<D: Driver>(features: RingFeatures) -> (Device<D::Queue>, D) {
    let (queue, driver) = D::pair(features);
    // Where the buffers lie, which nobody looks into.
    static BUFFERS: LazyLock<Arc<SharedTable>> = LazyLock::new(|| guest_table(0, 0x1000));
    let memory = GuestMemory::new(Arc::clone(&BUFFERS));
    (Device { queue, memory, buffers: PinnedBuffers::default(), popped: 0, completed: 0 }, driver)
}

/// The event index decides.
const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, indirect_desc: false, in_order: false };
/// Flags decide.
const FLAGS: RingFeatures = RingFeatures { event_idx: false, indirect_desc: false, in_order: false };
/// A batch is told by its last request.
const IN_ORDER: RingFeatures = RingFeatures { event_idx: true, indirect_desc: false, in_order: true };

/// How requests go by, for the models with two.
#[derive(Clone, Copy)]
enum Batch {
    /// Published together, one decision for all.
    Together,
    /// A publication and a decision each.
    Each,
}

/// Publications, each as the entries that it brought and whether the other side was told.
type Told = Vec<(std::ops::Range<u16>, bool)>;

/// Whoever went to sleep before entry `next` must have been told of it.
fn assert_told(told: &Told, next: u16, what: &str) {
    if let Some((_, told)) = told.iter().find(|(entries, _)| entries.contains(&next)) {
        assert!(told, "lost: entry {next} came without {what}");
    }
}

/// The device publishes what it completed while the driver goes to sleep.
fn publish_against_sleep<D: Driver + 'static>(features: RingFeatures, requests: u16, batch: Batch) {
    loom::model(move || {
        let (mut device, mut driver) = queue::<D>(features);
        (0..requests).for_each(|_| driver.add());
        let _kick = driver.publish();
        let heads: Vec<_> = (0..requests).map(|_| device.pop().unwrap()).collect();
        driver.disable_interrupts();
        let device = thread::spawn(move || {
            let mut told = Told::new();
            let mut first = 0;
            for head in heads {
                device.complete(head);
                let last = device.completed == requests;
                if last || matches!(batch, Batch::Each) {
                    let signal = device.queue.publish();
                    told.push((first..device.completed, signal == Signal::Needed));
                    first = device.completed;
                }
            }
            told
        });
        driver.fall_asleep();
        assert_told(&device.join().unwrap(), driver.taken(), "an interrupt");
    });
}

/// The driver adds requests while the device goes to sleep.
fn add_against_arm<D: Driver + 'static>(features: RingFeatures, requests: u16, batch: Batch) {
    loom::model(move || {
        let (mut device, mut driver) = queue::<D>(features);
        // One request beforehand, so that the device has asked for no more kicks.
        let armed = device.queue.arm();
        assert_eq!(armed, Armed::Sleep);
        driver.add();
        assert!(driver.publish(), "the device was armed");
        let head = device.pop().unwrap();
        device.complete(head);
        // A packed ring has no room for more before the driver has taken what was used.
        let _interrupt = device.queue.publish();
        driver.take();
        let device = thread::spawn(move || {
            loop {
                while let Some(head) = device.pop() {
                    device.complete(head);
                }
                if device.queue.arm() == Armed::Sleep {
                    return device.popped;
                }
            }
        });
        let mut told = Told::new();
        let mut first = driver.added();
        for n in 1..=requests {
            driver.add();
            if n == requests || matches!(batch, Batch::Each) {
                told.push((first..driver.added(), driver.publish()));
                first = driver.added();
            }
        }
        assert_told(&told, device.join().unwrap(), "a kick");
    });
}

/// Both sides as they are used: each sleeps when it finds nothing, until all requests are back.
fn whole_loop<D: Driver + 'static>(features: RingFeatures, requests: u16, preemptions: Option<usize>) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        let (mut device, mut driver) = queue::<D>(features);
        let (kick, interrupt) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (kicked, interrupts) = (Arc::clone(&kick), Arc::clone(&interrupt));
        let device = thread::spawn(move || {
            while device.completed < requests {
                while let Some(head) = device.pop() {
                    device.complete(head);
                }
                if device.queue.publish() == Signal::Needed {
                    interrupts.notify();
                }
                if device.completed < requests && device.queue.arm() == Armed::Sleep {
                    kicked.wait();
                }
            }
        });
        for _ in 0..requests {
            driver.disable_interrupts();
            driver.add();
            if driver.publish() {
                kick.notify();
            }
            while driver.taken() < driver.added() {
                if driver.enable_interrupts() {
                    interrupt.wait();
                }
                driver.disable_interrupts();
                driver.take();
            }
        }
        device.join().unwrap();
    });
}

/// No fence helps here: neither side asks, both poll.
fn polling<D: Driver + 'static>() {
    loom::model(|| {
        let (mut device, mut driver) = queue::<D>(EVENT_IDX);
        let device = thread::spawn(move || {
            for _ in 0..2 {
                if let Some(head) = device.pop() {
                    device.complete(head);
                    let _signal = device.queue.publish();
                }
            }
        });
        for _ in 0..2 {
            driver.add();
            driver.show();
            driver.take();
        }
        device.join().unwrap();
        driver.take();
    });
}

/// All scenarios, for a driver.
macro_rules! scenarios {
    ($driver:ty) => {
        use super::Batch::{Each, Together};
        use super::{add_against_arm, polling, publish_against_sleep, whole_loop};

        #[test]
        fn one_completion_while_the_driver_falls_asleep() {
            publish_against_sleep::<$driver>(EVENT_IDX, 1, Each);
        }

        #[test]
        fn one_completion_while_the_driver_falls_asleep_by_flag() {
            publish_against_sleep::<$driver>(FLAGS, 1, Each);
        }

        #[test]
        fn two_completions_while_the_driver_falls_asleep() {
            publish_against_sleep::<$driver>(EVENT_IDX, 2, Each);
        }

        #[test]
        fn two_completions_while_the_driver_falls_asleep_by_flag() {
            publish_against_sleep::<$driver>(FLAGS, 2, Each);
        }

        #[test]
        fn two_completions_at_once_while_the_driver_falls_asleep() {
            publish_against_sleep::<$driver>(EVENT_IDX, 2, Together);
        }

        #[test]
        fn two_completions_at_once_while_the_driver_falls_asleep_by_flag() {
            publish_against_sleep::<$driver>(FLAGS, 2, Together);
        }

        #[test]
        fn two_completions_in_order_while_the_driver_falls_asleep() {
            publish_against_sleep::<$driver>(IN_ORDER, 2, Together);
        }

        #[test]
        fn one_request_while_the_device_falls_asleep() {
            add_against_arm::<$driver>(EVENT_IDX, 1, Each);
        }

        #[test]
        fn one_request_while_the_device_falls_asleep_by_flag() {
            add_against_arm::<$driver>(FLAGS, 1, Each);
        }

        #[test]
        fn two_requests_while_the_device_falls_asleep() {
            add_against_arm::<$driver>(EVENT_IDX, 2, Each);
        }

        #[test]
        fn two_requests_while_the_device_falls_asleep_by_flag() {
            add_against_arm::<$driver>(FLAGS, 2, Each);
        }

        #[test]
        fn two_requests_at_once_while_the_device_falls_asleep() {
            add_against_arm::<$driver>(EVENT_IDX, 2, Together);
        }

        #[test]
        fn two_requests_at_once_while_the_device_falls_asleep_by_flag() {
            add_against_arm::<$driver>(FLAGS, 2, Together);
        }

        #[test]
        fn one_request_there_and_back() {
            whole_loop::<$driver>(EVENT_IDX, 1, None);
        }

        #[test]
        fn one_request_there_and_back_by_flag() {
            whole_loop::<$driver>(FLAGS, 1, None);
        }

        #[test]
        fn two_requests_there_and_back() {
            whole_loop::<$driver>(EVENT_IDX, 2, Some(2));
        }

        #[test]
        fn two_requests_there_and_back_by_flag() {
            whole_loop::<$driver>(FLAGS, 2, Some(2));
        }

        #[test]
        fn what_is_published_is_visible() {
            polling::<$driver>();
        }
    };
}
use scenarios;
