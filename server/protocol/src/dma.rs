//! DMA_MAP and DMA_UNMAP.

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL};

use crate::fields::{Fields, put_u32s, put_u64s};

/// A range of DMA addresses that the client offers (section "VFIO_USER_DMA_MAP"). The file
/// descriptor, if the range can be mapped, comes with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaMap {
    /// The device may read the range.
    pub readable: bool,
    /// The device may write the range.
    pub writeable: bool,
    /// Where the range starts in the file.
    pub offset: u64,
    /// Where the range starts among the DMA addresses (the IOVA).
    pub address: u64,
    /// The size of the range. `address + size` does not overflow, nor does `offset + size`.
    pub size: u64,
}

impl DmaMap {
    const SIZE: u32 = 32;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let read = if self.readable { VFIO_DMA_MAP_FLAG_READ } else { 0 };
        let write = if self.writeable { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        put_u32s(out, &[DmaMap::SIZE, read | write]);
        put_u64s(out, &[self.offset, self.address, self.size]);
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<DmaMap, Errno> {
        let mut fields = Fields::new(payload);
        fields.argsz(DmaMap::SIZE)?;
        // Unknown bits are ignored: newer clients say more about the file there.
        let flags = fields.u32()?;
        let map = DmaMap {
            readable: flags & VFIO_DMA_MAP_FLAG_READ != 0,
            writeable: flags & VFIO_DMA_MAP_FLAG_WRITE != 0,
            offset: fields.u64()?,
            address: fields.u64()?,
            size: fields.u64()?,
        };
        let ends = (map.address.checked_add(map.size), map.offset.checked_add(map.size));
        if map.size == 0 || ends.0.is_none() || ends.1.is_none() {
            return Err(Errno::EINVAL);
        }
        Ok(map)
    }
}

/// The DMA addresses that the client takes back (section "VFIO_USER_DMA_UNMAP").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaUnmap {
    /// One range, exactly as it was mapped.
    Range {
        /// Where the range starts.
        address: u64,
        /// The size of the range.
        size: u64,
    },
    /// Every range (`VFIO_DMA_UNMAP_FLAG_ALL`).
    All,
}

impl DmaUnmap {
    const SIZE: u32 = 24;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (flags, address, size) = match *self {
            DmaUnmap::Range { address, size } => (0, address, size),
            DmaUnmap::All => (VFIO_DMA_UNMAP_FLAG_ALL, 0, 0),
        };
        put_u32s(out, &[DmaUnmap::SIZE, flags]);
        put_u64s(out, &[address, size]);
    }

    /// Reads the payload of a request, or of a reply that echoes it.
    ///
    /// # Errors
    /// EINVAL when it is too short or combines ALL with a range; ENOTSUP for flags other than ALL
    /// (dirty page tracking).
    pub fn decode(payload: &[u8]) -> Result<DmaUnmap, Errno> {
        let mut fields = Fields::new(payload);
        fields.argsz(DmaUnmap::SIZE)?;
        let flags = fields.u32()?;
        let (address, size) = (fields.u64()?, fields.u64()?);
        match flags {
            0 => Ok(DmaUnmap::Range { address, size }),
            VFIO_DMA_UNMAP_FLAG_ALL if address == 0 && size == 0 => Ok(DmaUnmap::All),
            VFIO_DMA_UNMAP_FLAG_ALL => Err(Errno::EINVAL),
            _ => Err(Errno::ENOTSUP),
        }
    }
}
