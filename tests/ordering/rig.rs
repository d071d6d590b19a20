//! Both sides of a virtqueue over one memory file, which each has mapped for itself.

#![allow(dead_code, reason = "each test of this folder takes what it needs")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use client::{PackedDriver, Ring, SplitDriver};
use virtio::memory::{
    Access, GuestMemory, MappedPackedRing, MappedQueue, MappedRing, Mapping, MemoryFile, PinnedBuffers, RingAddresses,
    SharedTable,
};
use virtio::queue::{
    Field, Head, PackedQueue, PackedRingMemory, Position, QueueError, RingFeatures, RingMemory, SplitQueue, Virtqueue,
};

pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const LEN: usize = 0x1_0000;

/// The formats, as they ship.
pub(crate) type Split = SplitQueue<MappedRing>;
pub(crate) type Packed = PackedQueue<MappedPackedRing>;

pub(crate) struct Rig<Q> {
    /// The device's side.
    pub(crate) queue: Q,
    /// What it sees of the guest.
    pub(crate) memory: GuestMemory,
    pub(crate) driver: Ring,
}

/// A format of virtqueues.
pub(crate) trait Format: Virtqueue<Memory: MappedQueue> + Send {
    /// The driver for it.
    fn driver(guest: &client::GuestMemory, size: u16, event_idx: bool, indirect: u16, in_order: bool) -> Ring;

    /// Whether there is something to pop, for a device that polls.
    fn has_news(&self) -> bool;
}

impl Format for Split {
    fn driver(guest: &client::GuestMemory, size: u16, event_idx: bool, indirect: u16, in_order: bool) -> Ring {
        let driver = SplitDriver::new(guest, size, event_idx, indirect).unwrap();
        if in_order { driver.in_order() } else { driver }.into()
    }

    fn has_news(&self) -> bool {
        self.memory().load(Field::AvailIdx, Ordering::Acquire) != self.state().next_avail
    }
}

impl Format for Packed {
    fn driver(guest: &client::GuestMemory, size: u16, event_idx: bool, indirect: u16, in_order: bool) -> Ring {
        let driver = PackedDriver::new(guest, size, event_idx, indirect).unwrap();
        if in_order { driver.in_order() } else { driver }.into()
    }

    fn has_news(&self) -> bool {
        let next = Position::from_bits(self.state().next_avail);
        let flags = self.memory().load_flags(next.index(), Ordering::Acquire);
        (flags & 1 << 7 != 0) == next.wrap() && (flags & 1 << 15 != 0) != next.wrap()
    }
}

impl<Q: Format> Rig<Q> {
    /// A queue of `size` entries; chains of 2 up to `indirect` segments take one descriptor.
    pub(crate) fn new(size: u16, event_idx: bool, indirect: u16, in_order: bool) -> Self {
        let guest = client::GuestMemory::new(LEN, BASE).unwrap();
        let driver = Q::driver(&guest, size, event_idx, indirect, in_order);
        let file = Arc::new(MemoryFile::map(File::from(guest.fd().try_clone_to_owned().unwrap())).unwrap());
        let table = SharedTable::default();
        table.map(Mapping::of_file(BASE, LEN as u64, Access::READ_WRITE, file, 0).unwrap()).unwrap();
        let mut memory = GuestMemory::new(Arc::new(table));
        let [desc, driver_area, device] = driver.areas();
        let at = RingAddresses { desc, driver: driver_area, device };
        let ring = Q::Memory::map(&mut memory, at, size).unwrap();
        let features = RingFeatures { event_idx, indirect_desc: indirect > 0, in_order };
        Rig { queue: Q::new(ring, features, Q::START), memory, driver }
    }
}

/// Takes the next request with all of its buffers.
pub(crate) fn pop<Q: Virtqueue>(
    queue: &mut Q,
    memory: &mut GuestMemory,
    buffers: &mut PinnedBuffers,
) -> Result<Option<Head>, QueueError> {
    buffers.recycle(memory);
    let head = queue.pop(memory, buffers)?;
    if let Some(head) = &head {
        queue.resolve(head, memory, buffers)?;
    }
    Ok(head)
}
