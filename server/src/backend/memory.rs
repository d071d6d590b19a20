//! Blocks in memory: gone with the process, and as fast as memory can be copied.

use std::io;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{SysconfVar, sysconf};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::immediate::{Execute, Immediate};
use super::uring::Uring;
use super::{Backend, Io, Op, SECTOR, Service, Store, StoreInfo};

/// A RAM disk, zero at first. What was never written, and what was freed since, takes no memory.
///
/// It has no stable storage: a flush and a durable write do nothing more than others.
///
/// All queues copy from and to the same memory without locks. What becomes of ranges that several requests
/// work on at the same time is up to the guest, as with any disk.
#[derive(Debug)]
pub struct MemoryStore(Mutex<Arc<Blocks>>);

#[derive(Debug)]
struct Blocks {
    /// Anonymous and private: only there does `MADV_DONTNEED` mean that pages are freed and read as zeroes. (Shared
    /// pages would survive it, and take `MADV_REMOVE`, a slower way through the shared memory file system.)
    region: MmapRegion,
    page: usize,
}

impl MemoryStore {
    /// A store of `capacity` bytes, a multiple of 512 and not zero.
    ///
    /// # Errors
    /// If there can be none of this size.
    pub fn new(capacity: u64) -> io::Result<Self> {
        Ok(Self(Mutex::new(Arc::new(Blocks::new(capacity)?))))
    }

    /// Has the system never put large pages in place of many small ones: memory is then taken by what is written, and not by
    /// what lies around it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn without_huge_pages(self) -> io::Result<Self> {
        let blocks = Arc::clone(&self.blocks());
        if let Some(start) = NonNull::new(blocks.region.as_ptr()) {
            // SAFETY: the whole region; what it holds stays.
            let advised = unsafe { madvise(start.cast(), blocks.region.size(), MmapAdvise::MADV_NOHUGEPAGE) };
            // A kernel without large pages does not know the word.
            advised.or_else(|error| if error == Errno::EINVAL { Ok(()) } else { Err(error) })?;
        }
        Ok(self)
    }

    /// Copies what it holds from byte `offset` on.
    ///
    /// # Errors
    /// If it ends before.
    pub(super) fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.blocks().slice(offset, to.len() as u64)?.copy_to(to);
        Ok(())
    }

    /// Zero from here on, without memory.
    ///
    /// # Errors
    /// If the system refuses.
    pub(super) fn clear(&self) -> io::Result<()> {
        let blocks = self.blocks();
        let len = blocks.region.size() as u64;
        let freed = blocks.free(0, len)?;
        blocks.fill(0, freed.start)?;
        blocks.fill(freed.end, len - freed.end)
    }

    fn blocks(&self) -> MutexGuard<'_, Arc<Blocks>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blocks {
    fn new(capacity: u64) -> io::Result<Self> {
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) {
            let why =
                format!("a memory store of {capacity} bytes is impossible: it must be a multiple of 512 and not zero");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let impossible =
            |error: &dyn std::fmt::Display| io::Error::other(format!("a memory store of {capacity} bytes: {error}"));
        let size = usize::try_from(capacity).map_err(|error| impossible(&error))?;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let region = MmapRegion::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(|error| impossible(&error))?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|page| usize::try_from(page).ok()).unwrap_or(4096);
        Ok(Self { region, page })
    }

    /// As many of these bytes as fit, and zeroes, in a region of `capacity` bytes. The pages are moved and not copied: nobody
    /// may use these blocks any more.
    fn moved_to(&self, capacity: u64) -> io::Result<Self> {
        let blocks = Self::new(capacity)?;
        let len = self.region.size().min(blocks.region.size());
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let (from, to) = (self.region.as_ptr(), blocks.region.as_ptr());
        // SAFETY: both are private anonymous mappings of at least `len` bytes, in whole pages. What is at `to` is new and used
        // by nobody, and goes; the pages of `from` go there, and `from` stays mapped, with pages of zeroes.
        let moved = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Of a page that the new end cuts, the rest would come back when it grows.
        let whole = len.next_multiple_of(self.page);
        // SAFETY: from the end of the region to the end of its last page, which is mapped with it.
        unsafe { ptr::write_bytes(to.add(len), 0, whole - len) };
        Ok(blocks)
    }
}

impl Store for MemoryStore {
    fn info(&self) -> StoreInfo {
        let blocks = self.blocks();
        StoreInfo {
            capacity: blocks.region.size() as u64,
            block_size: SECTOR as u32,
            physical_block_size: blocks.page as u32,
            optimal_io_size: 0,
            read_only: false,
            discard: true,
            write_zeroes_unmap: true,
        }
    }

    /// Needs no ring of the kernel's.
    fn attach(&self, _: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(Immediate::new(&self.blocks())))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn max_queues(&self) -> u16 {
        u16::MAX
    }

    fn service(&self) -> Option<Service> {
        None
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        let mut blocks = self.blocks();
        let now = blocks.region.size() as u64;
        let capacity = capacity.unwrap_or(now);
        if capacity != now {
            if Arc::strong_count(&blocks) > 1 {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the memory is in use"));
            }
            *blocks = Arc::new(blocks.moved_to(capacity)?);
        }
        Ok(capacity)
    }
}

impl Blocks {
    /// The blocks of a range; an error where it ends after the store.
    fn slice(&self, offset: u64, len: u64) -> io::Result<VolatileSlice<'_>> {
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.region.get_slice(offset, len).map_err(io::Error::other)
    }

    /// Calls `copy` with each piece of the buffers and its place in the store.
    fn each(&self, io: &Io, offset: u64, copy: impl Fn(VolatileSlice<'_>, VolatileSlice<'_>)) -> io::Result<()> {
        let mut place = self.slice(offset, io.buffers.len())?;
        for piece in io.buffers.slices() {
            copy(piece, place);
            place = place.offset(piece.len()).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn fill(&self, offset: u64, len: u64) -> io::Result<()> {
        let slice = self.slice(offset, len)?;
        // SAFETY: `slice` has checked that the range lies within the region, which is mapped for writing and to which
        // there are no references.
        unsafe { ptr::write_bytes(slice.ptr_guard_mut().as_ptr(), 0, slice.len()) };
        Ok(())
    }

    /// Frees the whole pages of a range; they read as zeroes afterwards. Says which they were: none if the
    /// system does not want to.
    fn free(&self, offset: u64, len: u64) -> io::Result<std::ops::Range<u64>> {
        self.slice(offset, len)?;
        let page = self.page as u64;
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(page), end - end % page);
        if first >= last {
            return Ok(end..end);
        }
        let slice = self.slice(first, last - first)?;
        let freed = NonNull::new(slice.ptr_guard_mut().as_ptr()).is_some_and(|start| {
            // SAFETY: whole pages of the region, by `slice`, to which there are no references: losing what they hold is
            // what was asked for. A thread that reads them meanwhile finds the old bytes or zeroes.
            unsafe { madvise(start.cast(), slice.len(), MmapAdvise::MADV_DONTNEED) }.is_ok()
        });
        Ok(if freed { first..last } else { end..end })
    }
}

impl Execute for Blocks {
    fn execute(&self, io: &Io) -> io::Result<()> {
        match io.op {
            Op::Read { offset } => self.each(io, offset, |piece, place| place.copy_to_volatile_slice(piece)),
            Op::Write { offset, .. } => self.each(io, offset, |piece, place| piece.copy_to_volatile_slice(place)),
            Op::Flush => Ok(()),
            Op::Discard { offset, len } => self.free(offset, len).map(drop),
            Op::WriteZeroes { offset, len, unmap: true, .. } => {
                let freed = self.free(offset, len)?;
                self.fill(offset, freed.start - offset)?;
                self.fill(freed.end, offset.saturating_add(len) - freed.end)
            }
            Op::WriteZeroes { offset, len, unmap: false, .. } => self.fill(offset, len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Blocks {
        /// Bytes that take memory.
        fn resident(&self) -> usize {
            let mut pages = vec![0u8; self.region.size().div_ceil(self.page)];
            // SAFETY: the region is mapped, and there is a byte for each of its pages.
            let result = unsafe { libc::mincore(self.region.as_ptr().cast(), self.region.size(), pages.as_mut_ptr()) };
            assert_eq!(result, 0);
            pages.iter().filter(|page| **page & 1 != 0).count() * self.page
        }
    }

    #[test]
    fn blocks_take_memory_from_the_first_write_until_they_are_freed() {
        const MIB: u64 = 1 << 20;
        let store = MemoryStore::new(64 * MIB).unwrap();
        let store = Arc::clone(&store.blocks());
        let page = store.page as u64;
        assert_eq!(store.resident(), 0);
        store.fill(0, 64 * MIB).unwrap();
        assert_eq!(store.resident() as u64, 64 * MIB);
        assert_eq!(store.free(512, 64 * MIB - 1024).unwrap(), page..64 * MIB - page);
        assert_eq!(store.resident() as u64, 2 * page);
        assert!(store.free(0, 65 * MIB).is_err());
        assert!(store.free(u64::MAX - 511, 1024).is_err());
    }

    #[test]
    fn what_fits_stays_when_the_size_changes() {
        let store = MemoryStore::new(3 * 4096).unwrap();
        let byte = |offset: u64| {
            let mut byte = [1u8];
            store.blocks().slice(offset, 1).unwrap().copy_to(&mut byte);
            byte[0]
        };
        store.blocks().slice(0, 3 * 4096).unwrap().copy_from(&[7u8; 3 * 4096]);
        assert_eq!(store.resize(Some(64 << 20)).unwrap(), 64 << 20);
        assert_eq!((byte(0), byte(3 * 4096 - 1), byte(3 * 4096), byte((64 << 20) - 1)), (7, 7, 0, 0));
        assert_eq!(store.info().capacity, 64 << 20);
        // In the middle of a page, and back again.
        assert_eq!(store.resize(Some(4096 + 512)).unwrap(), 4096 + 512);
        assert!(store.blocks().slice(4096 + 512, 1).is_err());
        assert_eq!(store.resize(Some(3 * 4096)).unwrap(), 3 * 4096);
        assert_eq!((byte(4096 + 511), byte(4096 + 512), byte(2 * 4096 - 1), byte(2 * 4096)), (7, 0, 0, 0));
        assert_eq!(store.resize(None).unwrap(), 3 * 4096);
        assert!(store.resize(Some(513)).is_err() && store.resize(Some(0)).is_err());
        let attached = Arc::clone(&store.blocks());
        assert_eq!(store.resize(Some(512)).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(attached);
        assert_eq!(store.info().capacity, 3 * 4096);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 511, 513, u64::MAX - 511] {
            let message = MemoryStore::new(size).unwrap_err().to_string();
            assert!(message.contains(&size.to_string()), "{message}");
        }
    }
}
