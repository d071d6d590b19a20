//! Blocks in an image: a file whose format says where in it each block is, and which other files lie below.
//!
//! The formats are read and written by the crate imago, which blocks: an image has threads of its own, see
//! [`threads`](super::threads). Between the guest's memory, which changes under everybody's hands, and imago, which wants
//! Rust's slices, lies memory of our own that the data is copied through.

mod chain;
mod dirty_bit;
mod error;
mod layer_file;
mod qcow2_header;
mod resize;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::io_buffers::IoBuffer;

use chain::{Image, LayerFormat, Opened};
use dirty_bit::DirtyBit;
pub use error::{ImageError, ImageFailure};

use super::file::{Cache, OpenFailure};
use super::immediate::Execute;
use super::lock::Access;
use super::threads::Threads;
use super::uring::Uring;
use super::{Backend, Io, Op, SECTOR, Service, Store, StoreInfo};
use crate::sandbox::Entrance;

/// Threads of an image: operations that it does at the same time.
const THREADS: usize = 8;
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// What the memory for that is aligned to: what direct I/O asks for at most.
const PIECE_ALIGNMENT: usize = 4096;
/// Bytes of the block that is said to be preferred.
const PREFERRED: u32 = 4096;

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// QEMU's.
    Qcow2,
    /// `VMware`'s, where a text file names files of plain blocks; to be read only.
    Vmdk,
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The image.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// Whether to refrain from all changes.
    pub read_only: bool,
    /// Which way the data of all files of the image goes.
    pub cache: Cache,
    /// Bytes: what an image that exists must have, and a qcow2 image is created with if there is none.
    pub size: Option<u64>,
}

/// An image.
///
/// Flush and durable writes put the image's tables into its file, and then are as durable as `fdatasync` on it.
pub struct ImageStore {
    threads: Threads<Disk>,
    info: StoreInfo,
    /// Bytes; those of `info` are what it had when it was opened.
    capacity: AtomicU64,
}

impl ImageStore {
    /// Opens an image and all that lies below it, or creates it. Its threads enter the sandbox before they do anything.
    ///
    /// The image is locked against other servers and QEMU, and so are the files below it, against those who would change
    /// them.
    ///
    /// # Errors
    /// If it cannot be served.
    pub(crate) fn open(options: &ImageOptions, entrance: &Entrance) -> Result<Self, ImageError> {
        let path = &options.path;
        let error = |reason| ImageError { path: path.clone(), child: None, reason };
        if let Some(size) = options.size.filter(|size| *size == 0 || !size.is_multiple_of(SECTOR)) {
            return Err(error(OpenFailure::Size(size).into()));
        }
        let format = match options.format {
            Format::Qcow2 => LayerFormat::Qcow2,
            Format::Vmdk => LayerFormat::Vmdk,
        };
        if let (Some(size), Format::Qcow2, false) = (options.size, options.format, options.read_only)
            && !path.exists()
        {
            chain::create(path, size)?;
        }
        let access = if options.read_only { Access::Shared } else { Access::Exclusive };
        let opened = chain::open(path, format, access, options.cache == Cache::None)?;
        let (found, info) = (opened.capacity, info(&opened, options.read_only));
        if let Some(wanted) = options.size.filter(|wanted| *wanted != found) {
            return Err(error(OpenFailure::SizeDiffers { found, wanted }.into()));
        }
        let mark = opened.to_mark.map(DirtyBit::set).transpose();
        let mark = mark.map_err(|reason| error(ImageFailure::Format(reason)))?;
        let disk = Disk {
            image: RwLock::new(opened.image),
            pieces: Mutex::default(),
            cluster_size: opened.cluster_size.into(),
            mark,
            half_done: AtomicBool::new(false),
        };
        let threads = Threads::start(disk, &name(path), THREADS, entrance);
        let threads = threads.map_err(|reason| error(ImageFailure::Threads(reason)))?;
        Ok(Self { threads, capacity: AtomicU64::new(info.capacity), info })
    }
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn info(opened: &Opened, read_only: bool) -> StoreInfo {
    let capacity = opened.capacity;
    let block_size = u32::try_from(opened.file_block_size).unwrap_or(SECTOR as u32).max(SECTOR as u32);
    let block_size = if capacity.is_multiple_of(block_size.into()) { block_size } else { SECTOR as u32 };
    StoreInfo {
        capacity,
        block_size,
        physical_block_size: PREFERRED.max(block_size),
        optimal_io_size: if opened.cluster_size.is_multiple_of(block_size) { opened.cluster_size } else { 0 },
        read_only,
        discard: opened.to_mark.is_some(),
        write_zeroes_unmap: opened.to_mark.is_some(),
    }
}

impl Store for ImageStore {
    fn info(&self) -> StoreInfo {
        StoreInfo { capacity: self.capacity.load(Ordering::Relaxed), ..self.info.clone() }
    }

    /// Needs no ring of the kernel's.
    fn attach(&self, ring: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        self.threads.attach(ring)
    }

    fn flush(&self) -> io::Result<()> {
        self.threads.flush()
    }

    fn max_queues(&self) -> u16 {
        u16::MAX
    }

    fn service(&self) -> Option<Service> {
        None
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        let (now, block) = (self.info().capacity, u64::from(self.info.block_size));
        // It is locked against all others: nobody but us gives it another size.
        let wanted = capacity.unwrap_or(now);
        if wanted == 0 || !wanted.is_multiple_of(block) {
            let why = format!("{wanted} bytes: it must be a multiple of its block, {block}, and not zero");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        if wanted != now {
            self.threads.call("another size", move |disk| disk.resize(now, wanted))?;
            self.capacity.store(wanted, Ordering::Relaxed);
        }
        Ok(wanted)
    }
}

/// An image, on its threads.
struct Disk {
    /// Written by operations that free clusters or make zeroes of them: nobody may be at work on the first, and of the second
    /// imago looks first whether the rest of a cluster is zero too, and nobody may write it meanwhile.
    image: RwLock<Image>,
    /// Memory for the next operations, as much as threads have used at the same time.
    pieces: Mutex<Vec<IoBuffer>>,
    /// Bytes that are allocated together.
    cluster_size: u64,
    /// Where the image is open to be written.
    mark: Option<DirtyBit>,
    /// An operation has panicked.
    half_done: AtomicBool,
}

impl Disk {
    fn image(&self) -> RwLockReadGuard<'_, Image> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `each` with memory for a piece of `len` bytes at a time, and where the piece begins.
    fn in_pieces(&self, len: u64, mut each: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<()> {
        let spare = || self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = spare().pop();
        let mut piece = piece.map_or_else(|| IoBuffer::new(PIECE, PIECE_ALIGNMENT), Ok)?;
        let mut done = 0;
        while done < len {
            let bytes = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            each(piece.as_mut_range(0..bytes).into_slice(), done)?;
            done += bytes as u64;
        }
        spare().push(piece);
        Ok(())
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Image> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.image();
        image.flush()?;
        image.sync()
    }
}

impl Execute for Disk {
    fn execute(&self, io: &Io) -> io::Result<()> {
        let _watch = Watch(&self.half_done);
        let durable = match io.op {
            Op::Read { offset } => {
                return self.in_pieces(io.buffers.len(), |piece, done| {
                    self.image().read(&mut *piece, offset.saturating_add(done))?;
                    io.buffers.copy_from_slice(done, piece);
                    Ok(())
                });
            }
            Op::Write { offset, durable } => {
                self.in_pieces(io.buffers.len(), |piece, done| {
                    io.buffers.copy_to_slice(done, piece);
                    self.image().write(&*piece, offset.saturating_add(done))
                })?;
                durable
            }
            Op::WriteZeroes { offset, len, unmap, durable } => {
                let mut image = self.alone();
                if unmap { image.discard_to_zero(offset, len) } else { image.write_zeroes(offset, len) }?;
                durable
            }
            Op::Discard { offset, len } => return self.alone().discard_to_any(offset, len),
            Op::Flush => true,
        };
        if durable { self.flush() } else { Ok(()) }
    }
}

/// Sees an operation panic.
struct Watch<'a>(&'a AtomicBool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Disk {
    /// Closes the image, on the last of its threads. One that may be wrong stays marked.
    fn drop(&mut self) {
        let Some(mark) = &self.mark else { return };
        if self.half_done.load(Ordering::Relaxed) {
            return;
        }
        let closed = catch_unwind(AssertUnwindSafe(|| self.flush().and_then(|()| mark.clear())));
        if !matches!(closed, Ok(Ok(()))) {
            log::error!("{}: cannot close the image: {closed:?}", self.image());
        }
    }
}
