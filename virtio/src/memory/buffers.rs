//! The scatter list of one request.

use std::fmt;
use std::num::NonZeroU16;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::file::MemoryFile;
use super::mapping::{Access, Mapping};
use super::view::{GuestMemory, Unaligned, prefetch};

/// One request's pieces of guest memory: those that the device reads, then those that it writes, with the mappings they
/// lie in.
///
/// As long as this exists its bytes stay mapped, whatever the client unmaps meanwhile: an I/O that owns its
/// buffers can end at any time without touching memory that is gone. Made by
/// [`GuestMemory::pin`](super::GuestMemory::pin), and meant to be used again and again: [`clear`](Self::clear) keeps its capacity.
///
/// What most methods speak of are its *data*: all pieces that `pin` has added; for a request those that are left when
/// header and trailer have been taken off and the readable or the writable pieces were chosen.
pub struct PinnedBuffers {
    /// The readable pieces, then the writable ones.
    iovecs: Vec<libc::iovec>,
    /// How many are readable.
    readable: usize,
    /// The pieces of the data.
    data: Range<usize>,
    /// Bytes of the data.
    len: u64,
    /// Bytes apart from the list, 16 of them, not read yet: a frame's.
    header: Option<NonNull<u8>>,
    /// A byte apart from the list, written when the request ends.
    trailer: Option<NonNull<u8>>,
    /// Where further pieces are told of, which are not in the list yet.
    rest: Option<Rest>,
    /// The mapping of the first piece: for nearly all requests that of all others too.
    pin: Option<Arc<Mapping>>,
    /// The mappings of the others, without repeating the one before.
    more_pins: Vec<Arc<Mapping>>,
}

/// Records of 16 bytes that are to be read yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    pub(crate) iova: u64,
    pub(crate) records: NonZeroU16,
}

impl Default for PinnedBuffers {
    fn default() -> Self {
        let (iovecs, more_pins) = (Vec::new(), Vec::new());
        Self { iovecs, readable: 0, data: 0..0, len: 0, header: None, trailer: None, rest: None, pin: None, more_pins }
    }
}

// SAFETY: the pointers lead to memory shared with another process anyway, which the pins keep mapped on any
// thread; they are only ever used for copies that take no reference to it.
unsafe impl Send for PinnedBuffers {}

impl PinnedBuffers {
    /// Bytes of the data.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is a piece that the device writes, in the data or apart from it.
    #[inline]
    pub(crate) fn has_writable(&self) -> bool {
        self.iovecs.len() > self.readable
    }

    /// Whether there is a byte that the device may write besides the trailer.
    #[inline]
    pub fn has_writable_data(&self) -> bool {
        !matches!(self.iovecs.get(self.readable..), None | Some([] | [libc::iovec { iov_len: 0, .. }]))
    }

    /// Notes where the rest is told of.
    #[inline(always)]
    pub(crate) fn set_rest(&mut self, rest: Rest) {
        self.rest = Some(rest);
    }

    /// Where the rest is told of, for whoever reads that now.
    #[inline(always)]
    pub(crate) fn take_rest(&mut self) -> Option<Rest> {
        self.rest.take()
    }

    /// Whether there are `most` pieces.
    pub(super) fn is_full(&self, most: usize) -> bool {
        self.iovecs.len() >= most
    }

    /// Lets go of all pieces and pins.
    #[inline]
    pub fn clear(&mut self) {
        self.forget_pieces();
        self.pin = None;
    }

    /// Lets go of all pieces, and of all pins but that of the mapping which `memory` holds anyway: the next request most
    /// often lies in the same one. That it may go, [`clear`](Self::clear) these buffers too where `memory` is
    /// [refreshed](GuestMemory::refresh).
    #[inline]
    pub fn recycle(&mut self, memory: &GuestMemory) {
        self.forget_pieces();
        if !same(self.pin.as_ref(), memory.last()) {
            self.let_go();
        }
    }

    #[inline(always)]
    fn forget_pieces(&mut self) {
        self.iovecs.clear();
        self.readable = 0;
        self.data = 0..0;
        self.len = 0;
        self.header = None;
        self.trailer = None;
        self.rest = None;
        if !self.more_pins.is_empty() {
            self.let_go_of_more();
        }
    }

    #[cold]
    #[inline(never)]
    fn let_go_of_more(&mut self) {
        self.more_pins.clear();
    }

    #[cold]
    #[inline(never)]
    fn let_go(&mut self) {
        self.pin = None;
    }

    /// What [`take_header`](Self::take_header) takes, for a frame: with its trailer set apart, and the piece between as the data,
    /// as it is when the writable or the readable pieces are chosen, whichever it belongs to: says also whether it is writable.
    /// `None` if these buffers are none; nothing has been read or taken then.
    #[inline(always)]
    pub(crate) fn take_frame(&mut self) -> Option<([u64; 2], bool)> {
        let header = self.header.take()?;
        // SAFETY: these bytes are mapped for reading, as `push_frame` was told; any are a valid array.
        let words = unsafe { header.cast::<Unaligned<[u64; 2]>>().read_volatile() };
        Some((words.0.map(u64::from_le), self.readable == 0))
    }

    /// Takes the first 16 readable bytes off, and returns a copy, read once, as the two little-endian words that they
    /// are; `None` if there are not so many.
    #[inline]
    pub(crate) fn take_header(&mut self) -> Option<[u64; 2]> {
        // Nearly always the header is a piece of its own, or the first part of one.
        let Some(first) = self.iovecs.first_mut().filter(|first| self.readable > 0 && first.iov_len >= 16) else {
            return self.gather_header();
        };
        // SAFETY: the piece is mapped for reading, and has these bytes; any are a valid array.
        let words = unsafe { first.iov_base.cast::<Unaligned<[u64; 2]>>().read_volatile() };
        first.iov_base = first.iov_base.wrapping_byte_add(16);
        first.iov_len = first.iov_len.wrapping_sub(16);
        self.data.start = usize::from(first.iov_len == 0);
        Some(words.0.map(u64::from_le))
    }

    #[cold]
    fn gather_header(&mut self) -> Option<[u64; 2]> {
        // Neighbours stay apart: what is selected later goes by the number of pieces.
        self.data = 0..self.readable;
        self.len = self.iovecs().iter().fold(0, |len, piece| len.wrapping_add(piece.iov_len as u64));
        let mut bytes = [0; 16];
        if self.copy_to_slice(0, &mut bytes) < bytes.len() {
            return None;
        }
        self.advance(16);
        let words = u128::from_le_bytes(bytes);
        Some([words as u64, (words >> 64) as u64])
    }

    /// Sets the last writable byte apart, to be written by [`write_trailer`](Self::write_trailer); `false` if there is none.
    #[inline]
    pub(crate) fn take_trailer(&mut self) -> bool {
        let count = self.iovecs.len();
        if count <= self.readable {
            return false;
        }
        let Some(last) = self.iovecs.last_mut() else { return false };
        last.iov_len = last.iov_len.wrapping_sub(1); // no piece is empty
        self.trailer = NonNull::new(last.iov_base.cast::<u8>().wrapping_add(last.iov_len));
        self.data.end = count.wrapping_sub((last.iov_len == 0).into());
        true
    }

    /// Makes the readable pieces, after the header that was taken off, the data.
    #[inline]
    pub(crate) fn select_readable(&mut self) {
        self.select(self.data.start..self.readable);
    }

    /// Makes the writable pieces, before the trailer that was taken off, the data.
    #[inline]
    pub(crate) fn select_writable(&mut self) {
        self.select(self.readable..self.data.end);
    }

    /// Makes nothing the data.
    pub(crate) fn select_none(&mut self) {
        self.select(0..0);
    }

    /// Makes all pieces the data.
    pub(super) fn select_all(&mut self) {
        self.select(0..self.iovecs.len());
    }

    #[inline(always)]
    fn select(&mut self, data: Range<usize>) {
        let one = if data.end.wrapping_sub(data.start) == 1 { self.iovecs.get(data.start) } else { None };
        let len = one.map(|one| one.iov_len as u64);
        self.data = data;
        self.len = len.unwrap_or_else(|| self.join());
    }

    /// Makes one piece of neighbours in our address space: fewer, larger segments for the kernel. Returns the bytes of
    /// the data.
    #[inline(never)]
    fn join(&mut self) -> u64 {
        let Range { start, end } = self.data.clone();
        let mut len = 0_u64;
        let mut kept = start;
        for next in start..end {
            let Some(&piece) = self.iovecs.get(next) else { break };
            len = len.wrapping_add(piece.iov_len as u64); // of mapped memory, a thousand pieces: far from 2^64
            match self.iovecs.get_mut(start..kept).and_then(|pieces| pieces.last_mut()) {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
                    last.iov_len = last.iov_len.wrapping_add(piece.iov_len);
                }
                _ => {
                    if let Some(place) = self.iovecs.get_mut(kept) {
                        *place = piece;
                    }
                    kept = kept.wrapping_add(1);
                }
            }
        }
        self.data.end = kept;
        if end == self.iovecs.len() {
            self.iovecs.truncate(kept);
            self.readable = self.readable.min(kept);
        }
        len
    }

    /// Asks the processor to have at hand soon what [`take_header`](Self::take_header) reads and
    /// [`write_trailer`](Self::write_trailer) writes: a hint.
    #[inline]
    pub fn prefetch(&self) {
        if let [first, .., last] = self.iovecs.as_slice() {
            prefetch(first.iov_base.cast(), Access::READ);
            prefetch(last.iov_base.cast::<u8>().wrapping_add(last.iov_len).wrapping_sub(1), Access::WRITE);
        }
    }

    /// All pieces, data or not: those that the device reads, and those that it writes.
    pub fn pieces(&self) -> [Vec<libc::iovec>; 2] {
        let apart = |place: Option<NonNull<u8>>, iov_len| {
            place.map(|place| libc::iovec { iov_base: place.as_ptr().cast(), iov_len }).into_iter()
        };
        let (readable, writable) = self.iovecs.split_at_checked(self.readable).unwrap_or_default();
        let readable = apart(self.header, 16).chain(readable.iter().copied());
        [readable.collect(), writable.iter().copied().chain(apart(self.trailer, 1)).collect()]
    }

    /// The pieces of the data, for a system call; valid while `self` lives and is not changed.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.iovecs.get(self.data.clone()).unwrap_or_default()
    }

    /// Whether the device may write all of the data.
    fn writable(&self) -> bool {
        self.data.start >= self.readable
    }

    /// The file that all of it lies in; `None` if there are several, or no bytes at all.
    #[inline]
    pub fn file(&self) -> Option<&Arc<MemoryFile>> {
        let file = self.pin.as_ref()?.file()?;
        self.more_pins.iter().all(|pin| pin.file().is_some_and(|other| Arc::ptr_eq(file, other))).then_some(file)
    }

    /// The pieces as slices that can be copied from and to.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.iovecs().iter().map(|iovec| {
            // SAFETY: `push` was given bytes that its mapping holds; the pins, which live as long as the slice's
            // lifetime, keep them mapped.
            unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
        })
    }

    /// Copies guest memory, from byte `offset` of the data on, to `into`; says how many bytes there were.
    pub fn copy_to_slice(&self, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0_usize;
        for slice in self.slices_from(offset) {
            let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done = done.saturating_add(slice.copy_to(rest));
        }
        done
    }

    /// Copies `from` into guest memory, from byte `offset` of the data on; says how many bytes had room: none
    /// if a piece was pinned for reading.
    pub fn copy_from_slice(&self, offset: u64, from: &[u8]) -> usize {
        if !self.writable() {
            return 0;
        }
        let mut done = 0_usize;
        for slice in self.slices_from(offset) {
            let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let piece = rest.get(..slice.len()).unwrap_or(rest);
            slice.copy_from(piece);
            done = done.saturating_add(piece.len());
        }
        done
    }

    /// Fills the data with `byte`; does nothing if a piece was pinned for reading.
    pub fn fill(&self, byte: u8) {
        if !self.writable() {
            return;
        }
        for iovec in self.iovecs() {
            // SAFETY: as in `slices`: mapped for this many bytes while `self` lives, and no reference is made.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), byte, iovec.iov_len) };
        }
    }

    /// Takes the first `bytes` bytes off the data, after an I/O that ended short. More than there are empties it.
    pub fn advance(&mut self, bytes: u64) {
        let mut left = bytes.min(self.len);
        self.len = self.len.saturating_sub(left);
        let mut gone = 0_usize;
        for iovec in self.iovecs.get_mut(self.data.clone()).unwrap_or_default() {
            if left < iovec.iov_len as u64 {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(left as usize);
                iovec.iov_len = iovec.iov_len.saturating_sub(left as usize);
                break;
            }
            left = left.saturating_sub(iovec.iov_len as u64);
            gone = gone.saturating_add(1);
        }
        self.data.start = self.data.start.saturating_add(gone);
    }

    /// Makes `into` a list of `len` bytes of the data from byte `offset` on, or of as many as there are. It pins what all of
    /// the data lies in, and has no trailer.
    pub fn part(&self, offset: u64, len: u64, into: &mut Self) {
        into.clear();
        let (mut skip, mut left) = (offset, len);
        for piece in self.iovecs() {
            if left == 0 {
                break;
            }
            let start = skip.min(piece.iov_len as u64);
            skip = skip.saturating_sub(start);
            let taken = left.min((piece.iov_len as u64).saturating_sub(start));
            left = left.saturating_sub(taken);
            if taken > 0 {
                let iov_base = piece.iov_base.wrapping_byte_add(start as usize);
                into.iovecs.push(libc::iovec { iov_base, iov_len: taken as usize });
            }
        }
        into.readable = if self.writable() { 0 } else { into.iovecs.len() };
        into.data = 0..into.iovecs.len();
        into.len = len.saturating_sub(left);
        into.pin.clone_from(&self.pin);
        into.more_pins.extend_from_slice(&self.more_pins);
    }

    /// Writes the byte that was set apart, if one was.
    #[inline]
    pub fn write_trailer(&self, value: u8) {
        if let Some(place) = self.trailer {
            // SAFETY: the last byte of a piece that `push` was told may be written; the pins keep it mapped.
            unsafe { place.as_ptr().write_volatile(value) };
        }
    }

    /// Adds a piece: pieces to be written come after those to be read.
    ///
    /// # Safety
    /// The `len` bytes at `host` must belong to a mapping that is pinned, and be mapped for writing if `write`, for reading
    /// if not.
    #[inline(always)]
    pub(super) unsafe fn push(&mut self, host: *mut u8, len: usize, write: bool) {
        self.iovecs.push(libc::iovec { iov_base: host.cast(), iov_len: len });
        if !write {
            self.readable = self.iovecs.len();
        }
    }

    /// Makes a frame of buffers without a piece: 16 bytes to read, the data, and a byte to write.
    ///
    /// # Safety
    /// As for [`push`](Self::push), for each of the three.
    #[inline(always)]
    pub(super) unsafe fn push_frame(&mut self, header: *mut u8, data: (*mut u8, usize), trailer: *mut u8, write: bool) {
        self.iovecs.push(libc::iovec { iov_base: data.0.cast(), iov_len: data.1 });
        self.readable = usize::from(!write);
        self.data = 0..1;
        self.len = data.1 as u64;
        self.header = NonNull::new(header);
        self.trailer = NonNull::new(trailer);
    }

    /// Whether a piece in `mapping` can be added with no more than its address: there is room for one, no piece, and the mapping
    /// is pinned.
    #[inline(always)]
    pub(super) fn are_ready(&self, mapping: Option<&Arc<Mapping>>) -> bool {
        let is_pinned = mapping.is_some_and(|mapping| self.pin.as_ref().is_some_and(|pin| Arc::ptr_eq(pin, mapping)));
        is_pinned && self.iovecs.is_empty() && self.iovecs.capacity() > 0
    }

    /// Keeps `mapping`, in which the next piece most likely lies, for as long as the pieces. What [`recycle`](Self::recycle)
    /// has left goes.
    #[inline(always)]
    pub(super) fn begin(&mut self, mapping: Option<&Arc<Mapping>>) {
        if !same(self.pin.as_ref(), mapping) {
            self.begin_elsewhere(mapping);
        }
    }

    #[cold]
    #[inline(never)]
    fn begin_elsewhere(&mut self, mapping: Option<&Arc<Mapping>>) {
        if self.iovecs.is_empty() {
            self.pin = mapping.cloned();
        } else if let Some(mapping) = mapping {
            self.pin(mapping);
        }
    }

    /// Keeps `mapping` for as long as the pieces.
    #[inline]
    pub(super) fn pin(&mut self, mapping: &Arc<Mapping>) {
        match &self.pin {
            None => self.pin = Some(Arc::clone(mapping)),
            Some(pin) if Arc::ptr_eq(pin, mapping) => {}
            Some(_) => self.pin_more(mapping),
        }
    }

    #[cold]
    fn pin_more(&mut self, mapping: &Arc<Mapping>) {
        if !self.more_pins.last().is_some_and(|pin| Arc::ptr_eq(pin, mapping)) {
            self.more_pins.push(Arc::clone(mapping));
        }
    }

    fn slices_from(&self, offset: u64) -> impl Iterator<Item = VolatileSlice<'_>> {
        let mut skip = offset;
        self.slices().filter_map(move |slice| {
            let len = slice.len() as u64;
            let start = skip.min(len);
            skip = skip.saturating_sub(start);
            slice.offset(start as usize).ok().filter(|rest| !rest.is_empty())
        })
    }
}

/// Whether both are the same mapping, or none.
#[inline(always)]
fn same(one: Option<&Arc<Mapping>>, other: Option<&Arc<Mapping>>) -> bool {
    let address = |mapping: Option<&Arc<Mapping>>| mapping.map_or(std::ptr::null(), Arc::as_ptr);
    address(one) == address(other)
}

impl fmt::Debug for PinnedBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffers({} pieces, {} bytes)", self.data.len(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedTable;
    use crate::memory::testing::memory_file;

    /// Three pieces: 16, 8 and 24 bytes, with gaps between.
    fn pieces(access: Access) -> PinnedBuffers {
        let mapping = Arc::new(Mapping::of_file(0, 0x1000, Access::READ_WRITE, memory_file(0x1000), 0).unwrap());
        let mut buffers = PinnedBuffers::default();
        buffers.pin(&mapping);
        for (at, len) in [(0, 16), (0x100, 8), (0x200, 24)] {
            let (host, _) = mapping.host(at, Access::WRITE).unwrap();
            // SAFETY: within the mapping, which is writable and pinned.
            unsafe { buffers.push(host, len, access.write) };
        }
        buffers.select_all();
        buffers
    }

    #[test]
    fn copies_start_and_end_anywhere() {
        let buffers = pieces(Access::WRITE);
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
        let buffers = pieces(Access::READ);
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
            let mut buffers = pieces(Access::WRITE);
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
    fn a_part_is_the_same_memory_and_pins_it() {
        let data: Vec<u8> = (1..=48).collect();
        for (offset, len) in [(0, 48), (15, 2), (16, 8), (20, 28), (47, 1), (30, 0)] {
            let whole = pieces(Access::WRITE);
            whole.copy_from_slice(0, &data);
            let mut part = pieces(Access::READ);
            whole.part(offset, len, &mut part);
            let release = whole.pin.as_ref().unwrap().release();
            drop(whole);
            assert_eq!(part.len(), len);
            assert!(!release.wait(std::time::Instant::now()), "the part pins it");
            let mut back = vec![0; len as usize];
            assert_eq!(part.copy_to_slice(0, &mut back) as u64, len);
            assert_eq!(back, data[offset as usize..][..len as usize]);
            assert_eq!(part.copy_from_slice(0, &data) as u64, len, "writable as before");
            part.clear();
            assert!(release.wait(std::time::Instant::now()));
        }
        let mut part = PinnedBuffers::default();
        pieces(Access::WRITE).part(40, 20, &mut part);
        assert_eq!(part.len(), 8, "ends with the list");
        pieces(Access::READ).part(0, 48, &mut part);
        assert_eq!((part.len(), part.copy_from_slice(0, &data)), (48, 0), "still not to be written");
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
            buffers.pin(mapping);
            // SAFETY: within the mapping, which is writable and pinned.
            unsafe { buffers.push(host, 16, true) };
            buffers.select_all();
            assert!(Arc::ptr_eq(buffers.file().unwrap(), &file));
            assert_eq!(file.offset_of(buffers.iovecs().last().unwrap()), Some(offset));
        }
        let (host, _) = third.host(0x2000, Access::WRITE).unwrap();
        buffers.pin(&third);
        // SAFETY: as above.
        unsafe { buffers.push(host, 16, true) };
        assert!(buffers.file().is_none());
        assert_eq!(other.offset_of(&other.piece(0x800, 0x1000)), Some(0x800), "cut off at the end");
        let mut beyond = other.piece(0xff0, 0x10);
        beyond.iov_len += 1;
        assert_eq!(other.offset_of(&beyond), None);
    }

    #[test]
    fn one_mapping_is_pinned_once_and_until_cleared() {
        let mut buffers = pieces(Access::WRITE);
        assert!(buffers.more_pins.is_empty());
        let release = buffers.pin.as_ref().unwrap().release();
        assert!(!release.wait(std::time::Instant::now()));
        buffers.clear();
        assert!(release.wait(std::time::Instant::now()));
    }

    /// The pin that is kept is the view's, and no longer than the view has it.
    #[test]
    fn recycled_buffers_keep_what_the_view_holds() {
        let shared = Arc::new(SharedTable::default());
        for iova in [0x1000, 0x8000] {
            shared.map(Mapping::of_file(iova, 0x1000, Access::READ, memory_file(0x1000), 0).unwrap()).unwrap();
        }
        let mut memory = GuestMemory::new(Arc::clone(&shared));
        let mut buffers = PinnedBuffers::default();
        memory.pin(0x1000, 16, Access::READ, &mut buffers).unwrap();
        let first = buffers.pin.clone().unwrap();
        buffers.recycle(&memory);
        assert!(buffers.iovecs().is_empty());
        assert!(buffers.pin.as_ref().is_some_and(|pin| Arc::ptr_eq(pin, &first)));
        // Another mapping takes its place, and is the only one then.
        memory.pin(0x8000, 16, Access::READ, &mut buffers).unwrap();
        buffers.recycle(&memory);
        memory.pin(0x8000, 16, Access::READ, &mut buffers).unwrap();
        assert!(buffers.more_pins.is_empty());
        let second = buffers.pin.clone().unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        memory.refresh();
        buffers.recycle(&memory);
        assert!(buffers.pin.is_none(), "the view holds nothing");
    }
}
