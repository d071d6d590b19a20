//! Guest memory as a device reaches it: by IOVA, through the mappings that the client has made.
//!
//! - [`MemoryFile`]: one file of guest memory, mapped once however many IOVA ranges point into it.
//! - [`Loss`]: tells that a client took bytes of its files away, which [`outlive_lost_memory`] makes bearable.
//! - [`Mapping`]: one IOVA range. Whoever uses its bytes holds an [`Arc`](std::sync::Arc) of it: the bytes stay
//!   mapped in this process until the last holder lets go, and [`Release`] tells when that was.
//! - [`IovaTable`]: all mappings of a client, as a snapshot; [`SharedTable`]: the newest snapshot.
//! - [`GuestMemory`]: one queue's view, which remembers the mapping it used last.
//! - [`PinnedBuffers`]: the scatter list of one request, which owns the mappings it points into.
//! - [`MappedRing`], [`MappedPackedRing`]: the three areas of a split or packed virtqueue.
//!
//! Guest memory changes while we look at it. Nothing here hands out a Rust reference to its bytes: they are
//! copied out once, by [`GuestMemory::read`], or moved by pointer, by the kernel or a volatile slice.
//!
//! This is the only module of the crate with `unsafe`.

mod area;
mod buffers;
mod fault;
mod file;
mod mapping;
mod packed_ring_memory;
mod ring_memory;
mod table;
mod view;

pub use area::{MappedQueue, RingAddresses, RingMapError};
pub use buffers::PinnedBuffers;
pub(crate) use buffers::Rest;
pub use fault::{Loss, outlive_lost_memory};
pub use file::{FileIdentity, MemoryFile, MemoryFileError, is_plain_memory};
pub use mapping::{Access, Mapping, MappingError, Release};
pub use packed_ring_memory::MappedPackedRing;
pub use ring_memory::MappedRing;
pub use table::{IovaTable, OverlapError, SharedTable, UnmapError};
pub(crate) use view::{Bits, FrameRecords, Pinning};
pub use view::{GuestMemory, Unmapped};

#[cfg(test)]
pub(crate) mod testing;
