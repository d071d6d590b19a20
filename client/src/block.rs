//! A virtio block device (virtio 1.3 section 5.2).

mod config;
mod queue;

use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SECURE_ERASE, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::{Client, Error, GuestMemory, NO_VECTOR, NotifyMethod, PackedDriver, Ring, SplitDriver, VirtioPci};
pub use config::{BlockConfig, EraseLimits, Topology};
use queue::Limits;
pub use queue::{BlockQueue, BlockRequest, Completion, RequestType, Tag};

/// How to start a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOptions {
    /// The features to accept where the device offers them, one bit each. VERSION_1 is always
    /// accepted.
    pub features: u64,
    /// The most queues to use.
    pub queues: u16,
    /// The most entries of a queue: a power of two, unless the queues are packed.
    pub queue_size: u16,
    /// How the device is notified.
    pub notify: NotifyMethod,
    /// Whether the device interrupts, over MSI-X; otherwise completions are polled for.
    pub interrupts: bool,
    /// The most segments of a chain that goes into an indirect table, with header and status, where
    /// `VIRTIO_RING_F_INDIRECT_DESC` is negotiated. 0 for no such chain.
    pub indirect_entries: u16,
    /// The size of the memory through which the calls that copy move data, in bytes for each queue.
    pub bounce_size: usize,
}

impl BlockOptions {
    /// All features that this driver knows, but for [`PACKED`](Self::PACKED) and [`IN_ORDER`](Self::IN_ORDER).
    pub const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_GEOMETRY
        | 1 << VIRTIO_BLK_F_RO
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_CONFIG_WCE
        | 1 << VIRTIO_BLK_F_MQ
        | 1 << VIRTIO_BLK_F_DISCARD
        | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        | 1 << VIRTIO_BLK_F_SECURE_ERASE
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_F_RING_RESET;
    /// Packed virtqueues.
    pub const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
    /// Requests given back in the order in which they were submitted.
    pub const IN_ORDER: u64 = 1 << VIRTIO_F_IN_ORDER;
}

impl Default for BlockOptions {
    /// [`FEATURES`](Self::FEATURES), all queues of up to 256 entries, posted notifications, interrupts, chains of up
    /// to 8 segments in indirect tables, and 256 KiB to copy through.
    fn default() -> BlockOptions {
        BlockOptions {
            features: BlockOptions::FEATURES,
            queues: u16::MAX,
            queue_size: 256,
            notify: NotifyMethod::default(),
            interrupts: true,
            indirect_entries: 8,
            bounce_size: 256 << 10,
        }
    }
}

/// A block device that runs. Its queues are apart, so that each can go to a thread of its own.
pub struct BlockDriver {
    transport: VirtioPci,
    features: u64,
    /// Signalled when the configuration changes.
    config_interrupt: Option<EventFd>,
}

impl BlockDriver {
    /// Resets the device and brings it to `DRIVER_OK` (section 3.1.1). `memory` must be mapped for the
    /// device ([`Client::dma_map`]); the queues live in it.
    ///
    /// # Errors
    /// [`Error::Device`] for a device that breaks the specification or lacks what `options` ask for,
    /// [`Error::OutOfMemory`] when `memory` is too small, and those of the connection.
    pub fn start(
        client: Arc<Client>,
        memory: &GuestMemory,
        options: &BlockOptions,
    ) -> Result<(BlockDriver, Vec<BlockQueue>), Error> {
        let timeout = client.timeout();
        let transport = VirtioPci::new(client)?;
        transport.reset()?;
        let features = transport.negotiate(options.features)?;
        let mut driver = BlockDriver { transport, features, config_interrupt: None };
        let config = driver.config()?;
        let count = config.num_queues.unwrap_or(1).min(options.queues);

        let mut interrupts = driver.enable_interrupts(count, options)?.into_iter();
        if let Some(interrupt) = interrupts.next() {
            driver.transport.set_config_vector(0)?;
            driver.config_interrupt = Some(interrupt);
        }
        let limits = Limits { seg_max: config.seg_max, size_max: config.size_max, timeout };
        let mut queues = Vec::with_capacity(count.into());
        for index in 0..count {
            let interrupt = interrupts.next();
            // Vector 0 tells of the configuration, the others of one queue each.
            let vector = if interrupt.is_some() { index + 1 } else { NO_VECTOR };
            let ring = driver.ring(index, memory, options)?;
            driver.transport.enable_queue(index, ring.size(), ring.areas(), vector)?;
            let doorbell = driver.transport.doorbell(index, options.notify)?;
            let bounce = memory.allocate(options.bounce_size, 4096)?;
            queues.push(BlockQueue::new(memory, ring, doorbell, interrupt, bounce, limits)?);
        }
        driver.transport.driver_ok()?;
        Ok((driver, queues))
    }

    /// Resets the device: it is done with the memory when this returns.
    ///
    /// # Errors
    /// [`Error::Timeout`], and those of the connection.
    pub fn stop(self) -> Result<(), Error> {
        self.transport.reset()
    }

    /// The registers.
    pub fn transport(&self) -> &VirtioPci {
        &self.transport
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a feature, `VIRTIO_*_F_*`, was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Signalled when the configuration changes; `None` without interrupts.
    pub fn config_interrupt(&self) -> Option<&EventFd> {
        self.config_interrupt.as_ref()
    }

    /// Reads the configuration.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn config(&self) -> Result<BlockConfig, Error> {
        BlockConfig::read(&self.transport, self.features)
    }

    /// Switches the cache of the device to write-back or write-through (section 5.2.5).
    ///
    /// # Errors
    /// [`Error::Device`] without `VIRTIO_BLK_F_CONFIG_WCE`, and those of the connection.
    pub fn set_writeback(&self, writeback: bool) -> Result<(), Error> {
        if !self.has_feature(VIRTIO_BLK_F_CONFIG_WCE) {
            return Err(Error::Device("its cache cannot be switched"));
        }
        self.transport.write_device_config(config::WRITEBACK, &[writeback.into()])
    }

    /// Resets one queue and starts it anew (`VIRTIO_F_RING_RESET`). Requests in flight are lost.
    ///
    /// # Errors
    /// [`Error::Device`] without the feature, and those of the connection.
    pub fn restart_queue(&self, index: u16, queue: &mut BlockQueue) -> Result<(), Error> {
        if !self.has_feature(VIRTIO_F_RING_RESET) {
            return Err(Error::Device("its queues cannot be reset one by one"));
        }
        self.transport.reset_queue(index)?;
        queue.ring_mut().restart();
        let vector = if queue.interrupt().is_some() { index + 1 } else { NO_VECTOR };
        self.transport.enable_queue(index, queue.ring().size(), queue.ring().areas(), vector)
    }

    /// Attaches an eventfd to a vector for the configuration and one for each queue.
    fn enable_interrupts(&self, queues: u16, options: &BlockOptions) -> Result<Vec<EventFd>, Error> {
        if !options.interrupts {
            return Ok(Vec::new());
        }
        let vectors = self.transport.capabilities().msix.map_or(0, |msix| msix.table_size);
        if vectors <= queues {
            return Err(Error::Device("it has too few MSI-X vectors; poll, or use fewer queues"));
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let interrupts = (0..=queues)
            .map(|_| EventFd::from_value_and_flags(0, flags))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::system("create an eventfd"))?;
        self.transport.enable_msix(&interrupts)?;
        Ok(interrupts)
    }

    fn ring(&self, index: u16, memory: &GuestMemory, options: &BlockOptions) -> Result<Ring, Error> {
        let size = self.transport.max_queue_size(index)?.min(options.queue_size);
        let indirect = self.has_feature(VIRTIO_RING_F_INDIRECT_DESC);
        let indirect_entries = if indirect { options.indirect_entries } else { 0 };
        let event_idx = self.has_feature(VIRTIO_RING_F_EVENT_IDX);
        let in_order = self.has_feature(VIRTIO_F_IN_ORDER);
        Ok(if self.has_feature(VIRTIO_F_RING_PACKED) {
            let driver = PackedDriver::new(memory, size, event_idx, indirect_entries)?;
            if in_order { driver.in_order() } else { driver }.into()
        } else {
            let driver = SplitDriver::new(memory, size, event_idx, indirect_entries)?;
            if in_order { driver.in_order() } else { driver }.into()
        })
    }
}
