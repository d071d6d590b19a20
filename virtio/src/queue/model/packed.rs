//! The packed queue.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::{Driver, EVENT_IDX, FLAGS, IN_ORDER, SIZE, scenarios, written};
use crate::queue::{
    EventSuppression, PackedDescriptor, PackedQueue, PackedRingMemory, Position, RingFeatures, UsedDescriptor,
    Virtqueue,
};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Guest memory. The `Arc` around it is the standard library's: loom neither sees it nor takes an ordering from it.
#[derive(Default)]
struct Memory {
    flags: [AtomicU16; SIZE as usize],
    /// Address in the upper half, then length, then buffer ID. The device's stores of all at once are taken apart here, which
    /// allows more than the memory that ships.
    rest: [AtomicU64; SIZE as usize],
    driver_event: AtomicU32,
    device_event: AtomicU32,
}

fn rest(address: u64, len: u16, id: u16) -> u64 {
    address << 32 | u64::from(len) << 16 | u64::from(id)
}

impl PackedRingMemory for Arc<Memory> {
    fn size(&self) -> u16 {
        SIZE
    }

    fn load_flags(&self, index: u16, order: Ordering) -> u16 {
        self.flags[usize::from(index)].load(order)
    }

    fn read_descriptor(&self, index: u16, flags: u16) -> PackedDescriptor {
        let rest = self.rest[usize::from(index)].load(Ordering::Relaxed);
        PackedDescriptor { addr: rest >> 32, len: rest as u32 >> 16, id: rest as u16, flags }
    }

    fn write_used(&self, index: u16, used: UsedDescriptor, order: Ordering) {
        self.rest[usize::from(index)].store(rest(0, used.len as u16, used.id), Ordering::Relaxed);
        self.flags[usize::from(index)].store(used.flags, order);
    }

    fn driver_event(&self) -> EventSuppression {
        EventSuppression::from_word(self.driver_event.load(Ordering::Relaxed))
    }

    fn set_device_event(&self, event: EventSuppression) {
        self.device_event.store(event.to_word(), Ordering::Relaxed);
    }

    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

/// The driver. Request `n` is in descriptor `n` modulo the size, and has that as its buffer ID.
struct PackedDriver {
    memory: Arc<Memory>,
    features: RingFeatures,
    added: u16,
    published: u16,
    taken: u16,
}

/// Whether the wrap counter is 1 at request `n`.
fn wrap(n: u16) -> bool {
    (n / SIZE).is_multiple_of(2)
}

fn position(n: u16) -> Position {
    Position::from_bits(n % SIZE | u16::from(wrap(n)) << 15)
}

impl PackedDriver {
    fn flags(&self, n: u16) -> &AtomicU16 {
        &self.memory.flags[usize::from(n % SIZE)]
    }

    fn is_used(&self, n: u16, order: Ordering) -> bool {
        let marked = if wrap(n) { AVAIL | USED } else { 0 };
        self.flags(n).load(order) & (AVAIL | USED) == marked
    }

    fn set_event(&self, event: EventSuppression) {
        self.memory.driver_event.store(event.to_word(), Ordering::Relaxed);
    }
}

impl Driver for PackedDriver {
    type Queue = PackedQueue<Arc<Memory>>;

    fn pair(features: RingFeatures) -> (Self::Queue, Self) {
        let memory = Arc::new(Memory::default());
        let queue = PackedQueue::new(Arc::clone(&memory), features, Self::Queue::START);
        (queue, Self { memory, features, added: 0, published: 0, taken: 0 })
    }

    /// §2.8.19.1: all of the descriptor, but for the flags of the first one that is not shown yet.
    fn add(&mut self) {
        let (n, slot) = (self.added, usize::from(self.added % SIZE));
        self.memory.rest[slot].store(rest(u64::from(n) + 1, 8, n % SIZE), Ordering::Relaxed);
        if n != self.published {
            self.flags(n).store(if wrap(n) { AVAIL } else { USED }, Ordering::Relaxed);
        }
        self.added += 1;
    }

    fn added(&self) -> u16 {
        self.added
    }

    fn show(&mut self) {
        let first = std::mem::replace(&mut self.published, self.added);
        self.flags(first).store(if wrap(first) { AVAIL } else { USED }, Ordering::Release);
    }

    /// §2.8.19.2: the flags, a barrier, and whether to kick.
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.added);
        self.show();
        fence(Ordering::SeqCst);
        match EventSuppression::from_word(self.memory.device_event.load(Ordering::Relaxed)) {
            EventSuppression::Enable => true,
            EventSuppression::Disable => false,
            EventSuppression::Descriptor(event) => (old..new).any(|n| position(n) == event),
        }
    }

    /// §2.8.22, and §2.8.8 for a batch that is told by its last request.
    fn take(&mut self) {
        while self.taken != self.added && self.is_used(self.taken, Ordering::Acquire) {
            let element = self.memory.rest[usize::from(self.taken % SIZE)].load(Ordering::Relaxed);
            let last = if self.features.in_order { self.added - 1 } else { self.taken };
            assert_eq!(element, rest(0, written(last), last % SIZE), "used descriptor {} is an old one", self.taken);
            self.taken = last + 1;
        }
    }

    fn taken(&self) -> u16 {
        self.taken
    }

    fn disable_interrupts(&self) {
        self.set_event(EventSuppression::Disable);
    }

    /// §2.8.22: asks for an interrupt, a barrier, and whether it may sleep.
    fn enable_interrupts(&self) -> bool {
        let next = EventSuppression::Descriptor(position(self.taken));
        self.set_event(if self.features.event_idx { next } else { EventSuppression::Enable });
        fence(Ordering::SeqCst);
        !self.is_used(self.taken, Ordering::Relaxed)
    }
}

scenarios!(PackedDriver);
