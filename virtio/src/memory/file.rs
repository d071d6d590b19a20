//! A file of guest memory, mapped whole.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use super::fault::{Loss, Watched};

/// Why a descriptor cannot serve as guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryFileError {
    /// Not a regular file (a pipe, a socket, a directory, a device).
    #[error("the descriptor is not a regular, mappable file")]
    NotAFile,
    /// The file does not reach as far as the client says.
    #[error("the file ends at byte {len:#x}, before the end of the range ({end:#x})")]
    TooShort {
        /// Length of the file in bytes.
        len: u64,
        /// End of the range that was asked for, in bytes.
        end: u64,
    },
    /// The system refused.
    #[error("cannot map the file: {0}")]
    Map(#[from] io::Error),
}

/// Which file an open file is, and what for it was opened: two that are equal can be mapped as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    writable: bool,
}

impl FileIdentity {
    /// Tells which file it is, and its length in bytes.
    ///
    /// # Errors
    /// If it is no regular file, or the system does not tell.
    pub fn of(file: &File) -> Result<(Self, u64), MemoryFileError> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(MemoryFileError::NotAFile);
        }
        let mode = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from)?);
        let writable = mode & OFlag::O_ACCMODE == OFlag::O_RDWR;
        Ok((Self { device: metadata.dev(), inode: metadata.ino(), writable }, metadata.len()))
    }
}

/// Whether a file's pages are this machine's memory alone: memfd, tmpfs, hugetlbfs. A page of any other file may be somebody
/// else's to bring, such as a process's that serves a file system (FUSE), and whoever touches it waits for as long as that takes.
///
/// # Errors
/// If the system does not tell.
pub fn is_plain_memory(file: &File) -> Result<bool, MemoryFileError> {
    let kind = fstatfs(file).map_err(io::Error::from)?.filesystem_type();
    Ok([TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&kind))
}

/// A file of guest memory, mapped shared and whole.
///
/// A guest's RAM is one file or a few, while its IOVA ranges can be tens of thousands (a guest with an
/// IOMMU makes and drops one for each buffer): mapping the file once makes each further range a matter of arithmetic, spends
/// no kernel mapping on it, and works for huge pages, where a range need not be aligned to the page size.
pub struct MemoryFile {
    /// Before the region, which it must not outlive.
    watched: Option<Watched>,
    region: MmapRegion,
    identity: FileIdentity,
    on_release: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl MemoryFile {
    /// Maps all of `file`, for writing too if it was opened so.
    ///
    /// # Errors
    /// If it is no regular file, is empty, or the system refuses.
    pub fn map(file: File) -> Result<Self, MemoryFileError> {
        let (identity, len) = FileIdentity::of(&file)?;
        let size = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        if size == 0 {
            return Err(MemoryFileError::TooShort { len, end: 1 });
        }
        let prot = if identity.writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let region =
            MmapRegion::build(Some(FileOffset::new(file, 0)), size, prot, libc::MAP_SHARED | libc::MAP_NORESERVE)
                .map_err(|error| match error {
                    MmapRegionError::Mmap(error) => error,
                    other => io::Error::other(other),
                })?;
        Ok(Self { watched: None, region, identity, on_release: Mutex::default() })
    }

    /// Has `loss` told when an access finds that bytes of the file are gone, and the access go on. It takes
    /// [`outlive_lost_memory`](super::outlive_lost_memory); without, such an access ends the process.
    #[must_use]
    pub fn watched(mut self, loss: &Arc<Loss>) -> Self {
        self.watched = NonNull::new(self.as_ptr()).map(|start| Watched::new(start, self.region.size(), loss));
        self
    }

    /// The same for another mapping of the file's bytes, of which the caller takes care: `len` of them at `start`.
    pub(super) fn watch(&self, start: NonNull<u8>, len: usize) -> Option<Watched> {
        self.watched.as_ref().map(|watched| Watched::new(start, len, watched.loss()))
    }

    /// Whether the file of this identity, which is now `len` bytes long, is this very one, and no longer than what is mapped.
    pub fn is(&self, identity: FileIdentity, len: u64) -> bool {
        identity == self.identity && len <= self.len()
    }

    /// Mapped bytes.
    pub fn len(&self) -> u64 {
        self.region.size() as u64
    }

    /// Whether nothing is mapped; never so, and here because [`len`](Self::len) is.
    pub fn is_empty(&self) -> bool {
        self.region.size() == 0
    }

    /// The open file, for those who want to know what it is.
    pub fn as_file(&self) -> Option<&File> {
        self.region.file_offset().map(FileOffset::file)
    }

    /// Whether the bytes may be written.
    pub fn writable(&self) -> bool {
        self.identity.writable
    }

    /// Where `piece` lies, in bytes from the start of the file; `None` if it is not a part of it.
    #[inline]
    pub fn offset_of(&self, piece: &libc::iovec) -> Option<u64> {
        let offset = piece.iov_base.addr().checked_sub(self.as_ptr().addr())? as u64;
        (offset.checked_add(piece.iov_len as u64)? <= self.len()).then_some(offset)
    }

    /// The bytes from `offset` on, `len` of them or as many as there are, for a system call; valid while `self` lives.
    pub fn piece(&self, offset: u64, len: u64) -> libc::iovec {
        let offset = offset.min(self.len());
        let len = len.min(self.len().saturating_sub(offset));
        libc::iovec { iov_base: self.as_ptr().wrapping_add(offset as usize).cast(), iov_len: len as usize }
    }

    /// Has `hook` run when the last holder lets go of the file, on that one's thread: for those who keep something that
    /// belongs to it and is not mapped memory, such as pages that a kernel has pinned. It must not wait.
    pub fn on_release(&self, hook: impl FnOnce() + Send + 'static) {
        self.on_release.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    /// The first mapped byte.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// The open file, which keeps its mapping's identity.
    pub(super) fn file(&self) -> Option<&File> {
        self.region.file_offset().map(FileOffset::file)
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFile({:#x} bytes)", self.len())
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        for hook in self.on_release.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            hook();
        }
    }
}
