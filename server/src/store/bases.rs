//! What overlays lie over: opened once, however many devices name it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{StoreError, check_ring};
use crate::backend::file::{Cache, FileOptions, FileStore};
use crate::backend::overlay::Base;
use crate::config::DeviceConfig;

/// A file, by whatever name, or a block device, by whatever node.
#[derive(PartialEq, Eq, Hash)]
enum Identity {
    File { device: u64, inode: u64 },
    BlockDevice(u64),
}

/// The bases of a server's devices.
#[derive(Default)]
pub(crate) struct Bases(HashMap<Identity, Base>);

impl Bases {
    /// The base of a device with an overlay, which is opened unless it is here.
    pub(super) fn open(&mut self, config: &DeviceConfig) -> Result<Base, StoreError> {
        let path = config.image().unwrap_or(Path::new(""));
        let known = identity(path);
        if let Some(base) = known.as_ref().and_then(|identity| self.0.get(identity)) {
            return Ok(base.clone());
        }
        check_ring(path)?;
        // Through the page cache: what one guest has read is there for all.
        let store = FileStore::open(&FileOptions {
            path: path.to_owned(),
            read_only: true,
            cache: Cache::Writeback,
            size: None,
            fixed_buffers: false,
            iopoll: false,
        })?;
        let base = Base::of_file(store, path).map_err(|source| StoreError::Base { base: path.to_owned(), source })?;
        self.0.extend(known.map(|identity| (identity, base.clone())));
        Ok(base)
    }
}

/// `None` if there is no such file, as who opens it will find.
fn identity(path: &Path) -> Option<Identity> {
    let metadata = fs::metadata(path).ok()?;
    Some(if metadata.file_type().is_block_device() {
        Identity::BlockDevice(metadata.rdev())
    } else {
        Identity::File { device: metadata.dev(), inode: metadata.ino() }
    })
}
