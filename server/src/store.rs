//! Where a device's blocks live, as its description says.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use crate::backend::Store;
use crate::backend::file::{self, FileOptions, FileStore};
use crate::backend::memory::MemoryStore;
use crate::backend::null::NullStore;
use crate::backend::uring::{Uring, UringError, Waker};
use crate::config::{Cache, DeviceConfig, Size, StoreKind};

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file or block device.
    #[error(transparent)]
    File(#[from] file::OpenError),
    /// A file store without io_uring.
    #[error("{}: {source}", blk_file.display())]
    Uring {
        /// The file or block device.
        blk_file: PathBuf,
        /// What is missing, and how to have it.
        source: UringError,
    },
    /// A disk without a file.
    #[error("{}: cannot make a disk of {size}: {source}", socket_path.display())]
    Disk {
        /// The device's socket.
        socket_path: PathBuf,
        /// Its size.
        size: Size,
        /// What the system said.
        source: io::Error,
    },
    /// Descriptors.
    #[error("cannot have an eventfd: {0}")]
    Descriptor(#[source] io::Error),
}

/// Opens it.
///
/// # Errors
/// What cannot be had, and how to have it.
pub(crate) fn open(config: &DeviceConfig) -> Result<Arc<dyn Store>, StoreError> {
    let size = config.size_or_default();
    let disk = |source| StoreError::Disk { socket_path: config.socket_path.clone(), size: Size(size), source };
    Ok(match (config.store_kind(), &config.blk_file) {
        (StoreKind::Null, _) => Arc::new(NullStore::new(size).map_err(disk)?),
        (StoreKind::File, Some(path)) => {
            // Each worker makes a ring of its own; whether it can is to be known before a guest finds out.
            let no_ring = |source| StoreError::Uring { blk_file: path.clone(), source };
            try_ring(&Waker::new().map_err(StoreError::Descriptor)?).map_err(no_ring)?;
            Arc::new(FileStore::open(&FileOptions {
                path: path.clone(),
                read_only: config.read_only,
                cache: match config.cache() {
                    Cache::None => file::Cache::None,
                    Cache::Writeback => file::Cache::Writeback,
                    Cache::Writethrough => file::Cache::Writethrough,
                },
                size: config.size.map(|size| size.0),
                fixed_buffers: config.fixed_buffers,
                iopoll: config.iopoll,
            })?)
        }
        _ => Arc::new(MemoryStore::new(size).map_err(disk)?),
    })
}

/// Tries whether rings can be had, until it went well once: in the sandbox, where devices may be added later, nobody can try.
///
/// # Errors
/// What is missing.
pub(crate) fn try_ring(waker: &Waker) -> Result<(), UringError> {
    static WENT_WELL: OnceLock<()> = OnceLock::new();
    if WENT_WELL.get().is_none() {
        Uring::new(waker)?;
        let _already = WENT_WELL.set(());
    }
    Ok(())
}

/// What it is, in a few words.
pub fn describe(config: &DeviceConfig) -> String {
    match (config.store_kind(), &config.blk_file) {
        (StoreKind::Null, _) => "null".to_owned(),
        (StoreKind::File, Some(path)) => path.display().to_string(),
        _ => "memory".to_owned(),
    }
}
