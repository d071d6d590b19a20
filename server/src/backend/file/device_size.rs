//! How large a block device is, which others may change while it is served.

use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Weak};

use super::geometry::device_capacity;
use super::{FileStore, Opened};

/// The size of a block device. The store may be gone: this keeps nothing open.
#[derive(Clone, Debug)]
pub(crate) struct DeviceSize(Weak<Opened>);

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// What the kernel says.
    pub(crate) device: u64,
    /// What is served.
    pub(crate) store: u64,
}

impl FileStore {
    /// The size of its block device; `None` if it is a file.
    pub(crate) fn device_size(&self) -> Option<DeviceSize> {
        let metadata = self.0.file.metadata().ok()?;
        metadata.file_type().is_block_device().then(|| DeviceSize(Arc::downgrade(&self.0)))
    }
}

impl DeviceSize {
    /// Asks the kernel, which has the number in memory; `None` if the store is gone.
    pub(crate) fn look(&self) -> Option<Sizes> {
        let opened = self.0.upgrade()?;
        let store = opened.capacity();
        // A device that is gone says so to requests.
        Some(Sizes { device: device_capacity(&opened.file).unwrap_or(store), store })
    }
}
