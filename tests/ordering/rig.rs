//! Both sides of a split virtqueue over one memory file, which each has mapped for itself.

use std::fs::File;
use std::sync::Arc;

use client::SplitDriver;
use virtio::memory::{Access, GuestMemory, MappedRing, Mapping, MemoryFile, PinnedBuffers, RingAddresses, SharedTable};
use virtio::queue::{Head, QueueError, QueueState, RingFeatures, SplitQueue};

pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const LEN: usize = 0x1_0000;

pub(crate) struct Rig {
    /// The device's side, as it ships.
    pub(crate) queue: SplitQueue<MappedRing>,
    /// What it sees of the guest.
    pub(crate) memory: GuestMemory,
    pub(crate) driver: SplitDriver,
}

impl Rig {
    /// A queue of `size` entries; chains of 2 up to `indirect` segments take one descriptor.
    pub(crate) fn new(size: u16, event_idx: bool, indirect: u16) -> Self {
        let guest = client::GuestMemory::new(LEN, BASE).unwrap();
        let driver = SplitDriver::new(&guest, size, event_idx, indirect).unwrap();
        let file = Arc::new(MemoryFile::map(File::from(guest.fd().try_clone_to_owned().unwrap())).unwrap());
        let table = SharedTable::default();
        table.map(Mapping::of_file(BASE, LEN as u64, Access::READ_WRITE, file, 0).unwrap()).unwrap();
        let mut memory = GuestMemory::new(Arc::new(table));
        let [desc, avail, used] = driver.memory().areas();
        let ring = MappedRing::new(&mut memory, RingAddresses { desc, avail, used }, size).unwrap();
        let features = RingFeatures { event_idx, indirect_desc: indirect > 0 };
        Rig { queue: SplitQueue::new(ring, features, QueueState::default()), memory, driver }
    }
}

/// Takes the next request with all of its buffers.
pub(crate) fn pop(
    queue: &mut SplitQueue<MappedRing>,
    memory: &mut GuestMemory,
    buffers: &mut PinnedBuffers,
) -> Result<Option<Head>, QueueError> {
    buffers.clear();
    let Some(mut popped) = queue.pop(memory, buffers)? else { return Ok(None) };
    queue.resolve(&mut popped, memory, buffers)?;
    Ok(popped.resolved())
}
