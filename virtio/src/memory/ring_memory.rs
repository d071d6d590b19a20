//! A split virtqueue's three areas in guest memory.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::area::{Area, MappedQueue, RingAddresses, RingMapError};
use super::mapping::Access;
use super::view::GuestMemory;
use crate::queue::{Descriptor, Field, RingMemory};

/// A split virtqueue's areas, mapped as long as this exists.
#[derive(Debug)]
pub struct MappedRing {
    desc: Area,
    avail: Area,
    used: Area,
    mask: u16,
}

impl MappedRing {
    /// Finds the areas of a queue of `size` entries.
    ///
    /// # Errors
    /// If the size is no power of two, or an area is not aligned or not mapped: the guest's fault, but for
    /// [`RingMapError::Stitch`].
    pub fn new(memory: &mut GuestMemory, at: RingAddresses, size: u16) -> Result<Self, RingMapError> {
        if !size.is_power_of_two() {
            return Err(RingMapError::Size(size));
        }
        let entries = u64::from(size);
        Ok(Self {
            desc: Area::new(memory, "descriptor table", at.desc, 16 * entries, 16, Access::READ)?,
            avail: Area::new(memory, "available ring", at.driver, (2 * entries).saturating_add(6), 2, Access::READ)?,
            used: Area::new(memory, "used ring", at.device, (8 * entries).saturating_add(6), 4, Access::READ_WRITE)?,
            mask: size.wrapping_sub(1),
        })
    }

    /// The place of a 16-bit field.
    #[inline(always)]
    fn field(&self, field: Field) -> &AtomicU16 {
        let entries = usize::from(self.mask).wrapping_add(1);
        let (area, at) = match field {
            Field::AvailFlags => (&self.avail, 0),
            Field::AvailIdx => (&self.avail, 2),
            Field::AvailRing(slot) => (&self.avail, (2 * usize::from(slot & self.mask)).wrapping_add(4)),
            Field::UsedEvent => (&self.avail, entries.wrapping_mul(2).wrapping_add(4)),
            Field::UsedFlags => (&self.used, 0),
            Field::UsedIdx => (&self.used, 2),
            Field::AvailEvent => (&self.used, entries.wrapping_mul(8).wrapping_add(4)),
        };
        debug_assert!(at.saturating_add(2) <= area.len());
        // SAFETY: every arm stays within the area's length as `new` computed it, on an even address since the
        // areas are aligned; an atomic may be shared with another process; `area` keeps the memory mapped.
        unsafe { AtomicU16::from_ptr(area.start().add(at).cast()) }
    }
}

impl MappedQueue for MappedRing {
    fn map(memory: &mut GuestMemory, at: RingAddresses, size: u16) -> Result<Self, RingMapError> {
        Self::new(memory, at, size)
    }

    fn is_blank(&self) -> bool {
        self.desc.is_blank() && self.avail.is_blank()
    }
}

impl RingMemory for MappedRing {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.mask.wrapping_add(1)
    }

    #[inline(always)]
    fn load(&self, field: Field, order: Ordering) -> u16 {
        u16::from_le(self.field(field).load(order))
    }

    #[inline(always)]
    fn store(&self, field: Field, value: u16, order: Ordering) {
        self.field(field).store(value.to_le(), order);
    }

    #[inline(always)]
    fn read_descriptor(&self, index: u16) -> Descriptor {
        let at = 16 * usize::from(index & self.mask);
        // SAFETY: the mask keeps the entry within the table, whose start is aligned to 16 bytes; one volatile read
        // makes our own copy, and any bytes are a valid array.
        let bytes = unsafe { self.desc.start().add(at).cast::<[u64; 2]>().read_volatile() };
        Descriptor::from_words(bytes)
    }

    #[inline(always)]
    fn write_used_element(&self, slot: u16, id: u16, len: u32) {
        let at = (8 * usize::from(slot & self.mask)).wrapping_add(4);
        // SAFETY: the mask keeps the element within the ring; the area is aligned to 4 bytes and mapped for writing.
        unsafe {
            let element = self.used.start().add(at).cast::<u32>();
            element.write_volatile(u32::from(id).to_le());
            element.add(1).write_volatile(len.to_le());
        }
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
    use crate::memory::{Mapping, MemoryFile, SharedTable};

    const AT: RingAddresses = RingAddresses { desc: 0x1_0000, driver: 0x1_1000, device: 0x1_2000 };

    #[test]
    fn fields_lie_where_the_specification_says() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let ring = MappedRing::new(&mut memory, AT, 4).unwrap();
        let places = [
            (Field::AvailFlags, 0x1_1000),
            (Field::AvailIdx, 0x1_1002),
            (Field::AvailRing(1), 0x1_1006),
            (Field::AvailRing(6), 0x1_1008),
            (Field::UsedEvent, 0x1_100c),
            (Field::UsedFlags, 0x1_2000),
            (Field::UsedIdx, 0x1_2002),
            (Field::AvailEvent, 0x1_2024),
        ];
        for (value, (field, iova)) in (1u16..).zip(places) {
            ring.store(field, value, Ordering::Relaxed);
            let mut bytes = [0; 2];
            memory.read(iova, &mut bytes).unwrap();
            assert_eq!(u16::from_le_bytes(bytes), value, "{field:?}");
            assert_eq!(ring.load(field, Ordering::Relaxed), value);
        }
        ring.write_used_element(5, 0x1234, 0x5678_9abc);
        let mut element = [0; 8];
        memory.read(0x1_200c, &mut element).unwrap();
        assert_eq!(element, [0x34, 0x12, 0, 0, 0xbc, 0x9a, 0x78, 0x56]);
        memory.write(0x1_0010, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 3, 0, 2, 0]).unwrap();
        let expected = Descriptor { addr: 0x0807_0605_0403_0201, len: 9, flags: 3, next: 2 };
        assert_eq!(ring.read_descriptor(1), expected);
    }

    #[test]
    fn areas_are_checked() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let mut map = |at, size| MappedRing::new(&mut memory, at, size);
        assert!(matches!(map(AT, 0), Err(RingMapError::Size(0))));
        assert!(matches!(map(AT, 3), Err(RingMapError::Size(3))));
        for at in [
            RingAddresses { desc: 0x1_0008, ..AT },
            RingAddresses { driver: 0x1_1001, ..AT },
            RingAddresses { device: 0x1_2002, ..AT },
        ] {
            assert!(matches!(map(at, 4), Err(RingMapError::Unaligned { .. })));
        }
        for at in [
            RingAddresses { desc: 0x1_3fd0, ..AT },
            RingAddresses { driver: 0x1_3ff4, ..AT },
            RingAddresses { device: 0x1_3fdc, ..AT },
            RingAddresses { desc: 0, ..AT },
            RingAddresses { device: u64::MAX - 3, ..AT },
        ] {
            assert!(matches!(map(at, 4), Err(RingMapError::Unmapped { .. })), "{at:?}");
        }
        let ends = RingAddresses { desc: 0x1_3fc0, driver: 0x1_3ff2, device: 0x1_3fd8 };
        assert!(map(ends, 4).is_ok(), "up to the last byte");
    }

    /// Pages of one file in the reverse order, then one of another file: no two are neighbours in our space.
    #[test]
    fn an_area_may_cross_mappings() {
        let shared = Arc::new(SharedTable::default());
        let (one, other): (Arc<MemoryFile>, _) = (memory_file(0x3000), memory_file(0x1000));
        for (iova, file, offset) in
            [(0x5000, &one, 0x2000), (0x6000, &one, 0x1000), (0x7000, &one, 0), (0x8000, &other, 0)]
        {
            shared.map(Mapping::of_file(iova, 0x1000, Access::READ_WRITE, Arc::clone(file), offset).unwrap()).unwrap();
        }
        let mut memory = GuestMemory::new(shared);
        let at = RingAddresses { desc: 0x5800, driver: 0x5100, device: 0x7ff0 };
        let ring = MappedRing::new(&mut memory, at, 256).unwrap();
        for index in [0u16, 127, 128, 255] {
            memory.write(0x5800 + u64::from(index) * 16, &u64::from(index + 7).to_le_bytes()).unwrap();
            assert_eq!(ring.read_descriptor(index).addr, u64::from(index + 7));
        }
        for slot in [0u16, 1, 2, 200] {
            ring.write_used_element(slot, slot + 1, 9);
            let mut id = [0; 4];
            memory.read(0x7ff4 + u64::from(slot) * 8, &mut id).unwrap();
            assert_eq!(u32::from_le_bytes(id), u32::from(slot) + 1);
        }
    }

    #[test]
    fn a_ring_that_nobody_wrote_is_blank() {
        let mut memory = guest_memory(0x1_0000, 0x4000);
        let ring = MappedRing::new(&mut memory, AT, 4).unwrap();
        ring.store(Field::UsedIdx, 1, Ordering::Relaxed);
        assert!(ring.is_blank(), "the used ring is written by us");
        memory.write(0x1_1002, &[1]).unwrap();
        assert!(!ring.is_blank());
    }
}
