//! The shared memory of a virtqueue, and the order in which both sides see it.
//!
//! A device and a driver each publish an index and then ask whether the other side wants to hear of it. Both do the same
//! at the same time, so each may publish and still read what the other had said before: if neither then sees the other's
//! news, neither wakes the other, and the guest sleeps for ever. That is the store-buffer pattern (the kernel's litmus test
//! `SB+fencembonceonces`); only a full barrier between *our store* and *our load*, on both sides, rules it out. Release
//! and Acquire do not: they order loads before stores and stores among themselves, never a store before a later load,
//! and x86 does move such a load up.
//!
//! The barriers are inside `publish` and `arm` of either format, which decide, so that no caller can forget them.

mod packed;
mod split;

pub(super) use packed::PackedRing;
pub use packed::{EventSuppression, PackedDescriptor, PackedRingMemory, Position, UsedDescriptor};
pub(super) use split::SplitRing;
pub use split::{Descriptor, Field, RingMemory};

/// The answer to: does the driver want an interrupt for what was just published?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a signal that is needed and not sent leaves the guest asleep"]
pub enum Signal {
    /// Yes.
    Needed,
    /// The driver asked for none.
    Suppressed,
    /// Nothing new was published.
    Idle,
}

/// The answer to: may this queue's worker go to sleep?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a worker that sleeps in spite of work sleeps for ever"]
pub enum Armed {
    /// Yes: whatever the driver adds from now on, it will kick for.
    Sleep,
    /// No: there are entries already, for which no kick may come.
    Work,
}
