//! Opening a file or a block device.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use super::error::OpenFailure;
use super::geometry::{Alignment, Device, MAX_ALIGNMENT, has_polled_queues};
use super::{Cache, Direct, FileOptions, Opened};
use crate::backend::lock::{Access, Busy, FileLock};
use crate::backend::uring::can_poll;
use crate::backend::{SECTOR, StoreInfo};

/// Bytes of the largest block of a file system that is worth a guest's while.
const MAX_PREFERRED: u32 = 65536;

impl Opened {
    pub(super) fn new(options: &FileOptions) -> Result<Self, OpenFailure> {
        if let Some(size) = options.size.filter(|size| *size == 0 || !size.is_multiple_of(SECTOR)) {
            return Err(OpenFailure::Size(size));
        }
        let file = open_buffered(options)?;
        let metadata = file.metadata().map_err(OpenFailure::at("cannot look at it"))?;
        let device = if metadata.file_type().is_block_device() {
            Some(Device::of(&file, &metadata).map_err(OpenFailure::at("cannot ask the device for its size"))?)
        } else if metadata.is_file() {
            None
        } else {
            return Err(OpenFailure::NotAStore);
        };
        let capacity = device.as_ref().map_or(metadata.len(), |device| device.capacity);
        check_capacity(capacity, options.size)?;
        let lock = if device.is_none() { lock(&file, options.read_only)? } else { None };
        let direct = match options.cache {
            Cache::None => open_direct(options, &metadata, capacity)?,
            Cache::Writeback | Cache::Writethrough => None,
        };
        if options.iopoll {
            check_polled(direct.as_ref(), &metadata)?;
        }
        if direct.is_some() {
            // For the coherence of the two descriptors; see the module. Not a failure of the store if it fails.
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        }

        // What moves without more ado: whole blocks past the page cache, anything through it.
        let logical = device.as_ref().map_or(SECTOR as u32, |device| device.logical_block_size);
        let direct_block = direct.as_ref().map_or(SECTOR as u32, |direct| direct.alignment.offset as u32);
        let block_size = Some(logical.max(direct_block))
            .filter(|size| size.is_power_of_two() && capacity.is_multiple_of(u64::from(*size)))
            .unwrap_or(SECTOR as u32);
        let preferred = match &device {
            Some(device) => device.physical_block_size,
            None => u32::try_from(metadata.blksize()).unwrap_or(u32::MAX).min(MAX_PREFERRED),
        };
        let optimal = device.as_ref().map_or(0, |device| device.optimal_io_size);
        let frees = !options.read_only
            && match &device {
                Some(device) => device.frees,
                None => can_punch_holes(&file, capacity),
            };
        let discards = !options.read_only && device.as_ref().is_some_and(|device| device.discards);
        let info = StoreInfo {
            capacity,
            block_size,
            physical_block_size: if preferred.is_power_of_two() { preferred.max(block_size) } else { block_size },
            optimal_io_size: if optimal.is_multiple_of(block_size) { optimal } else { 0 },
            read_only: options.read_only,
            discard: frees || discards,
            write_zeroes_unmap: frees,
        };
        let (no_punch_hole, no_zero_range) = (AtomicBool::new(!frees), AtomicBool::new(false));
        let no_discard = AtomicBool::new(!discards);
        let (fixed_buffers, iopoll) = (options.fixed_buffers, options.iopoll);
        let capacity = AtomicU64::new(capacity);
        Ok(Self { file, direct, info, fixed_buffers, iopoll, no_discard, no_punch_hole, no_zero_range, capacity, lock })
    }
}

fn check_capacity(found: u64, wanted: Option<u64>) -> Result<(), OpenFailure> {
    match wanted {
        Some(wanted) if wanted != found => Err(OpenFailure::SizeDiffers { found, wanted }),
        _ if found == 0 => Err(OpenFailure::Empty),
        _ if !found.is_multiple_of(SECTOR) => Err(OpenFailure::Unaligned(found)),
        _ => Ok(()),
    }
}

/// Opens, or creates, for access through the page cache.
fn open_buffered(options: &FileOptions) -> Result<File, OpenFailure> {
    let path = &options.path;
    let refused = |error: io::Error| match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenFailure::Permission { read_only: options.read_only },
        _ => OpenFailure::at("cannot open it")(error),
    };
    let kind = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !options.read_only => {
            return create(path, options.size.ok_or(OpenFailure::Missing)?).map_err(refused);
        }
        Err(error) => return Err(refused(error)),
    };
    // Checked before it is opened: opening a pipe waits for its other end.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenFailure::NotAStore);
    }
    // Exclusive: on a block device that means against mounts and other exclusive users; else nothing without O_CREAT.
    let exclusive = if kind.is_block_device() && !options.read_only { libc::O_EXCL } else { 0 };
    OpenOptions::new().read(true).write(!options.read_only).custom_flags(exclusive).open(path).map_err(refused)
}

/// Creates a sparse file.
fn create(path: &Path, size: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.set_len(size).inspect_err(|_| {
        // Nothing is in it yet, and it would be taken for a store of another size the next time.
        let _ = fs::remove_file(path);
    })?;
    Ok(file)
}

/// Opens the same file again, past the page cache; `None` where that does not work.
fn open_direct(options: &FileOptions, of: &fs::Metadata, capacity: u64) -> Result<Option<Direct>, OpenFailure> {
    let path = &options.path;
    let opened = OpenOptions::new().read(true).write(!options.read_only).custom_flags(libc::O_DIRECT).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            log::warn!("{}: its file system has no direct I/O; it goes through the page cache", path.display());
            return Ok(None);
        }
        Err(error) => return Err(OpenFailure::at("cannot open it for direct I/O")(error)),
    };
    let metadata = file.metadata().map_err(OpenFailure::at("cannot look at it"))?;
    if (metadata.dev(), metadata.ino()) != (of.dev(), of.ino()) {
        return Err(OpenFailure::Replaced);
    }
    match Alignment::of(&file, capacity) {
        Some(alignment) => Ok(Some(Direct { file, alignment })),
        None => {
            log::warn!(
                "{}: direct I/O does not work, or not in blocks of {MAX_ALIGNMENT} bytes or less; \
                 it goes through the page cache",
                path.display()
            );
            Ok(None)
        }
    }
}

/// Refuses a file without polled queues, by which completions could be looked for.
fn check_polled(direct: Option<&Direct>, metadata: &fs::Metadata) -> Result<(), OpenFailure> {
    let Some(direct) = direct else { return Err(OpenFailure::NoPolledQueues) };
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    // Some kernels read all the same, and are interrupted.
    if has_polled_queues(device) == Some(false) {
        return Err(OpenFailure::NoPolledQueues);
    }
    can_poll(&direct.file).map_err(|error| match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL) => OpenFailure::NoPolledQueues,
        _ => OpenFailure::at("cannot read it by polling")(error),
    })
}

/// Locks a regular file, if its file system can.
fn lock(file: &File, read_only: bool) -> Result<Option<FileLock>, OpenFailure> {
    let access = if read_only { Access::Shared } else { Access::Exclusive };
    FileLock::take(file, access).map_err(OpenFailure::at("cannot lock it"))?.map_err(|Busy| OpenFailure::Busy)
}

/// Whether a regular file can get holes. Asks for one after its end, where there is nothing to lose.
fn can_punch_holes(file: &File, capacity: u64) -> bool {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    i64::try_from(capacity).is_ok_and(|end| fallocate(file, flags, end, SECTOR as i64).is_ok())
}
