//! One queue's view of guest memory.

use std::marker::PhantomData;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::buffers::PinnedBuffers;
use super::mapping::{Access, Mapping};
use super::table::{IovaTable, SharedTable};

/// An address that the device was given and may not reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unmapped {
    /// No mapping holds it, or not with this access, or the range wraps.
    #[error("IOVA {iova:#x} is not mapped for this access")]
    Nowhere {
        /// The first address that is missing.
        iova: u64,
    },
    /// A mapping holds it that came without a file.
    #[error(
        "IOVA {iova:#x} lies in memory that the client did not share with us: \
         give the guest's RAM share=on (-object memory-backend-memfd,...,share=on)"
    )]
    NotShared {
        /// The first such address.
        iova: u64,
    },
    /// The request has too many pieces before it.
    #[error("IOVA {iova:#x}: the request's buffers lie in more than {MAX_PIECES} pieces of memory")]
    Scattered {
        /// The first address of the piece that is too much.
        iova: u64,
    },
}

/// The most pieces of one request's buffers, where they cross mappings: 16 MiB of pages that are mapped one by one. A
/// descriptor's length costs a guest nothing, and each piece costs us a look-up.
const MAX_PIECES: usize = 4096;

/// One queue's view of guest memory: a snapshot of the table and the mapping that was used last, since the
/// next buffer most often lies in the same one.
///
/// A view holds what it has seen: mappings taken out of the table stay reachable through it until
/// [`refresh`](Self::refresh). Mappings added later are found, since an unknown address makes it look again.
#[derive(Debug)]
pub struct GuestMemory {
    shared: Arc<SharedTable>,
    table: Arc<IovaTable>,
    last: Option<Arc<Mapping>>,
    /// What `last` says, at hand.
    window: Window,
}

/// Where a mapping lies.
#[derive(Clone, Copy, Debug)]
struct Window {
    iova: u64,
    host: *mut u8,
    /// Bytes that may be read: all or none.
    readable: u64,
    /// Bytes that may be written: all or none.
    writable: u64,
    /// Bytes at which the three records of a frame may begin, to be read.
    frames: u64,
    /// Bytes at which a frame's header may begin.
    headers: u64,
}

// SAFETY: the pointer leads to memory that the mapping in `last`, which goes where the window goes, keeps mapped on any
// thread.
unsafe impl Send for Window {}

impl Window {
    const NONE: Self = Self { iova: 0, host: std::ptr::null_mut(), readable: 0, writable: 0, frames: 0, headers: 0 };

    /// All of `mapping`.
    fn of(mapping: &Mapping) -> Self {
        let bytes = |access| mapping.host(mapping.iova(), access);
        let (readable, writable) = (bytes(Access::READ), bytes(Access::WRITE));
        let host = readable.or(writable).map_or(std::ptr::null_mut(), |(host, _)| host);
        let len = |bytes: Option<(_, u64)>| bytes.map_or(0, |(_, len)| len);
        let (readable, writable) = (len(readable), len(writable));
        let begins = |piece: u64| readable.saturating_sub(piece.wrapping_sub(1)); // a piece has a byte
        let (frames, headers) = (begins(size_of::<[Record; 3]>() as u64), begins(HEADER_LEN.into()));
        Self { iova: mapping.iova(), host, readable, writable, frames, headers }
    }

    /// Host address of `iova` and how many bytes follow there for reading, or for writing.
    #[inline(always)]
    fn host(&self, iova: u64, write: bool) -> Option<(*mut u8, u64)> {
        let offset = iova.wrapping_sub(self.iova);
        let len = if write { self.writable } else { self.readable };
        (offset < len).then(|| (self.host.wrapping_add(offset as usize), len.wrapping_sub(offset)))
    }

    /// Host address of `iova` if `len` bytes, at least one, follow there for reading.
    #[inline(always)]
    fn bytes(&self, iova: u64, len: u32) -> Option<*mut u8> {
        let offset = iova.wrapping_sub(self.iova);
        // Of no byte the last is none either: it lies beyond any mapping, or before this one.
        let last = offset.checked_add(u64::from(len).wrapping_sub(1))?;
        (last < self.readable).then(|| self.host.wrapping_add(offset as usize))
    }

    /// Host address of `iova` if it lies among the first `begins` bytes.
    #[inline(always)]
    fn fixed(&self, iova: u64, begins: u64) -> Option<*mut u8> {
        let offset = iova.wrapping_sub(self.iova);
        (offset < begins).then(|| self.host.wrapping_add(offset as usize))
    }
}

/// One request's buffers while pieces are added to them. The mapping in the view's window is pinned at all times, so that
/// a piece which lies in it needs no more than its address.
pub(crate) struct Pinning<'a> {
    memory: &'a mut GuestMemory,
    buffers: &'a mut PinnedBuffers,
    /// The view's, at hand.
    window: Window,
}

impl Pinning<'_> {
    /// Adds the range's bytes, to be written or to be read, in pieces where it crosses mappings; what is read must come before
    /// what is written.
    ///
    /// # Errors
    /// If a byte is not mapped for this access; the buffers may then hold a part of the range.
    #[inline(always)]
    pub(crate) fn add<const WRITE: bool>(&mut self, iova: u64, len: u32) -> Result<(), Unmapped> {
        match self.window.host(iova, WRITE) {
            Some((host, left)) if u64::from(len) <= left => {
                // SAFETY: `left >= len` bytes at `host` belong to the mapping in the window, which grants this access
                // and is pinned: `pinning` did so, and `add_elsewhere` does when another takes its place.
                unsafe { self.buffers.push(host, len as usize, WRITE) };
                Ok(())
            }
            _ => self.add_elsewhere(iova, len, WRITE),
        }
    }

    /// The same for a range that the window does not hold.
    #[cold]
    #[inline(never)]
    fn add_elsewhere(&mut self, iova: u64, len: u32, write: bool) -> Result<(), Unmapped> {
        let access = if write { Access::WRITE } else { Access::READ };
        let added = self.memory.pin_pieces(iova, len.into(), access, self.buffers);
        self.window = self.memory.window;
        added
    }

    /// Whether there is a piece that the device writes.
    #[inline(always)]
    pub(crate) fn has_writable(&self) -> bool {
        self.buffers.has_writable()
    }
}

/// Records of 16 bytes in guest memory, to be read one by one.
pub(crate) struct Records<'a> {
    first: *const Unaligned<[u64; 2]>,
    len: u16,
    /// What keeps them there: the pins of the buffers that a [`Pinning`] of this lifetime fills, or our own copy.
    kept: PhantomData<&'a ()>,
}

impl Records<'_> {
    /// Record `index` as it is now, read once.
    #[inline(always)]
    pub(crate) fn read(&self, index: u16) -> Option<[u64; 2]> {
        // SAFETY: `first` leads to `len` records, which stay for the lifetime; any bytes are a valid array.
        (index < self.len).then(|| unsafe { self.first.add(index.into()).read_volatile() }.0)
    }

    /// How many there are.
    #[inline(always)]
    pub(crate) fn len(&self) -> u16 {
        self.len
    }
}

/// A value, wherever it lies.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(super) struct Unaligned<T>(pub(super) T);

/// A record of 16 bytes: a descriptor of either kind of ring.
#[repr(C, packed)]
struct Record {
    iova: u64,
    /// The length, then a word that says what it is.
    rest: u64,
}

/// Bytes of a frame's first piece.
const HEADER_LEN: u32 = 16;

/// How the three records that tell of a frame are made: their last words.
pub(crate) trait FrameRecords {
    /// Of the piece that is read first.
    const HEADER: Bits;
    /// Of the data.
    const DATA: Bits;
    /// The bit that says of the data that it is to be written.
    const WRITE: u32;
    /// Of the piece that is written last.
    const TRAILER: Bits;
}

/// A word as far as it matters.
pub(crate) struct Bits {
    /// The bits that matter.
    pub(crate) mask: u32,
    /// What they are.
    pub(crate) value: u32,
}

impl Bits {
    #[inline(always)]
    fn is(&self, word: u32) -> bool {
        word & self.mask == self.value
    }
}

impl GuestMemory {
    /// A view of the newest snapshot.
    pub fn new(shared: Arc<SharedTable>) -> Self {
        let table = shared.load();
        Self { shared, table, last: None, window: Window::NONE }
    }

    /// Takes the newest snapshot and lets go of all older ones.
    pub fn refresh(&mut self) {
        self.last = None;
        self.window = Window::NONE;
        self.table = self.shared.load();
    }

    /// Finds records of 16 bytes, as many as `copy` has, and begins to pin pieces which they tell of. They are read where
    /// they lie, or in `copy` where they cross mappings.
    ///
    /// # Errors
    /// If a byte is not mapped for reading.
    #[inline(always)]
    pub(crate) fn records<'a>(
        &'a mut self,
        iova: u64,
        len: u16,
        copy: &'a mut Vec<[u64; 2]>,
        buffers: &'a mut PinnedBuffers,
    ) -> Result<(Records<'a>, Pinning<'a>), Unmapped> {
        let (host, left) = self.host(iova, Access::READ)?;
        let first = if left < u64::from(len).wrapping_mul(16) {
            copy.clear();
            copy.resize(len.into(), [0; 2]);
            self.gather_records(iova, copy)?;
            copy.as_ptr().cast()
        } else {
            // Of the mapping that `host` has left in `self.last`, which `pinning` pins.
            host.cast_const().cast()
        };
        Ok((Records { first, len, kept: PhantomData }, self.pinning(buffers)))
    }

    /// The same where the records cross mappings.
    #[cold]
    fn gather_records(&mut self, mut iova: u64, records: &mut [[u64; 2]]) -> Result<(), Unmapped> {
        for record in records {
            let mut bytes = [0; 16];
            self.read(iova, &mut bytes)?;
            let words = u128::from_le_bytes(bytes);
            *record = [words as u64, (words >> 64) as u64].map(u64::to_le);
            iova = iova.wrapping_add(16);
        }
        Ok(())
    }

    /// Copies `data.len()` bytes out of guest memory.
    ///
    /// # Errors
    /// If a byte is not mapped for reading.
    pub fn read(&mut self, mut iova: u64, mut data: &mut [u8]) -> Result<(), Unmapped> {
        while !data.is_empty() {
            let (slice, mapping_len) = {
                let (host, left) = self.host(iova, Access::READ)?;
                let len = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                // SAFETY: `host` returned `left >= len` bytes from there on that belong to a mapping which
                // `self.last` keeps mapped while the slice, which does not leave this loop, is used.
                (unsafe { VolatileSlice::new(host, len) }, len)
            };
            let (head, tail) = data.split_at_mut(mapping_len);
            slice.copy_to(head);
            data = tail;
            iova = iova.wrapping_add(mapping_len as u64);
            if iova == 0 && !data.is_empty() {
                return Err(Unmapped::Nowhere { iova });
            }
        }
        Ok(())
    }

    /// Copies `data` into guest memory.
    ///
    /// # Errors
    /// If a byte is not mapped for writing; bytes before it may have been written.
    pub fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Unmapped> {
        let mut buffers = PinnedBuffers::default();
        self.pin(iova, data.len() as u64, Access::WRITE, &mut buffers)?;
        buffers.copy_from_slice(0, data);
        Ok(())
    }

    /// Adds the range's bytes to `buffers`, in pieces where it crosses mappings.
    ///
    /// # Errors
    /// If a byte is not mapped for this access; `buffers` may then hold a part of the range.
    pub fn pin(&mut self, iova: u64, len: u64, access: Access, buffers: &mut PinnedBuffers) -> Result<(), Unmapped> {
        buffers.begin(self.last.as_ref());
        self.pin_pieces(iova, len, access, buffers)?;
        buffers.select_all();
        Ok(())
    }

    /// Makes of empty `buffers` what the three records of 16 bytes at `iova` tell of, if that is a frame, as nearly all requests
    /// are: a header of 16 bytes to read, the data, and a trailer of one byte to write. The processor is asked to have header and
    /// trailer at hand.
    ///
    /// Records and pieces must lie in the mapping that was used last, by which the buffers were used before, and no piece be empty.
    /// Otherwise nothing is done, and nothing of what was read is used: `false`.
    // Apart, and with no call to anything else: it needs all registers that a function may use without saving them.
    #[inline(never)]
    pub(crate) fn pin_frame<F: FrameRecords>(&self, iova: u64, buffers: &mut PinnedBuffers) -> bool {
        let window = &self.window;
        let Some(records) = window.fixed(iova, window.frames) else { return false };
        let record = |index: usize| {
            let record = records.cast_const().cast::<Record>().wrapping_add(index);
            // SAFETY: the three records lie in the mapping in the window, which `self.last` keeps. Each field is read once, wherever
            // it lies, and any bytes are valid.
            let (iova, rest) = unsafe {
                let iova = (&raw const (*record).iova).cast::<Unaligned<u64>>().read_volatile();
                let rest = (&raw const (*record).rest).cast::<Unaligned<u64>>().read_volatile();
                (u64::from_le(iova.0), u64::from_le(rest.0))
            };
            (iova, rest as u32, (rest >> 32) as u32)
        };
        let (iova, len, kind) = record(0);
        if !F::HEADER.is(kind) | (len != HEADER_LEN) {
            return false;
        }
        let Some(header) = window.fixed(iova, window.headers) else { return false };
        let (iova, len, kind) = record(1);
        let Some(data) = window.bytes(iova, len).filter(|_| F::DATA.is(kind)) else { return false };
        let (data, write) = ((data, len as usize), kind & F::WRITE != 0);
        let (iova, len, kind) = record(2);
        if !F::TRAILER.is(kind) | (len != 1) {
            return false;
        }
        let Some(trailer) = window.fixed(iova, window.writable) else { return false };
        if !buffers.are_ready(self.last.as_ref()) {
            return false;
        }
        // SAFETY: so many bytes belong to the mapping in the window, `self.last`, which is pinned. It grants both kinds of access, and
        // those as a whole: the header was found to be readable, and the trailer writable.
        unsafe { buffers.push_frame(header, data, trailer, write) };
        prefetch(header, Access::READ);
        prefetch(trailer, Access::WRITE);
        true
    }

    /// Adds pieces to `buffers` one after the other.
    #[inline(always)]
    pub(crate) fn pinning<'a>(&'a mut self, buffers: &'a mut PinnedBuffers) -> Pinning<'a> {
        buffers.begin(self.last.as_ref());
        let window = self.window;
        Pinning { memory: self, buffers, window }
    }

    #[cold]
    #[inline(never)]
    fn pin_pieces(
        &mut self,
        mut iova: u64,
        mut len: u64,
        access: Access,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), Unmapped> {
        while len > 0 {
            if buffers.is_full(MAX_PIECES) {
                return Err(Unmapped::Scattered { iova });
            }
            let (host, left) = self.host(iova, access)?;
            let piece = len.min(left);
            if let Some(mapping) = &self.last {
                buffers.pin(mapping);
                // SAFETY: `host` was given out by `self.last`, which is pinned, for `left >= piece` bytes and this access.
                unsafe { buffers.push(host, piece as usize, access.write) };
            }
            len = len.saturating_sub(piece);
            iova = iova.wrapping_add(piece);
            if iova == 0 && len > 0 {
                return Err(Unmapped::Nowhere { iova });
            }
        }
        Ok(())
    }

    /// Asks the processor to have the byte at `iova` at hand soon, for reading: a hint, for a request that comes after the
    /// one at work. Does nothing for an address outside the mapping that was used last.
    #[inline(always)]
    pub(crate) fn prefetch(&self, iova: u64) {
        if let Some((host, _)) = self.window.host(iova, false) {
            prefetch(host, Access::READ);
        }
    }

    /// Host address of `iova` and how many bytes follow there; `self.last` is then its mapping.
    #[inline]
    fn host(&mut self, iova: u64, access: Access) -> Result<(*mut u8, u64), Unmapped> {
        match self.window.host(iova, access.write) {
            Some(found) if access != Access::READ_WRITE => Ok(found),
            _ => self.look_up(iova, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn look_up(&mut self, iova: u64, access: Access) -> Result<(*mut u8, u64), Unmapped> {
        if self.table.find(iova).is_none() {
            // Mapped since this snapshot was taken, perhaps: the client was told so before the guest used it.
            self.table = self.shared.load();
        }
        let mapping = self.table.find(iova).ok_or(Unmapped::Nowhere { iova })?;
        if !mapping.is_reachable() {
            return Err(Unmapped::NotShared { iova });
        }
        let found = mapping.host(iova, access).ok_or(Unmapped::Nowhere { iova })?;
        self.window = Window::of(mapping);
        self.last = Some(Arc::clone(mapping));
        Ok(found)
    }

    /// The mapping that was used last, which the view holds anyway.
    #[inline(always)]
    pub(super) fn last(&self) -> Option<&Arc<Mapping>> {
        self.last.as_ref()
    }

    /// The mapping that holds `iova`, in the newest snapshot.
    pub(super) fn mapping(&mut self, iova: u64, access: Access) -> Result<&Arc<Mapping>, Unmapped> {
        self.host(iova, access)?;
        self.last.as_ref().ok_or(Unmapped::Nowhere { iova })
    }
}

/// A hint to bring a cache line here: ours alone if it is to be written, so that the write need not ask for it again.
#[inline(always)]
pub(super) fn prefetch(host: *const u8, access: Access) {
    #[cfg(target_arch = "x86_64")]
    if access.write {
        // SAFETY: PREFETCHW changes no register, flag or memory, and never faults, whatever the address.
        unsafe { std::arch::asm!("prefetchw [{}]", in(reg) host, options(nostack, preserves_flags, readonly)) };
    } else {
        // SAFETY: as above, for PREFETCHT0.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(host.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _no_hint = (host, access);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::testing::memory_file;

    /// Two adjacent mappings of two files, a gap, then one without a file.
    fn pieces() -> (Arc<SharedTable>, GuestMemory) {
        let shared = Arc::new(SharedTable::default());
        for (iova, file_offset) in [(0x1000, 0x1000), (0x2000, 0)] {
            let mapping = Mapping::of_file(iova, 0x1000, Access::READ_WRITE, memory_file(0x2000), file_offset).unwrap();
            shared.map(mapping).unwrap();
        }
        shared.map(Mapping::unreachable(0x8000, 0x1000, Access::READ_WRITE).unwrap()).unwrap();
        let memory = GuestMemory::new(Arc::clone(&shared));
        (shared, memory)
    }

    #[test]
    fn a_range_crosses_adjacent_mappings() {
        let (_, mut memory) = pieces();
        let data: Vec<u8> = (0..=255).collect();
        memory.write(0x1f80, &data).unwrap();
        let mut back = [0; 256];
        memory.read(0x1f80, &mut back).unwrap();
        assert_eq!(back[..], data[..]);
        let mut buffers = PinnedBuffers::default();
        memory.pin(0x1f80, 256, Access::READ, &mut buffers).unwrap();
        assert_eq!(buffers.iovecs().iter().map(|iovec| iovec.iov_len).collect::<Vec<_>>(), [128, 128]);
    }

    /// What is pinned in one go must be so whole: memory to be read only, or other memory than the buffers were used for, goes the
    /// long way.
    #[test]
    fn a_frame_lies_in_memory_of_both_kinds_that_is_pinned() {
        struct Any;
        impl FrameRecords for Any {
            const HEADER: Bits = Bits { mask: 0, value: 0 };
            const DATA: Bits = Bits { mask: 0, value: 0 };
            const WRITE: u32 = 1;
            const TRAILER: Bits = Bits { mask: 0, value: 0 };
        }
        for (access, iova, other, taken) in [
            (Access::READ_WRITE, 0x1000, 0x1000, true),
            (Access::READ, 0x1000, 0x1000, false),
            (Access::READ_WRITE, 0x1000, 0x8000, false),
        ] {
            let (shared, file) = (Arc::new(SharedTable::default()), memory_file(0x1000));
            for (iova, access) in [(0x1000, access), (0x8000, Access::READ_WRITE)] {
                shared.map(Mapping::of_file(iova, 0x1000, access, Arc::clone(&file), 0).unwrap()).unwrap();
            }
            let mut memory = GuestMemory::new(shared);
            let mut records = Vec::new();
            for (address, len) in [(iova + 0x100, 16_u64), (iova + 0x200, 512), (iova + 0x300, 1)] {
                records.extend([address, len].map(u64::to_le_bytes).concat());
            }
            memory.write(0x8000, &records).unwrap();
            let mut buffers = PinnedBuffers::default();
            memory.read(other, &mut [0]).unwrap();
            memory.pin(other, 1, Access::READ, &mut buffers).unwrap();
            buffers.recycle(&memory);
            memory.read(iova, &mut [0]).unwrap();
            assert_eq!(memory.pin_frame::<Any>(iova, &mut buffers), taken, "{access:?}, {other:#x}");
        }
    }

    #[test]
    fn the_pieces_of_a_request_have_a_bound() {
        let (shared, file) = (Arc::new(SharedTable::default()), memory_file(0x1000));
        let pages = MAX_PIECES as u64 + 1;
        for page in 0..pages {
            shared.map(Mapping::of_file(page << 12, 0x1000, Access::READ, Arc::clone(&file), 0).unwrap()).unwrap();
        }
        let mut memory = GuestMemory::new(shared);
        let mut buffers = PinnedBuffers::default();
        let last = (pages - 1) << 12;
        assert_eq!(memory.pin(0, pages << 12, Access::READ, &mut buffers), Err(Unmapped::Scattered { iova: last }));
        buffers.clear();
        assert_eq!(memory.pin(0, last, Access::READ, &mut buffers), Ok(()));
        assert_eq!(memory.pin(last, 1, Access::READ, &mut buffers), Err(Unmapped::Scattered { iova: last }));
    }

    #[test]
    fn what_is_not_mapped_is_refused() {
        let (shared, mut memory) = pieces();
        let mut bytes = [0; 32];
        assert_eq!(memory.read(0xff0, &mut bytes), Err(Unmapped::Nowhere { iova: 0xff0 }));
        assert_eq!(memory.read(0x2ff0, &mut bytes), Err(Unmapped::Nowhere { iova: 0x3000 }));
        assert_eq!(memory.read(0x8000, &mut bytes), Err(Unmapped::NotShared { iova: 0x8000 }));
        // The very end of the address space: no byte follows the last one.
        let last = Mapping::of_file(0xffff_ffff_ffff_f000, 0x1000, Access::READ, memory_file(0x1000), 0).unwrap();
        shared.map(last).unwrap();
        shared.map(Mapping::of_file(0, 0x1000, Access::READ, memory_file(0x1000), 0).unwrap()).unwrap();
        assert_eq!(memory.read(u64::MAX - 15, &mut bytes), Err(Unmapped::Nowhere { iova: 0 }));
        assert_eq!(memory.read(u64::MAX - 31, &mut bytes), Ok(()));
        assert!(memory.write(u64::MAX - 31, &bytes).is_err(), "mapped for reading only");
    }

    #[test]
    fn additions_are_found_and_removals_wait_for_a_refresh() {
        let (shared, mut memory) = pieces();
        shared.map(Mapping::of_file(0x4000, 0x1000, Access::READ, memory_file(0x1000), 0).unwrap()).unwrap();
        memory.read(0x4000, &mut [0; 8]).unwrap();
        let gone = shared.unmap(0x4000, 0x4fff).unwrap();
        let release = gone[0].release();
        drop(gone);
        memory.read(0x4000, &mut [0; 8]).unwrap();
        assert!(!release.wait(std::time::Instant::now()), "the view still holds it");
        memory.refresh();
        assert!(release.wait(std::time::Instant::now()));
        assert!(memory.read(0x4000, &mut [0; 8]).is_err());
    }
}
