//! What the device says of itself (virtio 1.3 §5.2.3, §5.2.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::request::Limits;
use crate::device::VirtioDevice;

/// Bytes of the serial that GET_ID answers, zeroes at its end included.
pub const SERIAL_LEN: usize = 20;

/// Bytes of `struct virtio_blk_config` up to and with the write-zeroes fields.
const CONFIG_LEN: usize = 60;
/// Where `writeback`, the one field that a driver may write, lies.
const WRITEBACK: usize = 32;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What discards may ask for (`VIRTIO_BLK_F_DISCARD`); one range a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// The most sectors of one range, at least 1.
    pub max_sectors: u32,
    /// Sectors to which ranges are best aligned.
    pub alignment: u32,
}

/// What write-zeroes requests may ask for (`VIRTIO_BLK_F_WRITE_ZEROES`); one range a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroes {
    /// The most sectors of one range, at least 1.
    pub max_sectors: u32,
    /// Whether zeroes may free blocks.
    pub may_unmap: bool,
}

/// A block device as its owner wants it.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Bytes of a block: a power of two from 512 on.
    pub block_size: u32,
    /// Blocks of `block_size` in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Blocks of a good size for a transfer; 0 for none.
    pub opt_io_size: u32,
    /// The most data segments of a request, at least 1.
    pub seg_max: u32,
    /// Request queues, at least 1.
    pub num_queues: u16,
    /// The most entries of a queue: a power of two.
    pub max_queue_size: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// Whether completed writes may still be volatile until a flush, at first.
    pub writeback: bool,
    /// Discards, if there are any.
    pub discard: Option<Discard>,
    /// Write-zeroes, if there are any.
    pub write_zeroes: Option<WriteZeroes>,
    /// What GET_ID answers.
    pub serial: [u8; SERIAL_LEN],
}

/// The part of a device that its queues look at for every request, while its driver may change it.
#[derive(Debug)]
pub struct SharedConfig {
    config: BlockConfig,
    features: AtomicU64,
    capacity: AtomicU64,
    writeback: AtomicBool,
}

impl SharedConfig {
    /// The bounds that a request must keep now.
    pub fn limits(&self) -> Limits {
        let features = self.features.load(Ordering::Relaxed);
        let negotiated = |feature, most| if features & bit(feature) != 0 { most } else { 0 };
        let config = &self.config;
        Limits {
            capacity: self.capacity.load(Ordering::Relaxed),
            read_only: config.read_only,
            max_discard_sectors: negotiated(VIRTIO_BLK_F_DISCARD, config.discard.map_or(0, |it| it.max_sectors)),
            max_write_zeroes_sectors: negotiated(
                VIRTIO_BLK_F_WRITE_ZEROES,
                config.write_zeroes.map_or(0, |it| it.max_sectors),
            ),
            serial: config.serial,
        }
    }

    /// Sectors of the device now: the one of the limits that changes while a driver is at work.
    #[inline]
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Whether a write must be on stable storage when it completes (§5.2.6.2): in writethrough mode, which is also that of
    /// a driver that cannot flush.
    #[inline]
    pub fn writes_are_durable(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        if features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            !self.writeback.load(Ordering::Relaxed)
        } else {
            features & bit(VIRTIO_BLK_F_FLUSH) == 0 || !self.config.writeback
        }
    }

    /// Changes the number of sectors, which drivers read anew when they are told that the configuration changed (§5.2.5.2).
    pub fn set_capacity(&self, sectors: u64) {
        self.capacity.store(sectors, Ordering::Relaxed);
    }

    /// What the device was made with, which was its capacity then.
    pub fn config(&self) -> &BlockConfig {
        &self.config
    }
}

/// The block device as a transport sees it.
#[derive(Debug)]
pub struct BlockDevice {
    shared: Arc<SharedConfig>,
}

impl BlockDevice {
    /// A device; its queues are given [`shared`](Self::shared).
    pub fn new(config: BlockConfig) -> Self {
        let (capacity, writeback) = (config.capacity.into(), config.writeback.into());
        Self { shared: Arc::new(SharedConfig { config, features: AtomicU64::new(0), capacity, writeback }) }
    }

    /// What the queues look at.
    pub fn shared(&self) -> Arc<SharedConfig> {
        Arc::clone(&self.shared)
    }

    /// `struct virtio_blk_config`, little-endian.
    fn bytes(&self) -> [u8; CONFIG_LEN] {
        let config = &self.shared.config;
        let discard = config.discard.unwrap_or(Discard { max_sectors: 0, alignment: 0 });
        let write_zeroes = config.write_zeroes.unwrap_or(WriteZeroes { max_sectors: 0, may_unmap: false });
        let mut bytes = [0; CONFIG_LEN];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = bytes.get_mut(at..at.saturating_add(value.len())) {
                field.copy_from_slice(value);
            }
        };
        put(0, &self.shared.capacity.load(Ordering::Relaxed).to_le_bytes());
        put(12, &config.seg_max.to_le_bytes());
        put(20, &config.block_size.to_le_bytes());
        put(24, &[config.physical_block_exp, 0]);
        put(26, &1u16.to_le_bytes()); // min_io_size: one block
        put(28, &config.opt_io_size.to_le_bytes());
        put(WRITEBACK, &[self.shared.writeback.load(Ordering::Relaxed).into()]);
        put(34, &config.num_queues.to_le_bytes());
        put(36, &discard.max_sectors.to_le_bytes());
        put(40, &u32::from(config.discard.is_some()).to_le_bytes());
        put(44, &discard.alignment.to_le_bytes());
        put(48, &write_zeroes.max_sectors.to_le_bytes());
        put(52, &u32::from(config.write_zeroes.is_some()).to_le_bytes());
        put(56, &[write_zeroes.may_unmap.into()]);
        bytes
    }
}

impl VirtioDevice for BlockDevice {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class_code(&self) -> u32 {
        0x01_00_00 // mass storage, SCSI: what drivers and firmware expect of a virtio disk
    }

    fn features(&self) -> u64 {
        let config = &self.shared.config;
        let optional = |offered: bool, feature| if offered { bit(feature) } else { 0 };
        bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE)
            | optional(config.read_only, VIRTIO_BLK_F_RO)
            | optional(config.num_queues > 1, VIRTIO_BLK_F_MQ)
            | optional(config.discard.is_some(), VIRTIO_BLK_F_DISCARD)
            | optional(config.write_zeroes.is_some(), VIRTIO_BLK_F_WRITE_ZEROES)
    }

    fn num_queues(&self) -> u16 {
        self.shared.config.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.config.max_queue_size
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes().iter().skip(offset)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let negotiated = self.shared.features.load(Ordering::Relaxed) & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        let written = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at));
        if let (true, Some(value)) = (negotiated, written) {
            self.shared.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn features_acked(&mut self, features: u64) {
        self.shared.features.store(features, Ordering::Relaxed);
    }

    fn reset(&mut self) {
        self.shared.features.store(0, Ordering::Relaxed);
        self.shared.writeback.store(self.shared.config.writeback, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> BlockConfig {
        BlockConfig {
            capacity: 0x0102_0304,
            block_size: 4096,
            physical_block_exp: 3,
            opt_io_size: 16,
            seg_max: 254,
            num_queues: 4,
            max_queue_size: 256,
            read_only: false,
            writeback: true,
            discard: Some(Discard { max_sectors: 0x1000, alignment: 8 }),
            write_zeroes: Some(WriteZeroes { max_sectors: 0x2000, may_unmap: true }),
            serial: *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        }
    }

    #[test]
    fn fields_lie_where_the_specification_says() {
        let device = BlockDevice::new(config());
        let read = |offset, len: usize| {
            let mut bytes = [0; 8];
            device.read_config(offset, &mut bytes[..len]);
            u64::from_le_bytes(bytes)
        };
        let fields = [
            ((0, 8), 0x0102_0304),
            ((8, 4), 0),
            ((12, 4), 254),
            ((20, 4), 4096),
            ((24, 1), 3),
            ((26, 2), 1),
            ((28, 4), 16),
            ((32, 1), 1),
            ((34, 2), 4),
            ((36, 4), 0x1000),
            ((40, 4), 1),
            ((44, 4), 8),
            ((48, 4), 0x2000),
            ((52, 4), 1),
            ((56, 1), 1),
            ((58, 8), 0),
            ((4000, 4), 0),
        ];
        for ((offset, len), value) in fields {
            assert_eq!(read(offset, len), value, "offset {offset}");
        }
    }

    #[test]
    fn requests_and_drivers_see_a_new_capacity() {
        let device = BlockDevice::new(config());
        device.shared().set_capacity(0x1_0000_0001);
        let mut bytes = [0; 8];
        device.read_config(0, &mut bytes);
        assert_eq!((u64::from_le_bytes(bytes), device.shared().limits().capacity), (0x1_0000_0001, 0x1_0000_0001));
    }

    #[test]
    fn features_follow_the_configuration() {
        let offered = |change: fn(&mut BlockConfig)| {
            let mut config = config();
            change(&mut config);
            BlockDevice::new(config).features()
        };
        let all = offered(|_| {});
        for (without, feature) in [
            (offered(|config| config.num_queues = 1), VIRTIO_BLK_F_MQ),
            (offered(|config| config.discard = None), VIRTIO_BLK_F_DISCARD),
            (offered(|config| config.write_zeroes = None), VIRTIO_BLK_F_WRITE_ZEROES),
        ] {
            assert_eq!(all ^ without, bit(feature));
        }
        assert_eq!(all ^ offered(|config| config.read_only = true), bit(VIRTIO_BLK_F_RO));
    }

    /// §5.2.6.2: without CONFIG_WCE, a driver that cannot flush gets writethrough; with it, the field rules.
    #[test]
    fn the_write_cache_follows_features_and_field() {
        let (flush, wce) = (bit(VIRTIO_BLK_F_FLUSH), bit(VIRTIO_BLK_F_CONFIG_WCE));
        for (writeback, features, written, durable) in [
            (true, 0, None, true),
            (true, flush, None, false),
            (true, flush | wce, None, false),
            (true, flush | wce, Some(0), true),
            (true, flush, Some(0), false),
            (false, flush, None, true),
            (false, flush | wce, None, true),
            (false, flush | wce, Some(1), false),
        ] {
            let mut device = BlockDevice::new(BlockConfig { writeback, ..config() });
            device.features_acked(features);
            if let Some(value) = written {
                device.write_config(30, &[9, 9, value, 9]);
            }
            assert_eq!(device.shared().writes_are_durable(), durable, "{writeback} {features:#x} {written:?}");
            device.reset();
            assert!(device.shared().writes_are_durable(), "no feature, no cache");
        }
    }

    #[test]
    fn what_is_not_negotiated_is_not_allowed() {
        let mut device = BlockDevice::new(config());
        assert_eq!(device.shared().limits().max_discard_sectors, 0);
        device.features_acked(bit(VIRTIO_BLK_F_DISCARD));
        assert_eq!(device.shared().limits().max_discard_sectors, 0x1000);
        assert_eq!(device.shared().limits().max_write_zeroes_sectors, 0);
    }
}
