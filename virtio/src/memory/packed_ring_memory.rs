//! A packed virtqueue's three areas in guest memory.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::area::{Area, MappedQueue, RingAddresses, RingMapError};
use super::mapping::Access;
use super::view::GuestMemory;
use crate::queue::{EventSuppression, PackedDescriptor, PackedRingMemory, UsedDescriptor};

/// The largest ring (virtio 1.3 §2.8).
const MAX_SIZE: u16 = 1 << 15;
/// Where in a descriptor the word is that follows its address: length, buffer ID and flags.
const WORD: usize = 8;
/// Where in a descriptor its flags are.
const FLAGS: usize = 14;

/// A packed virtqueue's areas, mapped as long as this exists.
#[derive(Debug)]
pub struct MappedPackedRing {
    desc: Area,
    driver: Area,
    device: Area,
    size: u16,
}

impl MappedPackedRing {
    /// Finds the areas of a queue of `size` descriptors.
    ///
    /// # Errors
    /// If the size is 0 or above 32768, or an area is not aligned or not mapped: the guest's fault, but for
    /// [`RingMapError::Stitch`].
    pub fn new(memory: &mut GuestMemory, at: RingAddresses, size: u16) -> Result<Self, RingMapError> {
        if !(1..=MAX_SIZE).contains(&size) {
            return Err(RingMapError::Size(size));
        }
        let entries = u64::from(size);
        Ok(Self {
            desc: Area::new(memory, "descriptor ring", at.desc, 16 * entries, 16, Access::READ_WRITE)?,
            driver: Area::new(memory, "driver event suppression", at.driver, 4, 4, Access::READ)?,
            device: Area::new(memory, "device event suppression", at.device, 4, 4, Access::READ_WRITE)?,
            size,
        })
    }

    /// Where descriptor `index` is; the last one in place of any beyond it.
    #[inline(always)]
    fn descriptor(&self, index: u16) -> *mut u8 {
        let index = index.min(self.size.wrapping_sub(1));
        // SAFETY: the area has 16 bytes for each descriptor up to `size - 1`.
        unsafe { self.desc.start().add(16 * usize::from(index)) }
    }
}

impl MappedQueue for MappedPackedRing {
    fn map(memory: &mut GuestMemory, at: RingAddresses, size: u16) -> Result<Self, RingMapError> {
        Self::new(memory, at, size)
    }

    fn is_blank(&self) -> bool {
        self.desc.is_blank()
    }
}

impl PackedRingMemory for MappedPackedRing {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn load_flags(&self, index: u16, order: Ordering) -> u16 {
        // SAFETY: within the descriptor's 16 bytes, on an even address since the area is aligned to 16; an atomic may be
        // shared with another process; `desc` keeps the memory mapped.
        let flags = unsafe { AtomicU16::from_ptr(self.descriptor(index).add(FLAGS).cast()) };
        u16::from_le(flags.load(order))
    }

    #[inline(always)]
    fn read_descriptor(&self, index: u16, flags: u16) -> PackedDescriptor {
        // SAFETY: the descriptor's 16 bytes, aligned to as many; one volatile read makes our own copy, and any bytes are a
        // valid array.
        let words = unsafe { self.descriptor(index).cast::<[u64; 2]>().read_volatile() };
        PackedDescriptor { flags, ..PackedDescriptor::from_words(words) }
    }

    #[inline(always)]
    fn write_used(&self, index: u16, used: UsedDescriptor, order: Ordering) {
        // SAFETY: the upper half of the descriptor's 16 bytes, aligned to 8 and mapped for writing; an atomic may be shared
        // with another process.
        let word = unsafe { AtomicU64::from_ptr(self.descriptor(index).add(WORD).cast()) };
        // All three fields at once.
        word.store(used.to_word(), order);
    }

    #[inline(always)]
    fn driver_event(&self) -> EventSuppression {
        // SAFETY: the area's 4 bytes, aligned to as many; an atomic may be shared with another process.
        let word = unsafe { AtomicU32::from_ptr(self.driver.start().cast()) };
        EventSuppression::from_word(u32::from_le(word.load(Ordering::Relaxed)))
    }

    #[inline(always)]
    fn set_device_event(&self, event: EventSuppression) {
        // SAFETY: as above, and mapped for writing.
        let word = unsafe { AtomicU32::from_ptr(self.device.start().cast()) };
        word.store(event.to_word().to_le(), Ordering::Relaxed);
    }

    #[inline(always)]
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::testing::{guest_memory, memory_file};
    use crate::memory::{Mapping, SharedTable};
    use crate::queue::Position;

    const AT: RingAddresses = RingAddresses { desc: 0x1_0000, driver: 0x1_1000, device: 0x1_2000 };

    #[test]
    fn fields_lie_where_the_specification_says() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let ring = MappedPackedRing::new(&mut memory, AT, 3).unwrap();
        memory.write(0x1_0010, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 3, 1, 2, 0x80]).unwrap();
        assert_eq!(ring.load_flags(1, Ordering::Acquire), 0x8002);
        let expected = PackedDescriptor { addr: 0x0807_0605_0403_0201, len: 9, id: 0x103, flags: 7 };
        assert_eq!(ring.read_descriptor(1, 7), expected, "the flags are those that were loaded before");
        ring.write_used(2, UsedDescriptor { len: 0x5678_9abc, id: 0x1234, flags: 0x8082 }, Ordering::Release);
        let mut element = [1; 16];
        memory.read(0x1_0020, &mut element).unwrap();
        assert_eq!(element, [0, 0, 0, 0, 0, 0, 0, 0, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0x82, 0x80]);

        for (bytes, event) in [
            ([0, 0, 0, 0], EventSuppression::Enable),
            ([9, 9, 3, 0], EventSuppression::Enable),
            ([9, 9, 0xfd, 0xff], EventSuppression::Disable),
            ([5, 0x80, 2, 0], EventSuppression::Descriptor(Position::from_bits(0x8005))),
        ] {
            memory.write(0x1_1000, &bytes).unwrap();
            assert_eq!(ring.driver_event(), event, "{bytes:?}");
        }
        for (event, bytes) in [
            (EventSuppression::Descriptor(Position::from_bits(0x8002)), [2, 0x80, 2, 0]),
            (EventSuppression::Disable, [0, 0, 1, 0]),
            (EventSuppression::Enable, [0, 0, 0, 0]),
        ] {
            ring.set_device_event(event);
            let mut found = [9; 4];
            memory.read(0x1_2000, &mut found).unwrap();
            assert_eq!(found, bytes);
        }
    }

    #[test]
    fn areas_are_checked() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let mut map = |at, size| MappedPackedRing::new(&mut memory, at, size);
        for size in [0, 32769, u16::MAX] {
            assert!(matches!(map(AT, size), Err(RingMapError::Size(_))));
        }
        for at in [
            RingAddresses { desc: 0x1_0008, ..AT },
            RingAddresses { driver: 0x1_1002, ..AT },
            RingAddresses { device: 0x1_2002, ..AT },
        ] {
            assert!(matches!(map(at, 3), Err(RingMapError::Unaligned { .. })));
        }
        for at in [
            RingAddresses { desc: 0x1_3fe0, ..AT },
            RingAddresses { driver: 0x1_4000, ..AT },
            RingAddresses { device: u64::MAX - 3, ..AT },
        ] {
            assert!(matches!(map(at, 3), Err(RingMapError::Unmapped { .. })), "{at:?}");
        }
        let ends = RingAddresses { desc: 0x1_3fd0, driver: 0x1_3ffc, device: 0x1_3ffc };
        assert!(map(ends, 3).is_ok(), "up to the last byte");
    }

    /// An index that no queue has reaches no further than the ring.
    #[test]
    fn no_index_leaves_the_ring() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let ring = MappedPackedRing::new(&mut memory, AT, 3).unwrap();
        ring.write_used(u16::MAX, UsedDescriptor { len: 1, id: 2, flags: 3 }, Ordering::Relaxed);
        assert_eq!(ring.load_flags(2, Ordering::Relaxed), 3);
    }

    /// Pages of one file in the reverse order: no two are neighbours in our space.
    #[test]
    fn the_ring_may_cross_mappings() {
        let shared = Arc::new(SharedTable::default());
        let file = memory_file(0x3000);
        for (iova, offset) in [(0x5000, 0x2000), (0x6000, 0x1000), (0x7000, 0)] {
            let mapping = Mapping::of_file(iova, 0x1000, Access::READ_WRITE, Arc::clone(&file), offset).unwrap();
            shared.map(mapping).unwrap();
        }
        let mut memory = GuestMemory::new(shared);
        let at = RingAddresses { desc: 0x5800, driver: 0x5100, device: 0x7ff0 };
        let ring = MappedPackedRing::new(&mut memory, at, 300).unwrap();
        assert!(ring.is_blank());
        for index in [0u16, 127, 128, 255, 299] {
            memory.write(0x5800 + u64::from(index) * 16, &u64::from(index + 7).to_le_bytes()).unwrap();
            assert_eq!(ring.read_descriptor(index, 0).addr, u64::from(index + 7));
            ring.write_used(index, UsedDescriptor { len: 9, id: index + 1, flags: 0 }, Ordering::Relaxed);
            let mut id = [0; 2];
            memory.read(0x580c + u64::from(index) * 16, &mut id).unwrap();
            assert_eq!(u16::from_le_bytes(id), index + 1);
        }
        assert!(!ring.is_blank());
    }
}
