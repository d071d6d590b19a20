//! Blocks in a file or a block device, through io_uring.
//!
//! With [`Cache::None`] the data goes past the page cache (`O_DIRECT`), which has rules about alignment that a guest
//! need not know. Requests that break them are served nevertheless, in one of two ways:
//! - Where only the guest's memory is not aligned, through aligned memory of our own.
//! - Where offset or length is no multiple of the store's block, through a second descriptor that uses the page
//!   cache. The kernel keeps the two coherent: a direct read first writes back what the cache holds dirty of its range,
//!   a direct write drops what the cache holds of it, before and after. What it cannot keep coherent are a direct and a
//!   buffered write of *different* parts of one page at the same time, since the buffered one brings the whole page
//!   with it. There are none: where a block is as large as a page, a direct write that shares a page with another
//!   request shares bytes with it, which no guest expects to work; where a block is a sector, every request is a
//!   multiple of it. (With pages above 4096 bytes, and blocks larger than a sector, guests do have to keep to the
//!   blocks.) Nor does the cache read ahead, which would bring neighbours in.
//!
//! That is why unaligned memory must not take the second way too: its neighbours in the page may be in flight.

mod device_size;
mod error;
mod geometry;
mod open;
mod resize;
mod rewrite;
mod transfer;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

pub(crate) use device_size::{DeviceSize, Sizes};
pub use error::{OpenError, OpenFailure};
pub(super) use geometry::{Alignment, Device, MAX_ALIGNMENT, Page};
pub(super) use rewrite::{RewriteError, free};
use transfer::{Shared, Transfer};

use super::lock::FileLock;
use super::uring::{Client, Uring};
use super::{Backend, Completion, Full, Io, Service, Store, StoreInfo};

/// Which way the data goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Past the page cache, where the file system allows; where it does not, a line in the log says so.
    #[default]
    None,
    /// Through the page cache.
    Writeback,
    /// Through the page cache. That writes are on stable storage when they complete is the caller's part, who marks
    /// each as durable; to the store it is the same as `Writeback`.
    Writethrough,
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Whether to refrain from all changes.
    pub read_only: bool,
    /// Which way the data goes.
    pub cache: Cache,
    /// Bytes: what a file that exists must have, and a sparse file is created with if there is none.
    pub size: Option<u64>,
    /// Whether guest memory that data goes to and comes from is pinned for as long as the client has it, in place of for
    /// each request. Helps direct I/O only. See the module `uring::memory` for what pinned memory means to a guest.
    pub fixed_buffers: bool,
    /// Whether completions of direct reads and writes are looked for in the device's polled queues, in place of interrupts.
    pub iopoll: bool,
}

/// A file or a block device.
///
/// Flush and durable writes are as durable as `fdatasync` and `RWF_DSYNC` on it.
#[derive(Debug)]
pub struct FileStore(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    /// Goes through the page cache.
    file: File,
    /// Goes past it.
    direct: Option<Direct>,
    info: StoreInfo,
    fixed_buffers: bool,
    iopoll: bool,
    /// Whether it is no block device that discards, or the kernel has no way to ask for that (before Linux 6.12).
    no_discard: AtomicBool,
    /// Whether the file has said that it cannot free bytes.
    no_punch_hole: AtomicBool,
    /// Whether the file has said that it cannot zero bytes.
    no_zero_range: AtomicBool,
    /// Bytes; those of `info` are what it had when it was opened.
    capacity: AtomicU64,
    /// Held against others that use the file.
    lock: Option<FileLock>,
}

#[derive(Debug)]
struct Direct {
    file: File,
    alignment: Alignment,
}

impl Opened {
    /// The file that most operations use.
    fn main(&self) -> &File {
        self.direct.as_ref().map_or(&self.file, |direct| &direct.file)
    }

    /// What a range of the file can be moved by past the page cache.
    fn direct_for(&self, offset: u64, len: u64) -> Option<&Direct> {
        let fits = |direct: &&Direct| (offset | len) & (direct.alignment.offset as u64 - 1) == 0;
        self.direct.as_ref().filter(fits)
    }
}

impl FileStore {
    /// Opens a store, or creates it.
    ///
    /// A writable block device is opened exclusively, so that one which is mounted is refused; a regular file is
    /// locked against other servers and QEMU, where its file system has locks.
    ///
    /// # Errors
    /// If it cannot be served.
    pub fn open(options: &FileOptions) -> Result<Self, OpenError> {
        match Opened::new(options) {
            Ok(opened) => Ok(Self(Arc::new(opened))),
            Err(reason) => Err(OpenError { path: options.path.clone(), reason }),
        }
    }

    /// Its descriptor that goes through the page cache.
    pub(in crate::backend) fn buffered(&self) -> &File {
        &self.0.file
    }
}

impl Store for FileStore {
    fn info(&self) -> StoreInfo {
        StoreInfo { capacity: self.0.capacity(), ..self.0.info.clone() }
    }

    fn attach(&self, ring: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        if self.0.iopoll && !ring.has_polled_lane() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this store needs a ring for polled completions"));
        }
        Ok(Box::new(FileBackend { client: Client::new(ring, Shared::new(&self.0, ring))? }))
    }

    fn flush(&self) -> io::Result<()> {
        self.0.file.sync_data()
    }

    fn max_queues(&self) -> u16 {
        u16::MAX
    }

    fn service(&self) -> Option<Service> {
        None
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        self.0.resize(capacity)
    }
}

struct FileBackend {
    client: Client<Transfer>,
}

impl Backend for FileBackend {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        let transfer = Transfer::new(io, self.client.context());
        self.client.start(transfer).map_err(|transfer| Full(transfer.into_io()))
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.client.reap(|transfer| done.push(transfer.into_completion()));
    }

    fn in_flight(&self) -> usize {
        self.client.in_flight()
    }
}

#[cfg(test)]
mod tests;
