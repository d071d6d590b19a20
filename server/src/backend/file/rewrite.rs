//! Writing what was opened to be read only.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::FileStore;
use crate::backend::{SECTOR, Store};

/// Why a store that was opened to be read cannot be written.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum RewriteError {
    /// Others read it.
    #[error("others use it")]
    Busy,
    /// Its file system has no locks, so that others would not be seen.
    #[error("its file system has no locks")]
    NoLocks,
    /// Its name belongs to something else by now.
    #[error("another file has its name by now")]
    Replaced,
    /// The system refuses.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A store that nobody else uses, open to be written.
pub(in crate::backend) struct Rewriting<'a> {
    store: &'a FileStore,
    file: File,
}

impl FileStore {
    /// Opens it a second time, by its path, to write it: a file is locked against all others until the result is dropped, a block
    /// device is opened exclusively.
    ///
    /// # Errors
    /// If there are others, or it cannot be opened so.
    pub(in crate::backend) fn rewrite(&self, path: &Path) -> Result<Rewriting<'_>, RewriteError> {
        let found = self.buffered().metadata()?;
        let is_file = found.is_file();
        let named = fs::metadata(path)?;
        // Before it is opened: to open something else may do something.
        if (named.dev(), named.ino(), named.rdev()) != (found.dev(), found.ino(), found.rdev()) {
            return Err(RewriteError::Replaced);
        }
        let exclusive = if is_file { 0 } else { libc::O_EXCL };
        let file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path)?;
        let opened = file.metadata()?;
        if (opened.dev(), opened.ino(), opened.rdev()) != (found.dev(), found.ino(), found.rdev()) {
            return Err(RewriteError::Replaced);
        }
        if is_file {
            let lock = self.0.lock.as_ref().ok_or(RewriteError::NoLocks)?;
            if !lock.upgrade()? {
                return Err(RewriteError::Busy);
            }
        }
        Ok(Rewriting { store: self, file })
    }
}

impl Rewriting<'_> {
    /// Writes all of `data` at byte `offset`.
    pub(in crate::backend) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes a file longer, and the store with it; what is new is zero. A block device is as long as it is.
    pub(in crate::backend) fn grow(&self, capacity: u64) -> io::Result<()> {
        let (len, before) = (self.file.metadata()?.len(), self.store.info().capacity);
        if len < before || len - before >= SECTOR {
            let why = format!("somebody has given it {len} bytes meanwhile: is it another program's too?");
            return Err(io::Error::other(why));
        }
        self.file.set_len(capacity)?;
        self.store.0.resize(None).map(drop)
    }

    /// Makes bytes zero, and frees them where it can; `zeroes` is memory for where it cannot.
    pub(in crate::backend) fn zero(&self, offset: u64, len: u64, zeroes: &[u8]) -> io::Result<()> {
        if free(&self.file, offset, len) {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let piece = zeroes.get(..zeroes.len().min(usize::try_from(len - done).unwrap_or(usize::MAX)));
            let Some(piece) = piece.filter(|piece| !piece.is_empty()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            self.file.write_all_at(piece, offset + done)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Puts all of it on stable storage.
    pub(in crate::backend) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Drop for Rewriting<'_> {
    fn drop(&mut self) {
        self.store.0.lock.iter().for_each(super::FileLock::downgrade);
    }
}

/// Whether bytes of a file or block device could be made zero by being freed.
pub(in crate::backend) fn free(file: &File, offset: u64, len: u64) -> bool {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else { return false };
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    len > 0 && fallocate(file, how, offset, len).is_ok()
}
