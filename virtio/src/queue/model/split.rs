//! The split queue.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::{Driver, EVENT_IDX, FLAGS, IN_ORDER, SIZE, scenarios, written};
use crate::queue::{Descriptor, Field, RingFeatures, RingMemory, SplitQueue, Virtqueue};

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

/// The driver. Request `n` is in descriptor `n` modulo the size.
struct SplitDriver {
    memory: Arc<Memory>,
    features: RingFeatures,
    added: u16,
    published: u16,
    taken: u16,
}

impl Driver for SplitDriver {
    type Queue = SplitQueue<Arc<Memory>>;

    fn pair(features: RingFeatures) -> (Self::Queue, Self) {
        let memory = Arc::new(Memory::default());
        let queue = SplitQueue::new(Arc::clone(&memory), features, Self::Queue::START);
        (queue, Self { memory, features, added: 0, published: 0, taken: 0 })
    }

    /// §2.7.13.1 and §2.7.13.2: the descriptor and the head.
    fn add(&mut self) {
        let slot = usize::from(self.added % SIZE);
        let address = u64::from(self.added) + 1;
        self.memory.descriptors[slot].store(address << 32 | 8, Ordering::Relaxed);
        self.memory.avail_ring[slot].store(self.added % SIZE, Ordering::Relaxed);
        self.added += 1;
    }

    fn added(&self) -> u16 {
        self.added
    }

    fn show(&mut self) {
        self.published = self.added;
        self.memory.avail_idx.store(self.added, Ordering::Release);
    }

    /// §2.7.13.3 and §2.7.13.4: the index, a barrier, and whether to kick.
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.added);
        self.show();
        fence(Ordering::SeqCst);
        if self.features.event_idx {
            let event = self.memory.avail_event.load(Ordering::Relaxed);
            (old..new).contains(&event)
        } else {
            self.memory.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// §2.7.14, and §2.7.9 for a batch that is told by its last request.
    fn take(&mut self) {
        let used_idx = self.memory.used_idx.load(Ordering::Acquire);
        while self.taken != used_idx {
            let slot = usize::from(self.taken % SIZE);
            let element = self.memory.used_ring[slot].load(Ordering::Relaxed);
            let last = if self.features.in_order { self.added - 1 } else { self.taken };
            let expected = u32::from(last % SIZE) << 16 | u32::from(written(last));
            assert_eq!(element, expected, "used element {} is an old one", self.taken);
            self.taken = last + 1;
        }
    }

    fn taken(&self) -> u16 {
        self.taken
    }

    /// §2.7.7: an entry that has gone by, or the flag.
    fn disable_interrupts(&self) {
        if self.features.event_idx {
            self.memory.used_event.store(self.taken.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.memory.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// §2.7.14: asks for an interrupt, a barrier, and whether it may sleep.
    fn enable_interrupts(&self) -> bool {
        if self.features.event_idx {
            self.memory.used_event.store(self.taken, Ordering::Relaxed);
        } else {
            self.memory.avail_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.memory.used_idx.load(Ordering::Relaxed) == self.taken
    }
}

scenarios!(SplitDriver);
