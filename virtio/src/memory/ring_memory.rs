//! A split virtqueue's three areas in guest memory.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use smallvec::SmallVec;

use super::mapping::{Access, Mapping, PAGE};
use super::view::{GuestMemory, Unmapped};
use crate::queue::{Descriptor, Field, RingMemory};

/// Where the driver has put a split virtqueue (virtio 1.3 §2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// IOVA of the descriptor table: 16 bytes each entry, aligned to 16.
    pub desc: u64,
    /// IOVA of the available ring (the driver area): 6 + 2 bytes each entry, aligned to 2.
    pub avail: u64,
    /// IOVA of the used ring (the device area): 6 + 8 bytes each entry, aligned to 4.
    pub used: u64,
}

/// Why a virtqueue's areas cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingMapError {
    /// The size is no power of two from 1 to 32768.
    #[error("a queue of {0} entries: the size must be a power of two up to 32768")]
    Size(u16),
    /// An area's address is not aligned as the specification asks.
    #[error("the {area} is at {iova:#x}, which is not aligned to {align} bytes")]
    Unaligned {
        /// Which area.
        area: &'static str,
        /// Its address.
        iova: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// An area lies, in part at least, where nothing is mapped.
    #[error("the {area}: {source}")]
    Unmapped {
        /// Which area.
        area: &'static str,
        /// The address that is missing.
        source: Unmapped,
    },
    /// The area crosses mappings and the system refused to lay them side by side.
    #[error("the {area} crosses mappings that cannot be laid side by side: {source}")]
    Stitch {
        /// Which area.
        area: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

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
            avail: Area::new(memory, "available ring", at.avail, 6 + 2 * entries, 2, Access::READ)?,
            used: Area::new(memory, "used ring", at.used, 6 + 8 * entries, 4, Access::READ_WRITE)?,
            mask: size - 1,
        })
    }

    /// Whether no byte of the descriptor table and the available ring was ever written, as far as can be seen:
    /// after a driver's first kick this tells of memory that it does not share with us.
    pub fn is_blank(&self) -> bool {
        let blank = |area: &Area| {
            // SAFETY: the area is mapped for reading over its whole length while `self` lives; reads are volatile.
            (0..area.len).all(|at| unsafe { area.start.as_ptr().add(at).read_volatile() } == 0)
        };
        blank(&self.desc) && blank(&self.avail)
    }

    /// The place of a 16-bit field.
    #[inline(always)]
    fn field(&self, field: Field) -> &AtomicU16 {
        let entries = usize::from(self.mask) + 1;
        let (area, at) = match field {
            Field::AvailFlags => (&self.avail, 0),
            Field::AvailIdx => (&self.avail, 2),
            Field::AvailRing(slot) => (&self.avail, 4 + 2 * usize::from(slot & self.mask)),
            Field::UsedEvent => (&self.avail, 4 + 2 * entries),
            Field::UsedFlags => (&self.used, 0),
            Field::UsedIdx => (&self.used, 2),
            Field::AvailEvent => (&self.used, 4 + 8 * entries),
        };
        debug_assert!(at + 2 <= area.len);
        // SAFETY: every arm stays within the area's length as `new` computed it, on an even address since the
        // areas are aligned; an atomic may be shared with another process; `area` keeps the memory mapped.
        unsafe { AtomicU16::from_ptr(area.start.as_ptr().add(at).cast()) }
    }
}

impl RingMemory for MappedRing {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.mask + 1
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
        let bytes = unsafe { self.desc.start.as_ptr().add(at).cast::<[u64; 2]>().read_volatile() };
        Descriptor::from_words(bytes)
    }

    #[inline(always)]
    fn write_used_element(&self, slot: u16, id: u16, len: u32) {
        let at = 4 + 8 * usize::from(slot & self.mask);
        let element = [u32::from(id).to_le(), len.to_le()];
        // SAFETY: the mask keeps the element within the ring; the area is aligned to 4 bytes and mapped for writing.
        unsafe { self.used.start.as_ptr().add(at).cast::<[u32; 2]>().write_volatile(element) };
    }

    #[inline(always)]
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

/// One area, at one place in our address space.
#[derive(Debug)]
struct Area {
    start: NonNull<u8>,
    len: usize,
    _pins: SmallVec<[Arc<Mapping>; 1]>,
    _stitched: Option<Stitched>,
}

// SAFETY: the pointer leads to memory that the pins (and the stitched copy) keep mapped on any thread; all
// accesses through it are volatile or atomic.
unsafe impl Send for Area {}

impl Area {
    fn new(
        memory: &mut GuestMemory,
        area: &'static str,
        iova: u64,
        len: u64,
        align: u64,
        access: Access,
    ) -> Result<Self, RingMapError> {
        if !iova.is_multiple_of(align) {
            return Err(RingMapError::Unaligned { area, iova, align });
        }
        let unmapped = |source| RingMapError::Unmapped { area, source };
        let last = iova.checked_add(len - 1).ok_or(unmapped(Unmapped::Nowhere { iova }))?;
        let mut pins = SmallVec::<[Arc<Mapping>; 1]>::new();
        let mut next = iova;
        let mut start = None;
        let mut end = std::ptr::null_mut();
        let mut contiguous = true;
        loop {
            let mapping = Arc::clone(memory.mapping(next, access).map_err(unmapped)?);
            let (host, left) = mapping.host(next, access).ok_or(unmapped(Unmapped::Nowhere { iova: next }))?;
            contiguous &= start.is_none() || host == end;
            start = start.or(NonNull::new(host));
            end = host.wrapping_add(left as usize);
            let reaches = mapping.last();
            pins.push(mapping);
            if reaches >= last {
                break;
            }
            next = reaches + 1;
        }
        let start = start.ok_or(unmapped(Unmapped::Nowhere { iova }))?;
        if contiguous {
            return Ok(Self { start, len: len as usize, _pins: pins, _stitched: None });
        }
        let stitched =
            Stitched::new(iova, last, &pins, access).map_err(|source| RingMapError::Stitch { area, source })?;
        let start = stitched.start(iova);
        Ok(Self { start, len: len as usize, _pins: pins, _stitched: Some(stitched) })
    }
}

/// Mappings that are neighbours by IOVA, mapped a second time as neighbours in our address space.
#[derive(Debug)]
struct Stitched {
    base: NonNull<std::ffi::c_void>,
    len: usize,
}

// SAFETY: owns its part of the address space, which any thread may unmap.
unsafe impl Send for Stitched {}

impl Stitched {
    /// Lays the pages from that of `iova` to that of `last` side by side; `mappings` hold them in order.
    fn new(iova: u64, last: u64, mappings: &[Arc<Mapping>], access: Access) -> std::io::Result<Self> {
        let first_page = iova - iova % PAGE;
        let last_page_end = (last - last % PAGE).wrapping_add(PAGE); // 0 past the last page of all
        let len = last_page_end.wrapping_sub(first_page) as usize;
        let size = std::num::NonZeroUsize::new(len).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping without access, wherever the kernel likes; nothing else can point there.
        let base = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)? };
        let stitched = Self { base, len };
        let mut prot = ProtFlags::PROT_READ;
        prot.set(ProtFlags::PROT_WRITE, access.write);
        for mapping in mappings {
            let from = mapping.iova().max(first_page);
            let to = mapping.last().min(last_page_end.wrapping_sub(1));
            let piece = std::num::NonZeroUsize::new((to - from + 1) as usize);
            let at = (base.as_ptr() as usize).checked_add((from - first_page) as usize);
            let (Some(piece), Some(at), Some((file, offset))) =
                (piece, at.and_then(std::num::NonZeroUsize::new), mapping.file_at(from))
            else {
                return Err(std::io::ErrorKind::InvalidInput.into());
            };
            let file = file.file().ok_or(std::io::ErrorKind::InvalidInput)?;
            let offset = i64::try_from(offset).map_err(|_| std::io::ErrorKind::InvalidInput)?;
            // SAFETY: MAP_FIXED replaces pages of `stitched`, which is ours alone: the pieces lie within
            // first_page..last_page_end, as `base` does for `len` bytes.
            unsafe { mmap(Some(at), piece, prot, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, offset)? };
        }
        Ok(stitched)
    }

    fn start(&self, iova: u64) -> NonNull<u8> {
        // SAFETY: the offset within a page is less than the length, which is a page at least.
        unsafe { self.base.cast::<u8>().add((iova % PAGE) as usize) }
    }
}

impl Drop for Stitched {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mapping, and the area that points into it goes with us.
        if let Err(error) = unsafe { munmap(self.base, self.len) } {
            log::error!("cannot unmap {} bytes of a ring: {error}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::testing::{guest_memory, memory_file};
    use crate::memory::{MemoryFile, SharedTable};

    const AT: RingAddresses = RingAddresses { desc: 0x1_0000, avail: 0x1_1000, used: 0x1_2000 };

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
            RingAddresses { avail: 0x1_1001, ..AT },
            RingAddresses { used: 0x1_2002, ..AT },
        ] {
            assert!(matches!(map(at, 4), Err(RingMapError::Unaligned { .. })));
        }
        for at in [
            RingAddresses { desc: 0x1_3fd0, ..AT },
            RingAddresses { avail: 0x1_3ff4, ..AT },
            RingAddresses { used: 0x1_3fdc, ..AT },
            RingAddresses { desc: 0, ..AT },
            RingAddresses { used: u64::MAX - 3, ..AT },
        ] {
            assert!(matches!(map(at, 4), Err(RingMapError::Unmapped { .. })), "{at:?}");
        }
        let ends = RingAddresses { desc: 0x1_3fc0, avail: 0x1_3ff2, used: 0x1_3fd8 };
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
        let at = RingAddresses { desc: 0x5800, avail: 0x5100, used: 0x7ff0 };
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
