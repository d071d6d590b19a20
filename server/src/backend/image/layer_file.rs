//! A file that an image is made of, as the image's format wants it.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, fs};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt, StorageOpenOptions};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{preadv, pwritev};

use crate::backend::file::{Alignment, Device, MAX_ALIGNMENT, OpenFailure, Page};
use crate::backend::lock::{Access, Busy, FileLock};

/// Pieces of a scatter list that the kernel takes at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Zeroes, aligned.
static ZEROES: Page = Page::ZERO;

/// An open file, or block device, which is locked. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct LayerFile(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    file: File,
    path: PathBuf,
    identity: (u64, u64),
    /// What direct I/O asks for: 1 and 1 without.
    memory_alignment: usize,
    offset_alignment: usize,
    /// Bytes. Only grows, but for [`resize`](Storage::resize).
    size: AtomicU64,
    resizable: bool,
    order: CommonStorageHelper,
    /// The first bytes, while they are [held back](LayerFile::hold_back): `HELD` at most.
    held: Mutex<Option<Vec<u8>>>,
    _lock: Option<FileLock>,
}

/// How many bytes are held back at most.
const HELD: usize = MAX_ALIGNMENT;

impl LayerFile {
    /// Opens a file that exists, and locks it.
    ///
    /// # Errors
    /// If it cannot be used.
    pub(super) fn open(path: &Path, access: Access, direct: bool) -> Result<Self, OpenFailure> {
        let read_only = access == Access::Shared;
        let refused = |error: io::Error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenFailure::Permission { read_only },
            _ => OpenFailure::at("cannot open it")(error),
        };
        let kind = fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenFailure::NotAStore);
        }
        let exclusive = if kind.is_block_device() && !read_only { libc::O_EXCL } else { 0 };
        let with = |flags| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
        let (file, direct) = match with(exclusive | if direct { libc::O_DIRECT } else { 0 }) {
            Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
                log::warn!("{}: its file system has no direct I/O; it goes through the page cache", path.display());
                (with(exclusive).map_err(refused)?, false)
            }
            opened => (opened.map_err(refused)?, direct),
        };
        Self::of(file, path, access, direct)
    }

    /// Creates an empty file, and locks it.
    pub(super) fn create(path: &Path) -> Result<Self, OpenFailure> {
        let refused = |error: io::Error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenFailure::Permission { read_only: false },
            _ => OpenFailure::at("cannot create it")(error),
        };
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(refused)?;
        Self::of(file, path, Access::Exclusive, false)
    }

    fn of(file: File, path: &Path, access: Access, direct: bool) -> Result<Self, OpenFailure> {
        let metadata = file.metadata().map_err(OpenFailure::at("cannot look at it"))?;
        let device = metadata.file_type().is_block_device();
        let size = if device {
            Device::of(&file, &metadata).map_err(OpenFailure::at("cannot ask the device for its size"))?.capacity
        } else {
            metadata.len()
        };
        let lock = if device {
            None
        } else {
            let lock = FileLock::take(&file, access).map_err(OpenFailure::at("cannot lock it"))?;
            lock.map_err(|Busy| OpenFailure::Busy)?
        };
        let (memory_alignment, offset_alignment) = if direct {
            // As large as it may be, where that is not to be found out.
            Alignment::of(&file, size).map_or((4096, 4096), |alignment| (alignment.memory, alignment.offset))
        } else {
            (1, 1)
        };
        Ok(Self(Arc::new(Opened {
            path: path.to_owned(),
            identity: identity(&metadata),
            memory_alignment,
            offset_alignment,
            size: AtomicU64::new(size),
            resizable: !device,
            order: CommonStorageHelper::default(),
            held: Mutex::new(None),
            file,
            _lock: lock,
        })))
    }

    /// What no other file than the one at `path` has; `None` if there is none.
    pub(super) fn identity_of(path: &Path) -> Option<(u64, u64)> {
        fs::metadata(path).ok().map(|metadata| identity(&metadata))
    }

    /// What no other file has.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.0.identity
    }

    pub(super) fn len(&self) -> u64 {
        self.0.size.load(Ordering::Relaxed)
    }

    /// Bytes of the blocks that it is read and written in.
    pub(super) fn block_size(&self) -> usize {
        self.0.offset_alignment
    }

    /// Holds the first `len` bytes back, and the rest of their block: until they are [let go](Self::let_go), they are written
    /// and read in memory, and the file keeps what it has.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(super) fn hold_back(&self, len: usize) -> io::Result<()> {
        let mut bytes = vec![0; len.next_multiple_of(self.block_size()).min(HELD)];
        self.read(&mut bytes[..], 0)?;
        *self.held() = Some(bytes);
        Ok(())
    }

    /// Holds nothing back any more; what would be in the file by now if it had not been held back, and is not.
    pub(super) fn let_go(&self) -> Vec<u8> {
        self.held().take().unwrap_or_default()
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `with` with what is held back from `at` on, if anything is.
    fn of_held(&self, at: u64, with: impl FnOnce(&mut [u8])) {
        // Most of a file is not.
        let Some(at) = usize::try_from(at).ok().filter(|at| *at < HELD) else { return };
        if let Some(held) = self.held().as_mut().and_then(|held| held.get_mut(at..)).filter(|held| !held.is_empty()) {
            with(held);
        }
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let range = i64::try_from(offset).and_then(|offset| Ok((offset, i64::try_from(len)?)));
        let (offset, len) = range.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let result = fallocate(&self.0.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len);
        result.map_err(|errno| match errno {
            // The callers' word for "do it otherwise".
            Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV => io::ErrorKind::Unsupported.into(),
            errno => errno.into(),
        })
    }

    /// The file is at least so long. Its last block before `end` is the caller's, and to be zero.
    fn grow(&self, end: u64) -> io::Result<()> {
        if end <= self.len() {
            return Ok(());
        }
        // By a write, for another thread may write behind it: a length that is set might take that away.
        let (zeroes, _) = ZEROES.0.split_at(self.0.offset_alignment.min(MAX_ALIGNMENT));
        let at = end.saturating_sub(zeroes.len() as u64);
        // SAFETY: the zeroes are static, aligned as direct I/O may ask for, and a multiple of its block; the block is the
        // caller's.
        unsafe { self.pure_writev(IoVector::from(zeroes), at) }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    if metadata.file_type().is_block_device() { (u64::MAX, metadata.rdev()) } else { (metadata.dev(), metadata.ino()) }
}

fn offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Calls until it is not interrupted.
fn uninterrupted(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<u64> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return Ok(result? as u64),
        }
    }
}

impl Storage for LayerFile {
    fn mem_align(&self) -> usize {
        self.0.memory_alignment
    }

    fn req_align(&self) -> usize {
        self.0.offset_alignment
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(beside(&self.0.path, relative.as_ref()))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    unsafe fn pure_readv(&self, mut buffers: IoVectorMut<'_>, mut at: u64) -> io::Result<()> {
        self.of_held(at, |held| {
            let (mut first, rest) = std::mem::take(&mut buffers).split_at(held.len() as u64);
            let len = usize::try_from(first.len()).map_or(held.len(), |len| len.min(held.len()));
            if let Some(held) = held.get(..len) {
                first.copy_from_slice(held);
            }
            (buffers, at) = (rest, at.saturating_add(len as u64));
        });
        while !buffers.is_empty() {
            let place = offset(at)?;
            let mut slices: Vec<IoSliceMut<'_>> = buffers.into_inner();
            let count = slices.len().min(MAX_PIECES);
            let (first, _) = slices.split_at_mut(count);
            let len = uninterrupted(|| preadv(&self.0.file, first, place))?;
            buffers = IoVectorMut::from(slices);
            if len == 0 {
                // The end of the file: what lies behind it is zero.
                buffers.fill(0);
                return Ok(());
            }
            buffers = buffers.split_tail_at(len);
            at = at.saturating_add(len);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, mut buffers: IoVector<'_>, mut at: u64) -> io::Result<()> {
        self.of_held(at, |held| {
            let (first, rest) = std::mem::take(&mut buffers).split_at(held.len() as u64);
            let len = usize::try_from(first.len()).map_or(held.len(), |len| len.min(held.len()));
            if let Some(held) = held.get_mut(..len) {
                first.copy_into_slice(held);
            }
            (buffers, at) = (rest, at.saturating_add(len as u64));
        });
        while !buffers.is_empty() {
            let place = offset(at)?;
            let slices: Vec<IoSlice<'_>> = buffers.into_inner();
            let (first, _) = slices.split_at(slices.len().min(MAX_PIECES));
            let len = uninterrupted(|| pwritev(&self.0.file, first, place))?;
            if len == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at = at.saturating_add(len);
            self.0.size.fetch_max(at, Ordering::Relaxed);
            buffers = IoVector::from(slices).split_tail_at(len);
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.saturating_add(len);
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, len)?;
        self.grow(end)
    }

    unsafe fn pure_write_allocated_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, at, len)?;
        self.grow(at.saturating_add(len))
    }

    unsafe fn pure_discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, len)
    }

    /// There are no buffers of ours.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.file.sync_data()
    }

    /// A write is over when it returns.
    fn settle_writes(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.order
    }

    fn resize(&self, new_size: u64, _: PreallocateMode) -> io::Result<()> {
        if !self.0.resizable {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.0.file.set_len(new_size)?;
        self.0.size.store(new_size, Ordering::Relaxed);
        Ok(())
    }

    /// Files are opened by [`LayerFile::open`].
    fn open(_: StorageOpenOptions) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl fmt::Display for LayerFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.path.display())
    }
}

/// The file that is meant by a name in the file at `path`.
pub(super) fn beside(path: &Path, name: &Path) -> PathBuf {
    path.parent().map_or_else(|| name.to_owned(), |folder| folder.join(name))
}
