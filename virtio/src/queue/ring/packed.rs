//! The shared memory of a packed virtqueue (virtio 1.3 §2.8), and its two decisions.
//!
//! There is no index: each side publishes by the flags of a descriptor, and looks for news at the flags of the one
//! descriptor that is next. All else is as in a split virtqueue.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::{Armed, Signal};
use crate::queue::event_idx;

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// A place in a packed ring, and the wrap counter of whoever stands there (§2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u16);

impl Position {
    const WRAP: u16 = 1 << 15;

    /// Where both sides start: the first descriptor, with the wrap counter 1.
    pub const START: Self = Self(Self::WRAP);

    /// From the index of a descriptor and, in bit 15, the wrap counter: the form in which §2.8.14 has it.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The reverse of [`from_bits`](Self::from_bits).
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The descriptor's index.
    #[inline(always)]
    pub fn index(self) -> u16 {
        self.0 & !Self::WRAP
    }

    /// The wrap counter.
    #[inline(always)]
    pub fn wrap(self) -> bool {
        self.0 & Self::WRAP != 0
    }

    /// The place behind `descriptors` more, of which there are at most `size`, in a ring of `size`.
    #[inline(always)]
    pub fn after(self, descriptors: u16, size: u16) -> Self {
        let index = u32::from(self.index()).wrapping_add(descriptors.into());
        let wrap = self.0 & Self::WRAP;
        match index.checked_sub(u32::from(size)) {
            // Less than the size, so that 15 bits hold it.
            Some(index) => Self(index as u16 | wrap ^ Self::WRAP),
            None => Self(index as u16 | wrap),
        }
    }

    /// The flags by which the driver makes a descriptor here available.
    #[inline(always)]
    fn avail(self) -> u16 {
        if self.wrap() { AVAIL } else { USED }
    }

    /// The flags by which the device marks a descriptor here as used.
    #[inline(always)]
    fn used(self) -> u16 {
        if self.wrap() { AVAIL | USED } else { 0 }
    }
}

/// One descriptor (§2.8.13), our own copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedDescriptor {
    /// IOVA of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Buffer ID: whatever the driver likes.
    pub id: u16,
    /// `VRING_DESC_F_*` and the two flags that go with the wrap counters.
    pub flags: u16,
}

impl PackedDescriptor {
    /// From the two little-endian words that a descriptor is made of.
    #[inline(always)]
    pub fn from_words([addr, rest]: [u64; 2]) -> Self {
        let rest = u64::from_le(rest);
        Self { addr: u64::from_le(addr), len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }
}

/// A descriptor by which the device gives a buffer back; `addr` is unused there (§2.8.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedDescriptor {
    /// How many bytes the device has written.
    pub len: u32,
    /// Buffer ID.
    pub id: u16,
    /// As in [`PackedDescriptor`].
    pub flags: u16,
}

impl UsedDescriptor {
    /// The little-endian word that follows `addr`.
    #[inline(always)]
    pub fn to_word(self) -> u64 {
        (u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48).to_le()
    }
}

/// What one side wants to be told of (§2.8.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventSuppression {
    /// `RING_EVENT_FLAGS_ENABLE`: of everything.
    Enable,
    /// `RING_EVENT_FLAGS_DISABLE`: of nothing.
    Disable,
    /// `RING_EVENT_FLAGS_DESC`: of the descriptor there.
    Descriptor(Position),
}

impl EventSuppression {
    /// From the word that it is, in the byte order of the processor. A reserved value wants to be told of everything.
    #[inline(always)]
    pub fn from_word(word: u32) -> Self {
        match word >> 16 & 3 {
            VRING_PACKED_EVENT_FLAG_DISABLE => Self::Disable,
            VRING_PACKED_EVENT_FLAG_DESC => Self::Descriptor(Position(word as u16)),
            _ => Self::Enable,
        }
    }

    /// The reverse.
    #[inline(always)]
    pub fn to_word(self) -> u32 {
        match self {
            Self::Enable => VRING_PACKED_EVENT_FLAG_ENABLE << 16,
            Self::Disable => VRING_PACKED_EVENT_FLAG_DISABLE << 16,
            Self::Descriptor(position) => VRING_PACKED_EVENT_FLAG_DESC << 16 | u32::from(position.0),
        }
    }
}

/// The memory of a packed virtqueue: a guest's, or a model's.
///
/// It only loads, stores and fences as it is told; what must be ordered, and why, is said in [`ring`](super). An index is
/// less than the size; what another one does is not said, but it does no harm.
pub trait PackedRingMemory {
    /// Descriptors, at most 32768.
    fn size(&self) -> u16;
    /// One atomic load of the flags of descriptor `index`.
    fn load_flags(&self, index: u16, order: Ordering) -> u16;
    /// Our own copy of descriptor `index`, read once but for the flags, which were loaded before and are `flags`.
    fn read_descriptor(&self, index: u16, flags: u16) -> PackedDescriptor;
    /// Writes a used descriptor: its flags by an atomic store, and what comes before them no later.
    fn write_used(&self, index: u16, used: UsedDescriptor, order: Ordering);
    /// One atomic load of the driver's event suppression structure.
    fn driver_event(&self) -> EventSuppression;
    /// One atomic store to the device's event suppression structure.
    fn set_device_event(&self, event: EventSuppression);
    /// A fence.
    fn fence(&self, order: Ordering);
}

/// A packed virtqueue's memory and the rules of its notifications.
#[derive(Debug)]
pub(in crate::queue) struct PackedRing<M> {
    memory: M,
    event_idx: bool,
}

impl<M> PackedRing<M> {
    pub(in crate::queue) fn with_memory<N>(self, memory: N) -> PackedRing<N> {
        PackedRing { memory, event_idx: self.event_idx }
    }
}

impl<M: PackedRingMemory> PackedRing<M> {
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

    /// The flags of the descriptor at `position`, if the driver has made it available. What the driver wrote before these
    /// flags is visible afterwards: the descriptor, and those that follow it in its list.
    #[inline(always)]
    pub(in crate::queue) fn available(&self, position: Position) -> Option<u16> {
        let flags = self.memory.load_flags(position.index(), Ordering::Acquire);
        (flags & (AVAIL | USED) == position.avail()).then_some(flags)
    }

    /// The descriptor at `position`, which was found [`available`](Self::available) with these flags.
    #[inline(always)]
    pub(in crate::queue) fn descriptor(&self, position: Position, flags: u16) -> PackedDescriptor {
        self.memory.read_descriptor(position.index(), flags)
    }

    /// The descriptor at `position`, which follows another one in a list.
    #[inline(always)]
    pub(in crate::queue) fn next_descriptor(&self, position: Position) -> PackedDescriptor {
        let flags = self.memory.load_flags(position.index(), Ordering::Relaxed);
        self.memory.read_descriptor(position.index(), flags)
    }

    /// Gives back buffer `id`, with `len` bytes written, in the descriptor at `position`, which is not the next one that the
    /// driver looks at: it comes here after it has seen what [`publish`](Self::publish) writes.
    #[inline(always)]
    pub(in crate::queue) fn write_used(&self, position: Position, id: u16, len: u32) {
        self.memory.write_used(position.index(), used(position, id, len), Ordering::Relaxed);
    }

    /// Gives back buffer `id`, with `len` bytes written, in the descriptor at `first`, the next one that the driver looks at,
    /// and so publishes all used descriptors before `next_used`. Decides whether to interrupt.
    #[inline(always)]
    pub(in crate::queue) fn publish(&self, first: Position, id: u16, len: u32, next_used: Position) -> Signal {
        // Release: the other used descriptors, statuses and data before the flags of the first one.
        self.memory.write_used(first.index(), used(first, id, len), Ordering::Release);
        // ORDERING: our store is the flags of the first used descriptor, our load is the driver's event suppression
        // structure. The driver's pair, before it sleeps: it stores the structure, has a full barrier, and loads the flags.
        // Without ours the load may be done before the store is seen: we read that it wants no interrupt, it reads that
        // nothing was used, and it waits for an interrupt that nobody sends.
        self.memory.fence(Ordering::SeqCst);
        let wanted = match self.memory.driver_event() {
            EventSuppression::Disable => false,
            EventSuppression::Descriptor(event) if self.event_idx => {
                event_idx::passed_in_ring(event, next_used, first, self.size())
            }
            EventSuppression::Enable | EventSuppression::Descriptor(_) => true,
        };
        if wanted { Signal::Needed } else { Signal::Suppressed }
    }

    /// Asks the driver for a kick when it makes the descriptor at `next_avail` available, and looks whether it has done so
    /// already.
    #[inline(always)]
    pub(in crate::queue) fn arm(&self, next_avail: Position) -> Armed {
        let event = if self.event_idx { EventSuppression::Descriptor(next_avail) } else { EventSuppression::Enable };
        self.memory.set_device_event(event);
        // ORDERING: our store is the device's event suppression structure, our load is the flags of the next descriptor. The
        // driver's pair, when it adds buffers: it stores the flags, has a full barrier, and loads the structure. Without ours
        // the load may be done before the store is seen: we read that nothing was added, it reads that we want no kick, and
        // its request lies there while we sleep.
        self.memory.fence(Ordering::SeqCst);
        let flags = self.memory.load_flags(next_avail.index(), Ordering::Relaxed);
        if flags & (AVAIL | USED) == next_avail.avail() { Armed::Work } else { Armed::Sleep }
    }

    /// Asks for no kicks: a hint that needs no barrier. With the event index it must be said too, or the driver kicks each
    /// time that it comes by the descriptor that was asked for.
    #[inline(always)]
    pub(in crate::queue) fn disarm(&self) {
        self.memory.set_device_event(EventSuppression::Disable);
    }
}

#[inline(always)]
fn used(position: Position, id: u16, len: u32) -> UsedDescriptor {
    let write = if len > 0 { WRITE } else { 0 };
    UsedDescriptor { len, id, flags: position.used() | write }
}
