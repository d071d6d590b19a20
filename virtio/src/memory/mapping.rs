//! One IOVA range and the bytes behind it.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::file::{MemoryFile, MemoryFileError};

/// What the device may do with a range, or wants to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The device reads: guest memory to device.
    pub read: bool,
    /// The device writes: device to guest memory.
    pub write: bool,
}

impl Access {
    /// The device reads.
    pub const READ: Self = Self { read: true, write: false };
    /// The device writes.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Both.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    pub(super) fn allows(self, wanted: Self) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }
}

/// Why a range cannot become a [`Mapping`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// Empty, or beyond the end of the address space.
    #[error("the range {iova:#x}+{len:#x} is empty or wraps")]
    Range {
        /// First address.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Address, length or file offset is no multiple of 4096.
    #[error("the range {iova:#x}+{len:#x} at file offset {offset:#x} is not aligned to 4096 bytes")]
    Unaligned {
        /// First address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Offset in the file, in bytes.
        offset: u64,
    },
    /// The device is to write a file that was opened for reading.
    #[error("the range is writable, but its file was opened read-only")]
    ReadOnlyFile,
    /// The file cannot serve.
    #[error(transparent)]
    File(#[from] MemoryFileError),
}

/// Smallest unit of a mapping, in bytes (`pgsizes` of the protocol).
pub(super) const PAGE: u64 = 4096;

/// One IOVA range, and the bytes behind it where the client gave a file for them.
pub struct Mapping {
    iova: u64,
    len: u64,
    access: Access,
    host: Option<Host>,
    release: Arc<Release>,
}

struct Host {
    file: Arc<MemoryFile>,
    offset: u64,
}

impl Mapping {
    /// The range `iova..iova + len`, backed by `file` from byte `offset` on.
    ///
    /// # Errors
    /// If the range is empty, wraps, is not aligned to 4096 bytes, or the file does not serve it.
    pub fn of_file(
        iova: u64,
        len: u64,
        access: Access,
        file: Arc<MemoryFile>,
        offset: u64,
    ) -> Result<Self, MappingError> {
        Self::check(iova, len, offset)?;
        let end = offset.checked_add(len).ok_or(MappingError::Range { iova: offset, len })?;
        if end > file.len() {
            return Err(MemoryFileError::TooShort { len: file.len(), end }.into());
        }
        if access.write && !file.writable() {
            return Err(MappingError::ReadOnlyFile);
        }
        Ok(Self { iova, len, access, host: Some(Host { file, offset }), release: Arc::default() })
    }

    /// A range without bytes that we could reach: the client gave no file with it.
    ///
    /// # Errors
    /// If the range is empty, wraps or is not aligned to 4096 bytes.
    pub fn unreachable(iova: u64, len: u64, access: Access) -> Result<Self, MappingError> {
        Self::check(iova, len, 0)?;
        Ok(Self { iova, len, access, host: None, release: Arc::default() })
    }

    fn check(iova: u64, len: u64, offset: u64) -> Result<(), MappingError> {
        // The last byte must have an address; the end, one past it, need not.
        if len.checked_sub(1).and_then(|to_last| iova.checked_add(to_last)).is_none() {
            return Err(MappingError::Range { iova, len });
        }
        if !(iova.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && offset.is_multiple_of(PAGE)) {
            return Err(MappingError::Unaligned { iova, len, offset });
        }
        Ok(())
    }

    /// First address.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Length in bytes, at least one page.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Last address; the end may have none.
    pub fn last(&self) -> u64 {
        self.iova.wrapping_add(self.len).wrapping_sub(1)
    }

    /// Whether the client gave a file with the range.
    pub fn is_reachable(&self) -> bool {
        self.host.is_some()
    }

    /// What the device may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Tells when the last holder has let go of this mapping.
    pub fn release(&self) -> Arc<Release> {
        Arc::clone(&self.release)
    }

    /// The host address of `iova` and how many bytes follow in this mapping; `None` outside, without a file,
    /// or when the access is not granted.
    #[inline]
    pub(super) fn host(&self, iova: u64, access: Access) -> Option<(*mut u8, u64)> {
        let offset = iova.checked_sub(self.iova)?;
        let left = self.len.checked_sub(offset).filter(|left| *left > 0)?;
        let host = self.host.as_ref()?;
        if !self.access.allows(access) {
            return None;
        }
        // `of_file` checked that the whole range lies within the mapped file, so this neither wraps nor leaves it.
        Some((host.file.as_ptr().wrapping_add(host.offset.wrapping_add(offset) as usize), left))
    }

    /// The file behind it.
    #[inline]
    pub(super) fn file(&self) -> Option<&Arc<MemoryFile>> {
        self.host.as_ref().map(|host| &host.file)
    }

    /// The file and the offset in it of `iova`, for a second mapping of the same bytes.
    pub(super) fn file_at(&self, iova: u64) -> Option<(&MemoryFile, u64)> {
        let host = self.host.as_ref()?;
        Some((&host.file, host.offset.checked_add(iova.checked_sub(self.iova)?)?))
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x}+{:#x})", self.iova, self.len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.release.done();
    }
}

/// Says when a [`Mapping`] is gone: when the last queue, ring and request let go of it.
#[derive(Debug, Default)]
pub struct Release {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Release {
    fn done(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits until the mapping is gone or `deadline` has passed; says whether it is gone.
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !*done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            done = self.changed.wait_timeout(done, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::memory::testing::memory_file;

    #[test]
    fn ranges_are_checked() {
        let file = memory_file(0x4000);
        let map = |iova, len, offset| Mapping::of_file(iova, len, Access::READ_WRITE, file.clone(), offset);
        assert!(map(0x1000, 0x4000, 0).is_ok());
        assert!(map(u64::MAX - 0xfff, 0x1000, 0).is_ok(), "the very last page");
        assert!(matches!(map(0, 0, 0), Err(MappingError::Range { .. })));
        assert!(matches!(map(u64::MAX - 0xfff, 0x2000, 0), Err(MappingError::Range { .. })));
        assert!(matches!(map(0x800, 0x1000, 0), Err(MappingError::Unaligned { .. })));
        assert!(matches!(map(0, 0x1800, 0), Err(MappingError::Unaligned { .. })));
        assert!(matches!(map(0, 0x1000, 0x10), Err(MappingError::Unaligned { .. })));
        assert!(matches!(map(0, 0x2000, 0x3000), Err(MappingError::File(MemoryFileError::TooShort { .. }))));
        assert!(matches!(map(0, 0x2000, u64::MAX - 0xfff), Err(MappingError::Range { .. })));
    }

    #[test]
    fn access_and_bounds_are_kept() {
        let mapping = Mapping::of_file(0x1_0000, 0x2000, Access::READ, memory_file(0x4000), 0x1000).unwrap();
        assert_eq!(mapping.host(0x1_0000, Access::READ).map(|(_, left)| left), Some(0x2000));
        assert_eq!(mapping.host(0x1_1fff, Access::READ).map(|(_, left)| left), Some(1));
        assert!(mapping.host(0x1_2000, Access::READ).is_none());
        assert!(mapping.host(0xffff, Access::READ).is_none());
        assert!(mapping.host(0x1_0000, Access::WRITE).is_none());
    }

    #[test]
    fn release_follows_the_last_holder() {
        let first = Arc::new(Mapping::unreachable(0, 0x1000, Access::READ).unwrap());
        let second = Arc::clone(&first);
        let release = first.release();
        drop(first);
        assert!(!release.wait(Instant::now()));
        let waiter = std::thread::spawn(move || release.wait(Instant::now() + Duration::from_secs(60)));
        drop(second);
        assert!(waiter.join().unwrap());
    }
}
