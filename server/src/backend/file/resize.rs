//! Another size for an image file, or the news of a block device's.

use std::io::{self, Seek, SeekFrom};
use std::sync::atomic::Ordering;

use super::Opened;

impl Opened {
    /// Takes over the size that the file has by now, or gives it another. A block device is as large as it is.
    ///
    /// # Errors
    /// If it cannot have that size.
    pub(super) fn resize(&self, wanted: Option<u64>) -> io::Result<u64> {
        let refused = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let block = u64::from(self.info.block_size);
        // Its end, for files and for devices; nobody uses its position.
        let found = (&self.file).seek(SeekFrom::End(0))?;
        let capacity = match wanted {
            Some(wanted) => wanted,
            None if found < self.capacity() => {
                return Err(refused(format!("the file has become shorter, {found} bytes; say so with a size")));
            }
            None => found,
        };
        if capacity == 0 || !capacity.is_multiple_of(block) {
            return Err(refused(format!(
                "{capacity} bytes: it must be a multiple of its block, {block}, and not zero"
            )));
        }
        if capacity != found {
            if self.info.read_only {
                return Err(refused(format!("it is read-only, and has {found} bytes")));
            }
            if !self.file.metadata()?.is_file() {
                return Err(refused(format!("a block device has the size that it has, {found} bytes")));
            }
            self.file.set_len(capacity)?;
        }
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }

    /// Bytes that it has now.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }
}
