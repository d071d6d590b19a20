//! The scatter list of one request.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use super::file::MemoryFile;
use super::mapping::Mapping;

/// Pieces of guest memory, in order, together with the mappings they lie in.
///
/// As long as this exists its bytes stay mapped, whatever the client unmaps meanwhile: an I/O that owns its
/// buffers can end at any time without touching memory that is gone. Made by
/// [`GuestMemory::pin`](super::GuestMemory::pin), and meant to be used again and again: [`clear`](Self::clear) keeps its capacity.
pub struct PinnedBuffers {
    iovecs: Vec<libc::iovec>,
    /// Each piece's mapping, without repeating the one before: for nearly all requests this is one.
    pins: SmallVec<[Arc<Mapping>; 2]>,
    len: u64,
    /// A byte apart from the list, written when the request ends.
    trailer: Option<NonNull<u8>>,
    /// Whether all pieces were pinned for writing.
    writable: bool,
}

impl Default for PinnedBuffers {
    fn default() -> Self {
        Self { iovecs: Vec::new(), pins: SmallVec::new(), len: 0, trailer: None, writable: true }
    }
}

// SAFETY: the pointers lead to memory shared with another process anyway, which the pins keep mapped on any
// thread; they are only ever used for copies that take no reference to it.
unsafe impl Send for PinnedBuffers {}

impl PinnedBuffers {
    /// Total bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Lets go of all pieces and pins.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.pins.clear();
        self.len = 0;
        self.trailer = None;
        self.writable = true;
    }

    /// The pieces, for a system call; valid while `self` lives and is not changed.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The file that all of it lies in; `None` if there are several, or no bytes at all.
    #[inline]
    pub fn file(&self) -> Option<&Arc<MemoryFile>> {
        let (first, rest) = self.pins.split_first()?;
        let file = first.file()?;
        rest.iter().all(|pin| pin.file().is_some_and(|other| Arc::ptr_eq(file, other))).then_some(file)
    }

    /// The pieces as slices that can be copied from and to.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.iovecs.iter().map(|iovec| {
            // SAFETY: `push` was given bytes that its mapping holds; the pins, which live as long as the slice's
            // lifetime, keep them mapped.
            unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
        })
    }

    /// Copies guest memory, from byte `offset` of the list on, into `data`; says how many bytes there were.
    pub fn copy_to_slice(&self, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices_from(offset) {
            let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies `data` into guest memory, from byte `offset` of the list on; says how many bytes had room: none
    /// if a piece was pinned for reading.
    pub fn copy_from_slice(&self, offset: u64, data: &[u8]) -> usize {
        if !self.writable {
            return 0;
        }
        let mut done = 0;
        for slice in self.slices_from(offset) {
            let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let len = rest.len().min(slice.len());
            slice.copy_from(&rest[..len]);
            done += len;
        }
        done
    }

    /// Fills all pieces with `byte`; does nothing if a piece was pinned for reading.
    pub fn fill(&self, byte: u8) {
        if !self.writable {
            return;
        }
        for iovec in &self.iovecs {
            // SAFETY: as in `slices`: mapped for this many bytes while `self` lives, and no reference is made.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), byte, iovec.iov_len) };
        }
    }

    /// Takes the first `bytes` bytes off the list, after an I/O that ended short. More than there are empties it.
    pub fn advance(&mut self, bytes: u64) {
        let mut left = bytes.min(self.len);
        self.len -= left;
        let mut gone = 0;
        for iovec in &mut self.iovecs {
            if left < iovec.iov_len as u64 {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(left as usize).cast();
                iovec.iov_len -= left as usize;
                break;
            }
            left -= iovec.iov_len as u64;
            gone += 1;
        }
        self.iovecs.drain(..gone);
    }

    /// Writes the byte that [`GuestMemory::pin_trailer`](super::GuestMemory::pin_trailer) set apart, if it did.
    #[inline]
    pub fn write_trailer(&self, value: u8) {
        if let Some(place) = self.trailer {
            // SAFETY: `set_trailer` was given a byte that its mapping holds for writing; the pins keep it mapped.
            unsafe { place.as_ptr().write_volatile(value) };
        }
    }

    /// Adds a piece.
    ///
    /// # Safety
    /// The `len` bytes at `host` must belong to `mapping`, and be mapped for writing if `writable`.
    #[inline]
    pub(super) unsafe fn push(&mut self, host: *mut u8, len: usize, writable: bool, mapping: &Arc<Mapping>) {
        // Neighbours in our address space become one piece: fewer, larger segments for the kernel.
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == host => last.iov_len += len,
            _ => self.iovecs.push(libc::iovec { iov_base: host.cast(), iov_len: len }),
        }
        self.pin(mapping);
        self.len += len as u64;
        self.writable &= writable;
    }

    /// Sets the byte apart that [`write_trailer`](Self::write_trailer) writes.
    ///
    /// # Safety
    /// The byte at `host` must belong to `mapping` and be mapped for writing.
    #[inline]
    pub(super) unsafe fn set_trailer(&mut self, host: *mut u8, mapping: &Arc<Mapping>) {
        self.trailer = NonNull::new(host);
        self.pin(mapping);
    }

    #[inline]
    fn pin(&mut self, mapping: &Arc<Mapping>) {
        if !self.pins.last().is_some_and(|pin| Arc::ptr_eq(pin, mapping)) {
            self.pins.push(Arc::clone(mapping));
        }
    }

    fn slices_from(&self, offset: u64) -> impl Iterator<Item = VolatileSlice<'_>> {
        let mut skip = offset;
        self.slices().filter_map(move |slice| {
            let len = slice.len() as u64;
            let start = skip.min(len);
            skip -= start;
            slice.offset(start as usize).ok().filter(|rest| !rest.is_empty())
        })
    }
}

impl fmt::Debug for PinnedBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffers({} pieces, {} bytes)", self.iovecs.len(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, Mapping, testing::memory_file};

    /// Three pieces: 16, 8 and 24 bytes, with gaps between.
    fn pieces(writable: bool) -> PinnedBuffers {
        let mapping = Arc::new(Mapping::of_file(0, 0x1000, Access::READ_WRITE, memory_file(0x1000), 0).unwrap());
        let mut buffers = PinnedBuffers::default();
        for (at, len) in [(0, 16), (0x100, 8), (0x200, 24)] {
            let (host, _) = mapping.host(at, Access::WRITE).unwrap();
            // SAFETY: within the mapping, which is writable.
            unsafe { buffers.push(host, len, writable, &mapping) };
        }
        buffers
    }

    #[test]
    fn copies_start_and_end_anywhere() {
        let buffers = pieces(true);
        let data: Vec<u8> = (1..=48).collect();
        assert_eq!(buffers.copy_from_slice(0, &data), 48);
        for (offset, len) in [(0, 48), (15, 2), (16, 8), (20, 28), (47, 1)] {
            let mut back = vec![0; len];
            assert_eq!(buffers.copy_to_slice(offset as u64, &mut back), len);
            assert_eq!(back, data[offset..offset + len]);
        }
        assert_eq!(buffers.copy_to_slice(40, &mut [0; 20]), 8, "ends with the list");
        assert_eq!(buffers.copy_from_slice(48, &[1]), 0);
    }

    #[test]
    fn read_only_pieces_are_not_written() {
        let buffers = pieces(false);
        buffers.fill(7);
        assert_eq!(buffers.copy_from_slice(0, &[7; 48]), 0);
        let mut back = [1; 48];
        buffers.copy_to_slice(0, &mut back);
        assert_eq!(back, [0; 48]);
    }

    #[test]
    fn advance_takes_bytes_off_the_front() {
        let data: Vec<u8> = (1..=48).collect();
        for taken in 0..=50 {
            let mut buffers = pieces(true);
            buffers.copy_from_slice(0, &data);
            buffers.advance(taken);
            let rest = &data[taken.min(48) as usize..];
            assert_eq!(buffers.len(), rest.len() as u64);
            let mut back = vec![0; rest.len()];
            assert_eq!(buffers.copy_to_slice(0, &mut back), rest.len());
            assert_eq!(back, rest);
        }
    }

    #[test]
    fn the_file_of_all_pieces_is_told_if_it_is_one() {
        let (file, other) = (memory_file(0x4000), memory_file(0x1000));
        let map = |iova, file: &Arc<MemoryFile>, offset| {
            Arc::new(Mapping::of_file(iova, 0x1000, Access::READ_WRITE, Arc::clone(file), offset).unwrap())
        };
        let (first, second, third) = (map(0, &file, 0x2000), map(0x1000, &file, 0), map(0x2000, &other, 0));
        let mut buffers = PinnedBuffers::default();
        assert!(buffers.file().is_none());
        for (mapping, at, offset) in [(&first, 8, 0x2008), (&second, 0x1010, 0x10)] {
            let (host, _) = mapping.host(at, Access::WRITE).unwrap();
            // SAFETY: within the mapping, which is writable.
            unsafe { buffers.push(host, 16, true, mapping) };
            assert!(Arc::ptr_eq(buffers.file().unwrap(), &file));
            assert_eq!(file.offset_of(buffers.iovecs().last().unwrap()), Some(offset));
        }
        let (host, _) = third.host(0x2000, Access::WRITE).unwrap();
        // SAFETY: as above.
        unsafe { buffers.push(host, 16, true, &third) };
        assert!(buffers.file().is_none());
        assert_eq!(other.offset_of(&other.piece(0x800, 0x1000)), Some(0x800), "cut off at the end");
        let mut beyond = other.piece(0xff0, 0x10);
        beyond.iov_len += 1;
        assert_eq!(other.offset_of(&beyond), None);
    }

    #[test]
    fn one_mapping_is_pinned_once_and_until_cleared() {
        let mut buffers = pieces(true);
        assert_eq!(buffers.pins.len(), 1);
        let release = buffers.pins[0].release();
        assert!(!release.wait(std::time::Instant::now()));
        buffers.clear();
        assert!(release.wait(std::time::Instant::now()));
    }
}
