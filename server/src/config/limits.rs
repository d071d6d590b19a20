//! What one client may take of a server that it shares with others.

use super::{DeviceConfig, InvalidDevice, Size};

/// The most that a device's client may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// Bytes of the files that its memory lies in: each is mapped whole, once.
    pub guest_memory: u64,
    /// Ranges of memory (`max_dma_maps` of the protocol).
    pub dma_maps: u32,
    /// Descriptors of its own that are kept: one for each memory file and for each interrupt.
    pub fds: u32,
    /// Bytes of one region access (`max_data_xfer_size` of the protocol); messages of either direction are as large.
    pub data_xfer_size: u32,
    /// Whether its memory may lie in files of any file system.
    pub any_memory_file: bool,
}

impl ClientLimits {
    /// What an operator gets who says nothing.
    pub const DEFAULT: Self =
        Self { guest_memory: 1 << 40, dma_maps: 65535, fds: 128, data_xfer_size: 1 << 20, any_memory_file: false };
    /// The smallest `data_xfer_size`: larger than any register.
    const MIN_DATA_XFER_SIZE: u64 = 4096;
    /// The largest: what QEMU takes at most.
    const MAX_DATA_XFER_SIZE: u64 = 64 << 20;

    /// The limits of a device.
    ///
    /// # Errors
    /// The first that makes no sense.
    pub(crate) fn of(device: &DeviceConfig) -> Result<Self, InvalidDevice> {
        let default = Self::DEFAULT;
        let size = device.max_data_xfer_size.map_or(default.data_xfer_size.into(), |size| size.0);
        if !(Self::MIN_DATA_XFER_SIZE..=Self::MAX_DATA_XFER_SIZE).contains(&size) {
            return Err(InvalidDevice::MaxDataXferSize(Size(size)));
        }
        let dma_maps = device.max_dma_maps.unwrap_or(default.dma_maps);
        // More than the protocol's default is more than QEMU takes for an answer.
        if !(1..=65535).contains(&dma_maps) {
            return Err(InvalidDevice::MaxDmaMaps(dma_maps));
        }
        Ok(Self {
            guest_memory: device.max_guest_memory.map_or(default.guest_memory, |size| size.0),
            dma_maps,
            fds: device.max_fds.unwrap_or(default.fds),
            data_xfer_size: u32::try_from(size).map_err(|_| InvalidDevice::MaxDataXferSize(Size(size)))?,
            any_memory_file: device.any_memory_file,
        })
    }
}
