//! Virtqueues, the device's side (virtio 1.3 §2.6), split (§2.7) and packed (§2.8).
//!
//! - [`ring`](self): the shared memory and everything about ordering; the only fences of this crate's data path.
//! - [`SplitQueue`], [`PackedQueue`]: positions, batches, who is in flight. [`Virtqueue`]: what both can do.
//! - `Walk`: from descriptors to pinned buffers.
//! - [`event_idx`]: was the index crossed that the other side waits for?

mod chain;
pub mod event_idx;
mod in_order;
#[cfg(all(test, loom))]
mod model;
mod packed;
mod ring;
mod split;
mod virtqueue;

pub use chain::{ChainError, MAX_DESCRIPTORS};
pub use in_order::Written;
pub use packed::PackedQueue;
pub use ring::{
    Armed, Descriptor, EventSuppression, Field, PackedDescriptor, PackedRingMemory, Position, RingMemory, Signal,
    UsedDescriptor,
};
pub use split::SplitQueue;
pub use virtqueue::{Head, QueueError, QueueState, RingFeatures, Virtqueue};
