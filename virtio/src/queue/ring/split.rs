//! The shared memory of a split virtqueue (virtio 1.3 §2.7), and its two decisions.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::{Armed, Signal};
use crate::queue::event_idx;

/// A 16-bit field of a split virtqueue (virtio 1.3 §2.7.6, §2.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `avail.flags`, written by the driver.
    AvailFlags,
    /// `avail.idx`, written by the driver.
    AvailIdx,
    /// `avail.ring[slot modulo size]`, written by the driver.
    AvailRing(u16),
    /// `used_event`, at the end of the available ring, written by the driver.
    UsedEvent,
    /// `used.flags`, written by the device.
    UsedFlags,
    /// `used.idx`, written by the device.
    UsedIdx,
    /// `avail_event`, at the end of the used ring, written by the device.
    AvailEvent,
}

/// One descriptor (virtio 1.3 §2.7.5), our own copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// IOVA of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `VRING_DESC_F_*`.
    pub flags: u16,
    /// Next entry, if the flags say that there is one.
    pub next: u16,
}

impl Descriptor {
    /// The two words that it is made of, by their value.
    #[inline(always)]
    pub(in crate::queue) fn words(&self) -> [u64; 2] {
        [self.addr, u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48]
    }

    /// From the two little-endian words that a descriptor is made of.
    #[inline(always)]
    pub fn from_words([addr, rest]: [u64; 2]) -> Self {
        let rest = u64::from_le(rest);
        Self { addr: u64::from_le(addr), len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// The memory of a split virtqueue: a guest's, or a model's.
///
/// It only loads, stores and fences as it is told; what must be ordered, and why, is said in [`ring`](super).
pub trait RingMemory {
    /// Entries: a power of two, at most 32768.
    fn size(&self) -> u16;
    /// One atomic load.
    fn load(&self, field: Field, order: Ordering) -> u16;
    /// One atomic store.
    fn store(&self, field: Field, value: u16, order: Ordering);
    /// Our own copy of descriptor `index` modulo the size, read once.
    fn read_descriptor(&self, index: u16) -> Descriptor;
    /// Writes `used.ring[slot modulo size]`.
    fn write_used_element(&self, slot: u16, id: u16, len: u32);
    /// A fence.
    fn fence(&self, order: Ordering);
}

/// A split virtqueue's memory and the rules of its notifications.
#[derive(Debug)]
pub(in crate::queue) struct SplitRing<M> {
    memory: M,
    event_idx: bool,
}

impl<M> SplitRing<M> {
    pub(in crate::queue) fn with_memory<N>(self, memory: N) -> SplitRing<N> {
        SplitRing { memory, event_idx: self.event_idx }
    }
}

impl<M: RingMemory> SplitRing<M> {
    pub(in crate::queue) fn new(memory: M, event_idx: bool) -> Self {
        Self { memory, event_idx }
    }

    pub(in crate::queue) fn memory(&self) -> &M {
        &self.memory
    }

    #[inline(always)]
    pub(in crate::queue) fn size(&self) -> u16 {
        self.memory.size()
    }

    /// The driver's index. What it published before that index is visible afterwards: heads and descriptors.
    #[inline(always)]
    pub(in crate::queue) fn avail_idx(&self) -> u16 {
        self.memory.load(Field::AvailIdx, Ordering::Acquire)
    }

    /// The head that the driver put into `slot`, which must lie before [`avail_idx`](Self::avail_idx).
    #[inline(always)]
    pub(in crate::queue) fn avail_head(&self, slot: u16) -> u16 {
        self.memory.load(Field::AvailRing(slot), Ordering::Relaxed)
    }

    /// Fills a used element; the driver sees it once [`publish`](Self::publish) has moved the index beyond it.
    #[inline(always)]
    pub(in crate::queue) fn write_used(&self, slot: u16, head: u16, len: u32) {
        self.memory.write_used_element(slot, head, len);
    }

    /// Publishes all used elements before `used_idx` and decides whether to interrupt. `decided` is the index that was
    /// published at the decision before this one.
    #[inline(always)]
    pub(in crate::queue) fn publish(&self, used_idx: u16, decided: u16) -> Signal {
        // Release: the elements, statuses and data before the index.
        self.memory.store(Field::UsedIdx, used_idx, Ordering::Release);
        // ORDERING: our store is used.idx, our load is used_event (or avail.flags). The driver's pair, before it
        // sleeps: it stores used_event (or clears avail.flags), has a full barrier, and loads used.idx. Without ours
        // the load may be done before the store is seen: we read that it wants no interrupt, it reads that nothing
        // was used, and it waits for an interrupt that nobody sends.
        self.memory.fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            event_idx::passed(self.memory.load(Field::UsedEvent, Ordering::Relaxed), used_idx, decided)
        } else {
            self.memory.load(Field::AvailFlags, Ordering::Relaxed) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        };
        if wanted { Signal::Needed } else { Signal::Suppressed }
    }

    /// Asks the driver for a kick when it adds the entry `next_avail`, and looks whether it has done so already.
    #[inline(always)]
    pub(in crate::queue) fn arm(&self, next_avail: u16) -> Armed {
        if self.event_idx {
            self.memory.store(Field::AvailEvent, next_avail, Ordering::Relaxed);
        } else {
            self.memory.store(Field::UsedFlags, 0, Ordering::Relaxed);
        }
        // ORDERING: our store is avail_event (or used.flags), our load is avail.idx. The driver's pair, when it
        // adds entries: it stores avail.idx, has a full barrier, and loads avail_event (or used.flags). Without ours
        // the load may be done before the store is seen: we read that nothing was added, it reads that we want no
        // kick, and its request lies there while we sleep.
        self.memory.fence(Ordering::SeqCst);
        if self.memory.load(Field::AvailIdx, Ordering::Relaxed) == next_avail { Armed::Sleep } else { Armed::Work }
    }

    /// Asks for no kicks, as far as that can be said: a hint that needs no barrier. With the event index nothing need be
    /// written: the driver has passed `avail_event`, and kicks no more until it is moved.
    #[inline(always)]
    pub(in crate::queue) fn disarm(&self) {
        if !self.event_idx {
            self.memory.store(Field::UsedFlags, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }
}
