//! Split virtqueues, the device's side (virtio 1.3 §2.7).
//!
//! - [`ring`](self): the shared memory and everything about ordering; the only fences of this crate's data path.
//! - [`SplitQueue`]: positions, batches, who is in flight.
//! - `Walk`: from descriptors to pinned buffers.
//! - [`event_idx`]: was the index crossed that the other side waits for?

mod chain;
pub mod event_idx;
#[cfg(all(test, loom))]
mod model;
mod ring;
mod split;

pub use chain::{ChainError, MAX_DESCRIPTORS};
pub use ring::{Armed, Descriptor, Field, RingMemory, Signal};
pub use split::{Head, Popped, QueueError, QueueState, RingFeatures, SplitQueue};
