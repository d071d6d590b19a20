//! The configuration of a block device (virtio 1.3 section 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_SECURE_ERASE, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::{Error, VirtioPci};

/// Where `writeback` lies.
pub(super) const WRITEBACK: u64 = 32;
/// The end of the fields up to `secure_erase_sector_alignment`.
const SIZE: usize = 72;

/// The configuration. A field is `None` when the feature that it depends on is not negotiated. Sectors
/// have 512 bytes throughout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockConfig {
    /// The size of the device, in sectors.
    pub capacity: u64,
    /// The largest segment, in bytes.
    pub size_max: Option<u32>,
    /// The most segments of a request.
    pub seg_max: Option<u32>,
    /// Cylinders, heads and sectors.
    pub geometry: Option<(u16, u8, u8)>,
    /// The logical block size, in bytes.
    pub blk_size: Option<u32>,
    /// What suits the storage.
    pub topology: Option<Topology>,
    /// Whether the cache is write-back.
    pub writeback: Option<bool>,
    /// How many queues there are.
    pub num_queues: Option<u16>,
    /// What a discard may ask for.
    pub discard: Option<EraseLimits>,
    /// What a write-zeroes may ask for; the alignment is none.
    pub write_zeroes: Option<EraseLimits>,
    /// Whether a write-zeroes may unmap.
    pub write_zeroes_may_unmap: Option<bool>,
    /// What a secure erase may ask for.
    pub secure_erase: Option<EraseLimits>,
}

/// `topology` of the configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Topology {
    /// A physical block has two to the power of this logical blocks.
    pub physical_block_exp: u8,
    /// The first aligned logical block.
    pub alignment_offset: u8,
    /// The smallest good size of a request, in logical blocks.
    pub min_io_size: u16,
    /// The best size of a request, in logical blocks.
    pub opt_io_size: u32,
}

/// The limits of discard, write-zeroes or secure erase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EraseLimits {
    /// The most sectors of one range.
    pub max_sectors: u32,
    /// The most ranges of one request.
    pub max_seg: u32,
    /// What start and size of a range should be multiples of, in sectors.
    pub sector_alignment: Option<u32>,
}

impl BlockConfig {
    pub(super) fn read(transport: &VirtioPci, features: u64) -> Result<BlockConfig, Error> {
        // A device may end the structure with its last feature.
        let length = transport.capabilities().device.length as usize;
        let mut bytes = [0; SIZE];
        let front = bytes.get_mut(..length.min(SIZE)).unwrap_or_default();
        transport.read_device_config(0, front)?;
        Ok(BlockConfig::parse(&bytes, features))
    }

    fn parse(bytes: &[u8; SIZE], features: u64) -> BlockConfig {
        let has = |bit: u32| features >> bit & 1 != 0;
        let [u8_at, u16_at, u32_at] = [1, 2, 4].map(|width| {
            move |offset: usize| {
                let mut field = [0; 4];
                let from = bytes.get(offset..offset + width).unwrap_or_default();
                field.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                u32::from_le_bytes(field)
            }
        });
        let erase = |bit, max_sectors, max_seg, alignment: Option<usize>| {
            has(bit).then(|| EraseLimits {
                max_sectors: u32_at(max_sectors),
                max_seg: u32_at(max_seg),
                sector_alignment: alignment.map(u32_at),
            })
        };
        BlockConfig {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: has(VIRTIO_BLK_F_SIZE_MAX).then(|| u32_at(8)),
            seg_max: has(VIRTIO_BLK_F_SEG_MAX).then(|| u32_at(12)),
            geometry: has(VIRTIO_BLK_F_GEOMETRY).then(|| (u16_at(16) as u16, u8_at(18) as u8, u8_at(19) as u8)),
            blk_size: has(VIRTIO_BLK_F_BLK_SIZE).then(|| u32_at(20)),
            topology: has(VIRTIO_BLK_F_TOPOLOGY).then(|| Topology {
                physical_block_exp: u8_at(24) as u8,
                alignment_offset: u8_at(25) as u8,
                min_io_size: u16_at(26) as u16,
                opt_io_size: u32_at(28),
            }),
            writeback: has(VIRTIO_BLK_F_CONFIG_WCE).then(|| u8_at(WRITEBACK as usize) != 0),
            num_queues: has(VIRTIO_BLK_F_MQ).then(|| u16_at(34) as u16),
            discard: erase(VIRTIO_BLK_F_DISCARD, 36, 40, Some(44)),
            write_zeroes: erase(VIRTIO_BLK_F_WRITE_ZEROES, 48, 52, None),
            write_zeroes_may_unmap: has(VIRTIO_BLK_F_WRITE_ZEROES).then(|| u8_at(56) != 0),
            secure_erase: erase(VIRTIO_BLK_F_SECURE_ERASE, 60, 64, Some(68)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let bytes: [u8; SIZE] = std::array::from_fn(|i| i as u8);
        let le = |offset: u32| {
            let byte = |i: u32| (offset + i) << (8 * i);
            byte(0) | byte(1) | byte(2) | byte(3)
        };
        let erase =
            |at: u32, alignment| EraseLimits { max_sectors: le(at), max_seg: le(at + 4), sector_alignment: alignment };
        let expected = BlockConfig {
            capacity: 0x0706_0504_0302_0100,
            size_max: Some(le(8)),
            seg_max: Some(le(12)),
            geometry: Some((0x1110, 18, 19)),
            blk_size: Some(le(20)),
            topology: Some(Topology {
                physical_block_exp: 24,
                alignment_offset: 25,
                min_io_size: 0x1b1a,
                opt_io_size: le(28),
            }),
            writeback: Some(true),
            num_queues: Some(0x2322),
            discard: Some(erase(36, Some(le(44)))),
            write_zeroes: Some(erase(48, None)),
            write_zeroes_may_unmap: Some(true),
            secure_erase: Some(erase(60, Some(le(68)))),
        };
        assert_eq!(BlockConfig::parse(&bytes, u64::MAX), expected);
        let bare = BlockConfig { capacity: expected.capacity, ..BlockConfig::default() };
        assert_eq!(BlockConfig::parse(&bytes, 0), bare);
    }
}
