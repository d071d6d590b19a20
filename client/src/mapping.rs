//! Memory that another process reads and writes at the same time. The only unsafe code of the crate.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::Error;

/// A shared mapping of a file. Unmapped when the last [`SharedSlice`] of it is gone.
pub(crate) struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and all access goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, more than none, from `offset`, a multiple of the page size.
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Arc<Mapping>, Error> {
        let size = NonZeroUsize::new(len).ok_or(Error::OutOfMemory { size: 0 })?;
        let offset = offset.try_into().map_err(|_| Error::Protocol("a mapping beyond any file"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so no memory in use is replaced.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, offset) }
            .map_err(Error::system("map shared memory"))?;
        Ok(Arc::new(Mapping { start, len }))
    }

    /// `count` fields from `offset`.
    pub(crate) fn slice<T: Atomic>(self: &Arc<Mapping>, offset: usize, count: usize) -> Result<SharedSlice<T>, Error> {
        let len = count.saturating_mul(size_of::<T>());
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        if end.is_none() || !offset.is_multiple_of(align_of::<T>()) {
            return Err(Error::OutOfRange { offset, len, size: self.len });
        }
        // SAFETY: `offset` lies within the mapping, or just behind it for no fields.
        let first = unsafe { self.start.byte_add(offset) }.cast();
        Ok(SharedSlice { first, count, mapping: Arc::clone(self) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody else holds the mapping, and it is exactly what was mapped.
        // There is nothing to do about a failure.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// A field of shared memory: an unsigned integer as atomic.
pub trait Atomic: sealed::Sealed {}
impl Atomic for AtomicU8 {}
impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}
impl Atomic for AtomicU64 {}

mod sealed {
    use super::*;

    /// Only types that any bytes make valid and that may change under a shared reference.
    pub trait Sealed {}
    impl Sealed for AtomicU8 {}
    impl Sealed for AtomicU16 {}
    impl Sealed for AtomicU32 {}
    impl Sealed for AtomicU64 {}
}

/// Fields next to each other in shared memory. Keeps the memory mapped.
pub struct SharedSlice<T> {
    first: NonNull<T>,
    count: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: the fields are atomics in memory that belongs to no thread.
unsafe impl<T: Atomic> Send for SharedSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Atomic> Sync for SharedSlice<T> {}

impl<T> Clone for SharedSlice<T> {
    fn clone(&self) -> SharedSlice<T> {
        let mapping = Arc::clone(&self.mapping);
        SharedSlice { first: self.first, count: self.count, mapping }
    }
}

impl<T: Atomic> Deref for SharedSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `Mapping::slice` checked that the fields lie within the mapping and are aligned,
        // and the mapping lives as long as `self`. Any bytes are a valid `T` (`Sealed`), and `T` is an
        // atomic, so other writers break no rule of a shared reference.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

/// Splits bytes into words, with the bytes before and behind them.
fn words(bytes: &[AtomicU8]) -> (&[AtomicU8], &[AtomicU64], &[AtomicU8]) {
    // SAFETY: any bytes are a valid `AtomicU64`, and both types may change under a shared reference.
    unsafe { bytes.align_to() }
}

/// Copies shared bytes to `out`, which is as long. What is written meanwhile may be torn.
pub(crate) fn load(bytes: &[AtomicU8], out: &mut [u8]) {
    let (head, body, tail) = words(bytes);
    let (out_head, rest) = out.split_at_mut(head.len());
    let (out_body, out_tail) = rest.split_at_mut(size_of_val(body));
    let each = |from: &[AtomicU8], to: &mut [u8]| {
        for (from, to) in from.iter().zip(to) {
            *to = from.load(Ordering::Relaxed);
        }
    };
    each(head, out_head);
    for (from, to) in body.iter().zip(out_body.as_chunks_mut().0) {
        *to = from.load(Ordering::Relaxed).to_ne_bytes();
    }
    each(tail, out_tail);
}

/// Copies `from` to shared bytes, as many.
pub(crate) fn store(bytes: &[AtomicU8], from: &[u8]) {
    let (head, body, tail) = words(bytes);
    let (from_head, rest) = from.split_at(head.len());
    let (from_body, from_tail) = rest.split_at(size_of_val(body));
    let each = |to: &[AtomicU8], from: &[u8]| {
        for (to, from) in to.iter().zip(from) {
            to.store(*from, Ordering::Relaxed);
        }
    };
    each(head, from_head);
    for (to, from) in body.iter().zip(from_body.as_chunks().0) {
        to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
    }
    each(tail, from_tail);
}
