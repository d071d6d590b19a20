//! A ring's table of files. Requests on a file in the table spare the kernel to look the descriptor up and to hold the
//! file for each of them.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::rc::Weak;

use io_uring::Submitter;
use io_uring::squeue::Flags;
use io_uring::types::Fd;

use super::lane::Lane;
use super::ring::Ring;

/// Entries of the table, the most that the limit on open files allows.
const ENTRIES: [u32; 3] = [4096, 1024, 256];

/// The table. Files beyond its end, and all files before Linux 5.19, are used by their descriptors.
#[derive(Default)]
pub(super) struct FileTable {
    /// Made with the first file.
    entries: Option<u32>,
    used: u32,
    free: Vec<u32>,
}

impl FileTable {
    /// Puts a file into the table, if there is room; says where.
    pub(super) fn add(&mut self, kernel: &Submitter<'_>, file: BorrowedFd<'_>) -> Option<u32> {
        let entries = *self.entries.get_or_insert_with(|| {
            let made = ENTRIES.into_iter().find(|entries| kernel.register_files_sparse(*entries).is_ok());
            made.unwrap_or_default()
        });
        let entry = self.free.pop().or_else(|| (self.used < entries).then_some(self.used))?;
        match kernel.register_files_update(entry, &[file.as_raw_fd()]) {
            Ok(_) => {
                self.used = self.used.max(entry + 1);
                Some(entry)
            }
            Err(error) => {
                log::debug!("io_uring: a file was not registered: {error}");
                None
            }
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.used as usize - self.free.len()
    }

    /// Takes a file out. Requests that have been submitted keep it open until they are done.
    pub(super) fn remove(&mut self, kernel: &Submitter<'_>, entry: u32) {
        const NONE: RawFd = -1;
        match kernel.register_files_update(entry, &[NONE]) {
            Ok(_) => self.free.push(entry),
            Err(error) => log::error!("io_uring: a file stays registered: {error}"),
        }
    }
}

/// A file's entry in the table of a lane, until this is dropped. Dropped no sooner than the last operation that names it.
#[derive(Debug)]
pub(in crate::backend) struct RegisteredFile {
    pub(super) ring: Weak<RefCell<Ring>>,
    pub(super) lane: Lane,
    pub(super) entry: u32,
}

impl RegisteredFile {
    /// How an operation names it.
    pub(in crate::backend) fn name(&self) -> FileName {
        FileName { fd: Fd(self.entry as i32), flags: Flags::FIXED_FILE }
    }
}

impl Drop for RegisteredFile {
    fn drop(&mut self) {
        // Without the ring there is no table any more.
        if let Some(ring) = self.ring.upgrade()
            && let Ok(mut ring) = ring.try_borrow_mut()
        {
            ring.remove_file(self.lane, self.entry);
        }
    }
}

/// What an entry in the ring calls a file: by descriptor, or by its place in the table.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct FileName {
    pub(in crate::backend) fd: Fd,
    /// To be set on the entry.
    pub(in crate::backend) flags: Flags,
}

impl FileName {
    /// By its descriptor.
    pub(in crate::backend) fn descriptor(file: &impl AsRawFd) -> Self {
        Self { fd: Fd(file.as_raw_fd()), flags: Flags::empty() }
    }
}
