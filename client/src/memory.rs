//! Memory that the device may access, and buffers in it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vfio_user::DmaMap;

use crate::mapping::{self, Mapping};
use crate::{Atomic, Error, Segment, SharedSlice};

const PAGE: usize = 4096;

/// A file in memory, to be shared with the device from an IOVA on.
///
/// [`Client::dma_map`](crate::Client::dma_map) gives it to the device. Allocations are handed out one
/// after the other and live as long as the memory: a driver makes them once.
pub struct GuestMemory {
    file: OwnedFd,
    mapping: Arc<Mapping>,
    base: u64,
    size: usize,
    next: AtomicUsize,
}

impl GuestMemory {
    /// Makes memory of `size` bytes, rounded up to pages, that starts at the IOVA `base`.
    ///
    /// # Errors
    /// [`Error::System`] when the memory is not to be had, [`Error::OutOfMemory`] for a size of 0 or
    /// one that reaches beyond the last IOVA.
    pub fn new(size: usize, base: u64) -> Result<GuestMemory, Error> {
        let rounded = size.checked_next_multiple_of(PAGE);
        let fits = |size: &usize| base.checked_add(*size as u64).is_some();
        let size = rounded.filter(fits).ok_or(Error::OutOfMemory { size })?;
        let file =
            memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC).map_err(Error::system("create guest memory"))?;
        let file_size = size.try_into().map_err(|_| Error::OutOfMemory { size })?;
        ftruncate(&file, file_size).map_err(Error::system("size guest memory"))?;
        let mapping = Mapping::new(file.as_fd(), 0, size)?;
        Ok(GuestMemory { file, mapping, base, size, next: AtomicUsize::new(0) })
    }

    /// The file behind the memory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the memory starts among the device's addresses.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The mapping of the whole memory, readable and writeable, for
    /// [`Client::dma_map`](crate::Client::dma_map).
    pub fn dma_map(&self) -> DmaMap {
        let (address, size) = (self.base, self.size as u64);
        DmaMap { readable: true, writeable: true, offset: 0, address, size }
    }

    /// Takes `size` bytes, zeroed, at a multiple of `align`, a power of two.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when they are not there.
    pub fn allocate(&self, size: usize, align: usize) -> Result<Buffer, Error> {
        let place = |next: usize| {
            let start = next.checked_next_multiple_of(align)?;
            let end = start.checked_add(size)?;
            (end <= self.size).then_some((start, end))
        };
        let next = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| Some(place(next)?.1))
            .map_err(|_| Error::OutOfMemory { size })?;
        let (start, _) = place(next).ok_or(Error::OutOfMemory { size })?;
        self.at(start, size)
    }

    /// The bytes at `offset` in the memory, allocated or not: for tests that overlap on purpose.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn at(&self, offset: usize, size: usize) -> Result<Buffer, Error> {
        let bytes = self.mapping.slice(offset, size)?;
        Ok(Buffer { iova: self.base + offset as u64, offset, bytes, mapping: Arc::clone(&self.mapping) })
    }
}

/// A piece of [`GuestMemory`]. A clone is the same piece.
#[derive(Clone)]
pub struct Buffer {
    iova: u64,
    offset: usize,
    bytes: SharedSlice<AtomicU8>,
    mapping: Arc<Mapping>,
}

#[allow(clippy::len_without_is_empty, reason = "an empty buffer is of no use")]
impl Buffer {
    /// Where the device finds it.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Fields in the buffer, from `offset` bytes on.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], also when the field would not be aligned.
    pub fn fields<T: Atomic>(&self, offset: usize, count: usize) -> Result<SharedSlice<T>, Error> {
        let len = count.saturating_mul(size_of::<T>());
        self.range(offset, len)?;
        self.mapping.slice(self.offset + offset, count)
    }

    /// A piece of the buffer as a segment of a request.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn segment(&self, offset: usize, len: usize) -> Result<Segment, Error> {
        self.range(offset, len)?;
        let size = self.len();
        let wire_len = len.try_into().map_err(|_| Error::OutOfRange { offset, len, size })?;
        Ok(Segment { iova: self.iova + offset as u64, len: wire_len })
    }

    /// Copies bytes out of the buffer.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        mapping::load(self.range(offset, out.len())?, out);
        Ok(())
    }

    /// Copies bytes into the buffer.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        mapping::store(self.range(offset, bytes.len())?, bytes);
        Ok(())
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for target in self.bytes.iter() {
            target.store(byte, Ordering::Relaxed);
        }
    }

    /// The whole buffer as bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        mapping::load(&self.bytes, &mut bytes);
        bytes
    }

    fn range(&self, offset: usize, len: usize) -> Result<&[AtomicU8], Error> {
        let range = offset.checked_add(len).and_then(|end| self.bytes.get(offset..end));
        range.ok_or(Error::OutOfRange { offset, len, size: self.len() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, AtomicU64};

    use super::*;

    #[test]
    fn allocations_are_aligned_and_apart() {
        let memory = GuestMemory::new(4096, 0x10_0000).unwrap();
        let first = memory.allocate(3, 1).unwrap();
        let second = memory.allocate(16, 64).unwrap();
        let third = memory.allocate(4096 - 80, 1).unwrap();
        assert_eq!((first.iova(), second.iova(), third.iova()), (0x10_0000, 0x10_0040, 0x10_0050));
        first.fill(0xff);
        third.fill(0xff);
        assert_eq!(second.to_vec(), [0; 16]);
        assert!(matches!(memory.allocate(1, 1), Err(Error::OutOfMemory { size: 1 })));
        assert!(matches!(memory.allocate(usize::MAX, 2), Err(Error::OutOfMemory { .. })));
    }

    #[test]
    fn copies_of_any_alignment() {
        let memory = GuestMemory::new(4096, 0).unwrap();
        let buffer = memory.allocate(64, 8).unwrap();
        let bytes: Vec<u8> = (1..=64).collect();
        for offset in 0..16 {
            for len in 0..=40 {
                buffer.fill(0);
                buffer.write(offset, &bytes[..len]).unwrap();
                let mut whole = vec![0; 64];
                whole[offset..offset + len].copy_from_slice(&bytes[..len]);
                assert_eq!(buffer.to_vec(), whole, "{offset} {len}");
                let mut back = vec![0; len];
                buffer.read(offset, &mut back).unwrap();
                assert_eq!(back, bytes[..len]);
            }
        }
    }

    #[test]
    fn accesses_outside_are_refused() {
        let memory = GuestMemory::new(4096, 0x1000).unwrap();
        let buffer = memory.allocate(16, 8).unwrap();
        assert!(buffer.write(15, &[0; 2]).is_err());
        assert!(buffer.read(usize::MAX, &mut [0]).is_err());
        assert!(buffer.fields::<AtomicU16>(14, 2).is_err());
        assert!(buffer.fields::<AtomicU16>(1, 1).is_err());
        assert!(buffer.fields::<AtomicU64>(8, usize::MAX).is_err());
        assert!(buffer.segment(8, 9).is_err());
        assert_eq!(buffer.segment(8, 8).unwrap(), Segment { iova: 0x1008, len: 8 });
        assert!(memory.at(4096, 1).is_err());
    }

    #[test]
    fn fields_are_the_bytes() {
        let memory = GuestMemory::new(4096, 0).unwrap();
        let buffer = memory.allocate(16, 8).unwrap();
        buffer.fields::<AtomicU16>(2, 1).unwrap()[0].store(u16::to_le(0x1234), Ordering::Relaxed);
        assert_eq!(buffer.to_vec()[..4], [0, 0, 0x34, 0x12]);
    }
}
