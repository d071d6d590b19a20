//! A served disk and the driver's memory.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use client::{BlockDriver, BlockOptions, BlockQueue, Buffer, Client, GuestMemory, Segment};

/// Where the driver's memory lies; any address would do.
const MEMORY_IOVA: u64 = 0x1_0000_0000;
/// What a queue, its headers and its indirect tables need, generously.
const RINGS: usize = 2 << 20;

/// Where pages that are mapped each for itself start; far beyond the rest.
const SCATTERED_IOVA: u64 = 0x100_0000_0000;
/// Bytes of such a page.
const PAGE: u64 = 4096;

/// The page with this number among those that [`Disk::scatter`] maps.
pub(super) fn scattered(page: u32) -> Segment {
    // With a gap behind each.
    Segment { iova: SCATTERED_IOVA + u64::from(page) * 2 * PAGE, len: PAGE as u32 }
}

/// A disk of a vfio-user server, in use.
pub(super) struct Disk {
    client: Arc<Client>,
    memory: GuestMemory,
    driver: BlockDriver,
    pub(super) queues: Vec<BlockQueue>,
    /// Memory for the requests' data.
    pub(super) data: Buffer,
}

impl Disk {
    /// Attaches to the server at `socket`, with `size` bytes for data.
    pub(super) fn attach(socket: &Path, options: &BlockOptions, size: usize) -> Result<Self> {
        let context = || format!("cannot use the disk at {}", socket.display());
        let client = Arc::new(Client::connect(socket).with_context(context)?);
        let memory = memory(size)?;
        client.dma_map(&memory.dma_map(), Some(memory.fd())).with_context(context)?;
        let data = memory.allocate(size, 4096)?;
        let (driver, queues) = BlockDriver::start(Arc::clone(&client), &memory, options).with_context(context)?;
        Ok(Self { client, memory, driver, queues, data })
    }

    /// Maps so many pages, each for itself: pages of the memory for data, again and again.
    pub(super) fn scatter(&self, pages: u32) -> Result<()> {
        let of_data = self.memory.dma_map();
        let first = self.data.iova() - of_data.address;
        for page in 0..pages {
            let mut map = of_data;
            (map.address, map.size) = (scattered(page).iova, PAGE);
            map.offset = first + u64::from(page) * PAGE % (self.data.len() as u64);
            self.client.dma_map(&map, Some(self.memory.fd())).context("cannot map a page")?;
        }
        Ok(())
    }

    /// Resets the device.
    pub(super) fn detach(self) -> Result<()> {
        self.driver.stop().context("the disk does not reset")
    }
}

/// Memory for a driver with `size` bytes of data.
pub(super) fn memory(size: usize) -> Result<GuestMemory> {
    let size = (size + RINGS).next_multiple_of(1 << 21);
    GuestMemory::new(size, MEMORY_IOVA).context("no memory for the driver")
}
