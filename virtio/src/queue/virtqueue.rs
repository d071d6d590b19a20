//! What the two formats of virtqueues have in common.

use std::num::NonZeroU64;

use super::chain::ChainError;
use super::in_order::Written;
use super::ring::{Armed, Signal};
use crate::memory::{GuestMemory, PinnedBuffers};

/// The ring features that were negotiated (virtio 1.3 §6), but for `VIRTIO_F_RING_PACKED`, which decides between
/// [`SplitQueue`](super::SplitQueue) and [`PackedQueue`](super::PackedQueue).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect_desc: bool,
    /// `VIRTIO_F_IN_ORDER`.
    pub in_order: bool,
}

/// What a guest did wrong in a queue. The queue is of no use until the device is reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// Split: `avail.idx` runs ahead by more than there are entries.
    #[error("avail.idx is {avail_idx}, more than {size} entries beyond {next_avail}")]
    AvailIdx {
        /// What the driver published.
        avail_idx: u16,
        /// Where the device stands.
        next_avail: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// Split: a head beyond the descriptor table.
    #[error("the available ring names descriptor {head} of a table of {size}")]
    Head {
        /// The head.
        head: u16,
        /// Entries of the table.
        size: u16,
    },
    /// Split: a head that the device has not given back yet.
    #[error("the available ring names descriptor {0} again before it was used")]
    HeadInFlight(u16),
    /// Packed: a descriptor that the device has not given back yet.
    #[error("descriptor {0} is made available again before it was used")]
    DescriptorInFlight(u16),
    /// A chain that is not one.
    #[error("the chain at descriptor {head}: {source}")]
    Chain {
        /// Its head.
        head: u16,
        /// What is wrong with it.
        source: ChainError,
    },
}

/// A request that was taken off a queue, and the duty to give it back: by `complete`, exactly once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request must be completed"]
pub struct Head {
    /// From the lowest bit on, 16 bits each: the identifier, a one, so that there is a word which is no head, the descriptors,
    /// and the slot. A word is moved about in fewer instructions than three numbers.
    word: NonZeroU64,
}

impl Head {
    const ONE: NonZeroU64 = match NonZeroU64::new(1 << 16) {
        Some(one) => one,
        None => NonZeroU64::MIN,
    };

    /// A request by this identifier that takes so many descriptors of the ring; with `VIRTIO_F_IN_ORDER` it has a place, its
    /// slot, among those in flight.
    #[inline(always)]
    pub(super) fn new(id: u16, descriptors: u16, slot: u16) -> Self {
        Self { word: Self::ONE | u64::from(id) | u64::from(descriptors) << 32 | u64::from(slot) << 48 }
    }

    /// Split: the index of the chain's first descriptor, less than the queue's size, and not shared by two requests in flight.
    /// Packed: the buffer ID, which is the driver's and says nothing to us.
    #[inline(always)]
    pub fn id(&self) -> u16 {
        self.word.get() as u16
    }

    #[inline(always)]
    pub(super) fn descriptors(&self) -> u16 {
        (self.word.get() >> 32) as u16
    }

    #[inline(always)]
    pub(super) fn slot(&self) -> u16 {
        (self.word.get() >> 48) as u16
    }
}

/// Where a device stands in a queue; with nothing in flight this is all there is to carry over. Split: entries, modulo 2^16.
/// Packed: descriptors, with the wrap counter in bit 15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// What is to be taken next.
    pub next_avail: u16,
    /// Where the next is to be given back.
    pub next_used: u16,
}

/// The device's side of a virtqueue, of either format.
pub trait Virtqueue: Sized {
    /// The memory under the queue.
    type Memory;
    /// The queue without its memory: where that is gone for a while. Requests in flight stay so.
    type Parked;

    /// Where a new queue stands.
    const START: QueueState;

    /// A queue over `memory`, which stands where `state` says.
    fn new(memory: Self::Memory, features: RingFeatures, state: QueueState) -> Self;

    /// The memory under the queue.
    fn memory(&self) -> &Self::Memory;

    /// Lets go of the memory.
    fn park(self) -> Self::Parked;

    /// Goes on over `memory`, which holds the same queue, wherever it is now.
    fn resume(parked: Self::Parked, memory: Self::Memory) -> Self;

    /// As [`state`](Self::state).
    fn parked_state(parked: &Self::Parked) -> QueueState;

    /// Where the device stands.
    fn state(&self) -> QueueState;

    /// Takes the next request, if there is one, and pins in `buffers`, which must be empty, what the ring itself says of its
    /// buffers. The rest may be elsewhere: [`resolve`](Self::resolve) finds it, and the processor has been asked for it.
    ///
    /// # Errors
    /// If the driver broke the queue's rules; whatever is in flight can still be completed.
    fn pop(&mut self, memory: &mut GuestMemory, buffers: &mut PinnedBuffers) -> Result<Option<Head>, QueueError>;

    /// Pins the rest of a request's buffers, and asks the processor to have the first and the last of them at hand. Indirect tables are read here and not before, so that those of several
    /// requests can be on their way at the same time.
    ///
    /// # Errors
    /// If the driver broke the rules.
    fn resolve(&mut self, head: &Head, memory: &mut GuestMemory, buffers: &mut PinnedBuffers)
    -> Result<(), QueueError>;

    /// Gives a request back, with so much of its buffers written. The driver sees it after the next
    /// [`publish`](Self::publish); with `VIRTIO_F_IN_ORDER`, after the one that follows when all requests before it are
    /// given back too.
    fn complete(&mut self, head: Head, written: impl Into<Written>);

    /// Shows the driver all that was completed and says whether it wants an interrupt for it. Once a batch, and at
    /// least once a queue's size of completions.
    fn publish(&mut self) -> Signal;

    /// Asks for a kick with the next request and says whether the worker may sleep. The kicks end with the next
    /// [`pop`](Self::pop) that finds something.
    fn arm(&mut self) -> Armed;
}
