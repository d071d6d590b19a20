//! A served disk and the driver's memory.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use client::{BlockDriver, BlockOptions, BlockQueue, Buffer, Client, GuestMemory};

/// Where the driver's memory lies; any address would do.
const MEMORY_IOVA: u64 = 0x1_0000_0000;
/// What a queue, its headers and its indirect tables need, generously.
const RINGS: usize = 2 << 20;

/// A disk of a vfio-user server, in use.
pub(super) struct Disk {
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
        let (driver, queues) = BlockDriver::start(client, &memory, options).with_context(context)?;
        Ok(Self { driver, queues, data })
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
