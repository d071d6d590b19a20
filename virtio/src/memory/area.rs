//! The areas of a virtqueue in guest memory.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use smallvec::SmallVec;

use super::fault::Watched;
use super::mapping::{Access, Mapping, PAGE};
use super::view::{GuestMemory, Unmapped};

/// Where the driver has put a virtqueue (virtio 1.3 §2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// IOVA of the descriptor area, aligned to 16: the descriptor table or the descriptor ring, 16 bytes each entry.
    pub desc: u64,
    /// IOVA of the driver area: the available ring, 6 + 2 bytes each entry, aligned to 2; or the driver event suppression,
    /// 4 bytes, aligned to 4.
    pub driver: u64,
    /// IOVA of the device area: the used ring, 6 + 8 bytes each entry, aligned to 4; or the device event suppression, 4
    /// bytes, aligned to 4.
    pub device: u64,
}

/// Why a virtqueue's areas cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingMapError {
    /// The size is no power of two from 1 to 32768, or for a packed ring no number from 1 to 32768.
    #[error("a queue of {0} entries: the size must be from 1 to 32768, and a power of two if the ring is split")]
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

/// A virtqueue's areas as one of the two formats has them, mapped as long as this exists.
pub trait MappedQueue: Sized {
    /// Finds the areas of a queue of `size` entries.
    ///
    /// # Errors
    /// If the format has no such size, or an area is not aligned or not mapped: the guest's fault, but for
    /// [`RingMapError::Stitch`].
    fn map(memory: &mut GuestMemory, at: RingAddresses, size: u16) -> Result<Self, RingMapError>;

    /// Whether no byte of what a driver writes first was ever written, as far as can be seen: after its first kick this
    /// tells of memory that it does not share with us.
    fn is_blank(&self) -> bool;
}

/// One area, at one place in our address space, mapped as long as this exists.
#[derive(Debug)]
pub(super) struct Area {
    start: NonNull<u8>,
    len: usize,
    _pins: SmallVec<[Arc<Mapping>; 1]>,
    _stitched: Option<Stitched>,
}

// SAFETY: the pointer leads to memory that the pins (and the stitched copy) keep mapped on any thread; all
// accesses through it are volatile or atomic.
unsafe impl Send for Area {}

impl Area {
    /// Finds `len` bytes, at least 1, at `iova`; `area` is what to call them in errors.
    pub(super) fn new(
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
        let last = iova.checked_add(len.saturating_sub(1)).ok_or(unmapped(Unmapped::Nowhere { iova }))?;
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
            next = reaches.saturating_add(1);
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

    /// The first byte, at an address with the alignment that was asked for.
    #[inline(always)]
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether all bytes are 0 as they are read one by one.
    pub(super) fn is_blank(&self) -> bool {
        // SAFETY: the area is mapped for reading over its whole length while `self` lives; reads are volatile.
        (0..self.len).all(|at| unsafe { self.start().add(at).read_volatile() } == 0)
    }
}

/// Mappings that are neighbours by IOVA, mapped a second time as neighbours in our address space.
#[derive(Debug)]
struct Stitched {
    base: NonNull<std::ffi::c_void>,
    len: usize,
    watched: Option<Watched>,
}

// SAFETY: owns its part of the address space, which any thread may unmap.
unsafe impl Send for Stitched {}

impl Stitched {
    /// Lays the pages from that of `iova` to that of `last` side by side; `mappings` hold them in order.
    fn new(iova: u64, last: u64, mappings: &[Arc<Mapping>], access: Access) -> std::io::Result<Self> {
        let page = |iova: u64| iova & !(PAGE - 1);
        let first_page = page(iova);
        let last_page_end = page(last).wrapping_add(PAGE); // 0 past the last page of all
        let len = last_page_end.wrapping_sub(first_page) as usize;
        let size = NonZeroUsize::new(len).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a new anonymous mapping without access, wherever the kernel likes; nothing else can point there.
        let base = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)? };
        let mut stitched = Self { base, len, watched: None };
        let mut prot = ProtFlags::PROT_READ;
        prot.set(ProtFlags::PROT_WRITE, access.write);
        for mapping in mappings {
            let from = mapping.iova().max(first_page);
            let to = mapping.last().min(last_page_end.wrapping_sub(1));
            let piece = to.checked_sub(from).and_then(|to_last| NonZeroUsize::new(to_last.saturating_add(1) as usize));
            let at = (base.as_ptr() as usize).checked_add(from.saturating_sub(first_page) as usize);
            let (Some(piece), Some(at), Some((file, offset))) =
                (piece, at.and_then(NonZeroUsize::new), mapping.file_at(from))
            else {
                return Err(std::io::ErrorKind::InvalidInput.into());
            };
            let file = file.file().ok_or(std::io::ErrorKind::InvalidInput)?;
            let offset = i64::try_from(offset).map_err(|_| std::io::ErrorKind::InvalidInput)?;
            // SAFETY: MAP_FIXED replaces pages of `stitched`, which is ours alone: the pieces lie within
            // first_page..last_page_end, as `base` does for `len` bytes.
            unsafe { mmap(Some(at), piece, prot, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, offset)? };
        }
        stitched.watched = mappings.first().and_then(|first| first.file()?.watch(base.cast(), len));
        Ok(stitched)
    }

    fn start(&self, iova: u64) -> NonNull<u8> {
        // SAFETY: the offset within a page is less than the length, which is a page at least.
        unsafe { self.base.cast::<u8>().add((iova % PAGE) as usize) }
    }
}

impl Drop for Stitched {
    fn drop(&mut self) {
        self.watched = None;
        // SAFETY: base and len are those of our own mapping, and the area that points into it goes with us.
        if let Err(error) = unsafe { munmap(self.base, self.len) } {
            log::error!("cannot unmap {} bytes of a ring: {error}", self.len);
        }
    }
}
