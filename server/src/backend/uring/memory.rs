//! Guest memory as a ring's fixed buffers: its pages are pinned once, not for each request.
//!
//! It follows the files of guest memory and not the IOVA ranges that point into them, so that DMA_MAP and DMA_UNMAP
//! cost nothing here: a request finds its file by the mapping that it owns anyway. A file is registered in
//! pieces, each when a request first touches it, so that memory which is never used for I/O is not pinned and no
//! registration takes long. When the file's last holder lets go, the ring is woken and gives the pieces back, one by one between other
//! work.
//!
//! Pinned pages stay what they are even if the client takes them out of the file (a balloon, a hole): the disk would then
//! read and write pages that the guest does not see any more. QEMU takes none while a vfio-user device is attached. For other
//! clients, and since pinned memory cannot be overcommitted, nothing is registered unless the operator asks for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use io_uring::{Probe, Submitter, opcode};
use virtio::memory::{MemoryFile, PinnedBuffers};

use super::Waker;

/// Bytes of a piece: few enough for the kernel to pin them, and to make those that are sparse, in a millisecond or a few.
const PIECE: u64 = 16 << 20;

/// Pieces of all files of a ring together; the kernel has a limit there (`IORING_MAX_REG_BUFFERS`). Enough for 256 GiB.
const PIECES: u16 = 1 << 14;

/// Files of a ring; guests have one, or one a NUMA node.
const FILES: usize = 16;

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Unused,
    Buffer(u16),
    /// The kernel cannot have it as a buffer.
    Refused,
}

/// A file of guest memory.
struct Area {
    /// Also keeps another file from being taken for it.
    file: Weak<MemoryFile>,
    pieces: Vec<Piece>,
}

/// The kernel's table of buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Unused,
    /// Whether the kernel has requests of several pieces on a buffer (6.15).
    Ready {
        vectored: bool,
    },
    /// It has none, or may not pin more.
    Refused,
}

/// A ring's fixed buffers.
pub(super) struct FixedMemory {
    table: Table,
    areas: Vec<Area>,
    /// The area of the last request.
    last: usize,
    used: u16,
    free: Vec<u16>,
    /// Set when a file is gone.
    stale: Arc<AtomicBool>,
    waker: Waker,
}

impl FixedMemory {
    pub(super) fn new(waker: &Waker) -> Self {
        Self {
            table: Table::Unused,
            areas: Vec::new(),
            last: 0,
            used: 0,
            free: Vec::new(),
            stale: Arc::default(),
            waker: waker.clone(),
        }
    }

    /// The fixed buffer that all pieces of `buffers` lie in, if there is one.
    pub(super) fn buffer(&mut self, kernel: &Submitter<'_>, buffers: &PinnedBuffers) -> Option<u16> {
        let (first, rest) = buffers.iovecs().split_first()?;
        if self.table == Table::Refused || !rest.is_empty() && self.table == (Table::Ready { vectored: false }) {
            return None;
        }
        let file = buffers.file()?;
        let piece = piece_of(file, first)?;
        if rest.iter().any(|other| piece_of(file, other) != Some(piece)) {
            return None;
        }
        let area = self.area(file)?;
        match self.areas.get(area)?.pieces.get(piece).copied().unwrap_or(Piece::Unused) {
            Piece::Buffer(index) => Some(index),
            Piece::Refused => None,
            Piece::Unused => self.register(kernel, area, file, piece),
        }
        // A table that has just been made may not have them.
        .filter(|_| rest.is_empty() || self.table == (Table::Ready { vectored: true }))
    }

    /// Which of the areas `file` is; it becomes one if it was none.
    fn area(&mut self, file: &Arc<MemoryFile>) -> Option<usize> {
        let is = |area: &Area| area.file.as_ptr() == Arc::as_ptr(file);
        if self.areas.get(self.last).is_some_and(is) {
            return Some(self.last);
        }
        self.last = match self.areas.iter().position(is) {
            Some(known) => known,
            None if self.areas.len() < FILES && file.writable() => {
                let (stale, waker) = (Arc::clone(&self.stale), self.waker.clone());
                file.on_release(move || {
                    // Release: the sweep that finds this set finds the file gone.
                    stale.store(true, Ordering::Release);
                    waker.wake();
                });
                self.areas.push(Area { file: Arc::downgrade(file), pieces: Vec::new() });
                self.areas.len() - 1
            }
            None => return None,
        };
        Some(self.last)
    }

    #[cold]
    fn register(&mut self, kernel: &Submitter<'_>, area: usize, file: &Arc<MemoryFile>, piece: usize) -> Option<u16> {
        if self.table == Table::Unused {
            self.table = match kernel.register_buffers_sparse(u32::from(PIECES)) {
                Ok(()) => Table::Ready { vectored: has_vectored(kernel) },
                Err(error) => refused(&error),
            };
        }
        if self.table == Table::Refused {
            return None;
        }
        let index = self.free.pop().or_else(|| (self.used < PIECES).then_some(self.used))?;
        let bytes = file.piece(piece as u64 * PIECE, PIECE);
        // SAFETY: mapped as long as requests on this buffer, which own its file, are in flight. The kernel pins the
        // pages, and looks at the addresses no more.
        let result = unsafe { kernel.register_buffers_update(u32::from(index), &[bytes], None) };
        let became = match result {
            Ok(()) => {
                self.used = self.used.max(index + 1);
                Piece::Buffer(index)
            }
            Err(error) => {
                self.free.push(index);
                self.used = self.used.max(index + 1);
                if error.raw_os_error() != Some(libc::EFAULT) {
                    self.table = refused(&error);
                }
                Piece::Refused
            }
        };
        let pieces = &mut self.areas.get_mut(area)?.pieces;
        if pieces.len() <= piece {
            pieces.resize(piece + 1, Piece::Unused);
        }
        *pieces.get_mut(piece)? = became;
        if let Piece::Buffer(index) = became { Some(index) } else { None }
    }

    /// Whether there may be something to give back.
    #[inline]
    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    /// Gives one piece of a file that is gone back to the system; there may be more then.
    #[cold]
    pub(super) fn sweep(&mut self, kernel: &Submitter<'_>) {
        if !self.stale.swap(false, Ordering::Acquire) {
            return;
        }
        let Some(at) = self.areas.iter().position(|area| area.file.strong_count() == 0) else { return };
        let Some(area) = self.areas.get_mut(at) else { return };
        // Also if this was the last piece: there may be another file.
        self.stale.store(true, Ordering::Relaxed);
        while let Some(piece) = area.pieces.pop() {
            let Piece::Buffer(index) = piece else { continue };
            let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
            // SAFETY: no memory. Requests that have been submitted keep what they use until they are done.
            match unsafe { kernel.register_buffers_update(u32::from(index), &[none], None) } {
                Ok(()) => self.free.push(index),
                Err(error) => log::error!("io_uring: guest memory stays pinned: {error}"),
            }
            return;
        }
        self.areas.swap_remove(at);
    }

    #[cfg(test)]
    pub(super) fn registered(&self) -> usize {
        usize::from(self.used) - self.free.len()
    }
}

/// Which piece of the file holds all of `bytes`.
#[inline]
fn piece_of(file: &MemoryFile, bytes: &libc::iovec) -> Option<usize> {
    let first = file.offset_of(bytes)?;
    let last = first + (bytes.iov_len as u64).saturating_sub(1);
    (first / PIECE == last / PIECE && first / PIECE < u64::from(PIECES)).then_some((first / PIECE) as usize)
}

fn has_vectored(kernel: &Submitter<'_>) -> bool {
    let mut probe = Probe::new();
    kernel.register_probe(&mut probe).is_ok()
        && probe.is_supported(opcode::ReadvFixed::CODE)
        && probe.is_supported(opcode::WritevFixed::CODE)
}

fn refused(error: &std::io::Error) -> Table {
    log::warn!(
        "guest memory cannot be registered as fixed buffers: {error}; requests go without. \
         Locked memory has a limit (ulimit -l)"
    );
    Table::Refused
}
