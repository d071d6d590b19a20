//! The split queue against a driver, under [loom](loom): every interleaving of the two, and every old value that a load
//! may still return.
//!
//! The device's side is the code that ships, [`SplitQueue`] with its [`Chain`] and its ring, over memory whose fields
//! are loom's atomics. The driver's side is written from the specification (virtio 1.3 §2.7.7, §2.7.10, §2.7.13,
//! §2.7.14), each field with the weakest ordering that the specification leaves it. A wakeup is lost when both sides
//! sleep and there is news for one of them: the models that end look for that at the end, those that loop end in a
//! deadlock, which loom reports.
//!
//! # What loom sees
//! Each load returns any store that coherence, happens-before and the fences allow, so that a missing Release or
//! Acquire shows as an element, a head or a descriptor from before, and a missing full barrier as an old index.
//!
//! # What loom cannot see
//! - It is stricter than the language about `fence(SeqCst)`: it has each such fence acquire all that came before the
//!   earlier ones, as if each released and acquired one common location. The store-buffer pattern needs just what both
//!   have in common, that of two such fences one is the first. So no model here may lean on a fence for anything else,
//!   and none does: what must be visible hangs on the Release and Acquire of an index.
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

use std::sync::{Arc, LazyLock};

use loom::model::Builder;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::{Armed, Descriptor, Field, QueueState, RingFeatures, RingMemory, Signal, SplitQueue};
use crate::memory::testing::guest_table;
use crate::memory::{GuestMemory, PinnedBuffers, SharedTable};

const SIZE: u16 = 2;
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Guest memory. The `Arc` around it is the standard library's: loom neither sees it nor takes an ordering from it.
#[derive(Default)]
struct Memory {
    /// Address in the upper half, length in the lower.
    descriptors: [AtomicU64; SIZE as usize],
    avail_flags: AtomicU16,
    avail_idx: AtomicU16,
    avail_ring: [AtomicU16; SIZE as usize],
    used_event: AtomicU16,
    used_flags: AtomicU16,
    used_idx: AtomicU16,
    /// Head in the upper half, length in the lower.
    used_ring: [AtomicU32; SIZE as usize],
    avail_event: AtomicU16,
}

impl Memory {
    fn field(&self, field: Field) -> &AtomicU16 {
        match field {
            Field::AvailFlags => &self.avail_flags,
            Field::AvailIdx => &self.avail_idx,
            Field::AvailRing(slot) => &self.avail_ring[usize::from(slot % SIZE)],
            Field::UsedEvent => &self.used_event,
            Field::UsedFlags => &self.used_flags,
            Field::UsedIdx => &self.used_idx,
            Field::AvailEvent => &self.avail_event,
        }
    }
}

impl RingMemory for Arc<Memory> {
    fn size(&self) -> u16 {
        SIZE
    }

    fn load(&self, field: Field, order: Ordering) -> u16 {
        self.field(field).load(order)
    }

    fn store(&self, field: Field, value: u16, order: Ordering) {
        self.field(field).store(value, order);
    }

    fn read_descriptor(&self, index: u16) -> Descriptor {
        let words = self.descriptors[usize::from(index % SIZE)].load(Ordering::Relaxed);
        Descriptor { addr: words >> 32, len: words as u32, flags: 0, next: 0 }
    }

    fn write_used_element(&self, slot: u16, id: u16, len: u32) {
        let element = u32::from(id) << 16 | len;
        self.used_ring[usize::from(slot % SIZE)].store(element, Ordering::Relaxed);
    }

    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

/// The driver. Request `n` is one buffer at the address `n + 1`, in descriptor `n` modulo the size.
struct Driver {
    memory: Arc<Memory>,
    event_idx: bool,
    added: u16,
    published: u16,
    taken: u16,
}

impl Driver {
    /// §2.7.13.1 and §2.7.13.2: the descriptor and the head.
    fn add(&mut self) {
        let slot = usize::from(self.added % SIZE);
        let address = u64::from(self.added) + 1;
        self.memory.descriptors[slot].store(address << 32 | 8, Ordering::Relaxed);
        self.memory.avail_ring[slot].store(self.added % SIZE, Ordering::Relaxed);
        self.added += 1;
    }

    /// §2.7.13.3 and §2.7.13.4: the index, a barrier, and whether to kick.
    fn publish(&mut self) -> bool {
        let (old, new) = (std::mem::replace(&mut self.published, self.added), self.added);
        self.memory.avail_idx.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.avail_event.load(Ordering::Relaxed);
            (old..new).contains(&event)
        } else {
            self.memory.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// §2.7.14: everything that was used, which must be the requests in order, each with its length.
    fn take(&mut self) {
        let used_idx = self.memory.used_idx.load(Ordering::Acquire);
        while self.taken != used_idx {
            let slot = usize::from(self.taken % SIZE);
            let element = self.memory.used_ring[slot].load(Ordering::Relaxed);
            let expected = u32::from(self.taken % SIZE) << 16 | written(self.taken);
            assert_eq!(element, expected, "used element {} is an old one", self.taken);
            self.taken += 1;
        }
    }

    /// §2.7.7: an entry that has gone by, or the flag.
    fn disable_interrupts(&self) {
        if self.event_idx {
            self.memory.used_event.store(self.taken.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.memory.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// §2.7.14: asks for an interrupt, a barrier, and whether it may sleep.
    fn enable_interrupts(&self) -> bool {
        if self.event_idx {
            self.memory.used_event.store(self.taken, Ordering::Relaxed);
        } else {
            self.memory.avail_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.memory.used_idx.load(Ordering::Relaxed) == self.taken
    }

    /// Takes what is there until there is nothing, and sleeps.
    fn fall_asleep(&mut self) {
        while !self.enable_interrupts() {
            self.disable_interrupts();
            self.take();
        }
    }
}

/// What the device reports of request `n`.
fn written(n: u16) -> u32 {
    u32::from(n) + 7
}

/// The device: the queue that ships, and nothing but what its user must do.
struct Device {
    queue: SplitQueue<Arc<Memory>>,
    memory: GuestMemory,
    buffers: PinnedBuffers,
    popped: u16,
    completed: u16,
}

impl Device {
    /// Takes the next request, whose head and buffer must be those that the driver gave it.
    fn pop(&mut self) -> Option<super::Head> {
        self.buffers.clear();
        let head = self.queue.pop(&mut self.memory, &mut self.buffers).unwrap()?.resolved().unwrap();
        assert_eq!(head.index(), self.popped % SIZE, "head {} is an old one", self.popped);
        let [piece] = self.buffers.iovecs() else { panic!("{:?}", self.buffers) };
        let place = self.buffers.file().and_then(|file| file.offset_of(piece));
        let expected = (Some(u64::from(self.popped) + 1), 8);
        assert_eq!((place, piece.iov_len), expected, "descriptor {} is an old one", self.popped);
        self.popped += 1;
        Some(head)
    }

    fn complete(&mut self, head: super::Head) {
        self.queue.complete(head, written(self.completed));
        self.completed += 1;
    }
}

/// Both sides of a queue.
fn queue(event_idx: bool) -> (Device, Driver) {
    let memory = Arc::new(Memory::default());
    let features = RingFeatures { event_idx, indirect_desc: false };
    let queue = SplitQueue::new(Arc::clone(&memory), features, QueueState::default());
    // Where the buffers lie, which nobody looks into.
    static BUFFERS: LazyLock<Arc<SharedTable>> = LazyLock::new(|| guest_table(0, 0x1000));
    let guest = GuestMemory::new(Arc::clone(&BUFFERS));
    let device = Device { queue, memory: guest, buffers: PinnedBuffers::default(), popped: 0, completed: 0 };
    (device, Driver { memory, event_idx, added: 0, published: 0, taken: 0 })
}

/// How requests go by, for the models with two.
#[derive(Clone, Copy)]
enum Batch {
    /// One index, one decision for all.
    Together,
    /// An index and a decision each.
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
fn publish_against_sleep(event_idx: bool, requests: u16, batch: Batch) {
    loom::model(move || {
        let (mut device, mut driver) = queue(event_idx);
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
        assert_told(&device.join().unwrap(), driver.taken, "an interrupt");
    });
}

/// The driver adds requests while the device goes to sleep.
fn add_against_arm(event_idx: bool, requests: u16, batch: Batch) {
    loom::model(move || {
        let (mut device, mut driver) = queue(event_idx);
        // One request beforehand, so that the device has asked for no more kicks.
        let armed = device.queue.arm();
        assert_eq!(armed, Armed::Sleep);
        driver.add();
        assert!(driver.publish(), "the device was armed");
        let head = device.pop().unwrap();
        device.complete(head);
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
        let mut first = driver.added;
        for n in 1..=requests {
            driver.add();
            if n == requests || matches!(batch, Batch::Each) {
                told.push((first..driver.added, driver.publish()));
                first = driver.added;
            }
        }
        assert_told(&told, device.join().unwrap(), "a kick");
    });
}

/// Both sides as they are used: each sleeps when it finds nothing, until all requests are back.
fn whole_loop(event_idx: bool, requests: u16, preemptions: Option<usize>) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        let (mut device, mut driver) = queue(event_idx);
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
            while driver.taken < driver.added {
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

#[test]
fn one_completion_while_the_driver_falls_asleep() {
    publish_against_sleep(true, 1, Batch::Each);
}

#[test]
fn one_completion_while_the_driver_falls_asleep_by_flag() {
    publish_against_sleep(false, 1, Batch::Each);
}

#[test]
fn two_completions_while_the_driver_falls_asleep() {
    publish_against_sleep(true, 2, Batch::Each);
}

#[test]
fn two_completions_while_the_driver_falls_asleep_by_flag() {
    publish_against_sleep(false, 2, Batch::Each);
}

#[test]
fn two_completions_at_once_while_the_driver_falls_asleep() {
    publish_against_sleep(true, 2, Batch::Together);
}

#[test]
fn two_completions_at_once_while_the_driver_falls_asleep_by_flag() {
    publish_against_sleep(false, 2, Batch::Together);
}

#[test]
fn one_request_while_the_device_falls_asleep() {
    add_against_arm(true, 1, Batch::Each);
}

#[test]
fn one_request_while_the_device_falls_asleep_by_flag() {
    add_against_arm(false, 1, Batch::Each);
}

#[test]
fn two_requests_while_the_device_falls_asleep() {
    add_against_arm(true, 2, Batch::Each);
}

#[test]
fn two_requests_while_the_device_falls_asleep_by_flag() {
    add_against_arm(false, 2, Batch::Each);
}

#[test]
fn two_requests_at_once_while_the_device_falls_asleep() {
    add_against_arm(true, 2, Batch::Together);
}

#[test]
fn two_requests_at_once_while_the_device_falls_asleep_by_flag() {
    add_against_arm(false, 2, Batch::Together);
}

#[test]
fn one_request_there_and_back() {
    whole_loop(true, 1, None);
}

#[test]
fn one_request_there_and_back_by_flag() {
    whole_loop(false, 1, None);
}

#[test]
fn two_requests_there_and_back() {
    whole_loop(true, 2, Some(2));
}

#[test]
fn two_requests_there_and_back_by_flag() {
    whole_loop(false, 2, Some(2));
}

/// No fence helps here: neither side asks, both poll.
#[test]
fn what_is_published_is_visible() {
    loom::model(|| {
        let (mut device, mut driver) = queue(true);
        let memory = Arc::clone(&driver.memory);
        let device = thread::spawn(move || {
            for _ in 0..2 {
                if let Some(head) = device.pop() {
                    device.complete(head);
                    let _signal = device.queue.publish();
                }
            }
        });
        driver.add();
        memory.avail_idx.store(1, Ordering::Release);
        driver.take();
        driver.add();
        memory.avail_idx.store(2, Ordering::Release);
        driver.take();
        device.join().unwrap();
        driver.take();
    });
}
