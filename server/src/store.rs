//! Where a device's blocks live, as its description says.
//!
//! On its way from the guest an operation meets, in this order: what holds back errors (`on_error`), what goes wrong on purpose
//! (`fault`), the cache that a power cut empties (`power_cut`), and the store.

mod bases;
mod built_in;
mod layers;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::backend::Store;
use crate::backend::faults::Faults;
use crate::backend::file::{self, FileOptions, FileStore};
use crate::backend::image::{Format, ImageError, ImageOptions, ImageStore};
use crate::backend::memory::MemoryStore;
use crate::backend::nbd::{NbdError, NbdOptions, NbdStore};
use crate::backend::null::NullStore;
use crate::backend::overlay::{OverlayError, OverlayOptions, OverlayStore, Place};
use crate::backend::uring::{Uring, UringError, Waker};
use crate::config::{Cache, DeviceConfig, InvalidDevice, OverlayKind, Size, StoreKind};
use crate::sandbox::Entrance;

pub(crate) use bases::Bases;
pub(crate) use built_in::BuiltIn;
pub(crate) use layers::{Layers, Said, SaidFabric, SaidLimits};

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file or block device.
    #[error(transparent)]
    File(#[from] file::OpenError),
    /// The image, or a file that it is made of.
    #[error(transparent)]
    Image(#[from] ImageError),
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
    /// An overlay.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The image under one.
    #[error("{}: cannot look at what it holds: {source}", base.display())]
    Base {
        /// The image.
        base: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Descriptors.
    #[error("cannot have an eventfd: {0}")]
    Descriptor(#[source] io::Error),
    /// The export of an NBD server.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// An NBD store without an export.
    #[error(transparent)]
    NoUri(#[from] InvalidDevice),
    /// A cache to be cut off.
    #[error("{}: power_cut: cannot have a cache: {source}", socket_path.display())]
    PowerCut {
        /// The device's socket.
        socket_path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An NBD store without io_uring.
    #[error("{uri}: {source}")]
    NbdUring {
        /// The export.
        uri: String,
        /// What is missing, and how to have it.
        source: UringError,
    },
    /// Limits, a fabric, pauses between attempts or late faults without io_uring, whose timers they wait for.
    #[error("{}: limits, fabric, on_error = \"retry\" and faults with a latency: {source}", socket_path.display())]
    LayersUring {
        /// The device's socket.
        socket_path: PathBuf,
        /// What is missing, and how to have it.
        source: UringError,
    },
}

/// Opens it, with what stands before it; what overlays lie over is among `bases`, or joins them. Threads that it starts do nothing
/// before `entrance` is open.
///
/// # Errors
/// What cannot be had, and how to have it.
pub(crate) fn open(
    config: &DeviceConfig,
    entrance: &Entrance,
    bases: &mut Bases,
    faults: &Arc<Faults>,
) -> Result<(Arc<dyn Store>, BuiltIn), StoreError> {
    let Some(kind) = config.overlay() else {
        let (store, device_size): (Arc<dyn Store>, _) = match (config.store_kind(), &config.blk_file) {
            (StoreKind::File, Some(path)) => {
                let store = open_file(path, config)?;
                let device_size = store.device_size();
                (Arc::new(store), device_size)
            }
            _ => (open_plain(config, entrance)?, None),
        };
        let (store, built_in) = built_in::with_layers(store, None, config, faults, entrance)?;
        return Ok((store, BuiltIn { device_size, ..built_in }));
    };
    let overlay = Arc::new(open_overlay(kind, config, entrance, bases)?);
    let weak = Arc::downgrade(&overlay);
    built_in::with_layers(overlay, Some(weak), config, faults, entrance)
}

fn open_overlay(
    kind: OverlayKind,
    config: &DeviceConfig,
    entrance: &Entrance,
    bases: &mut Bases,
) -> Result<OverlayStore, StoreError> {
    let base = bases.open(config, entrance)?;
    let (path, cache) = (config.overlay_file.clone().unwrap_or_default(), file_cache(config));
    let place = match kind {
        OverlayKind::Memory => Place::Memory,
        OverlayKind::Temporary => Place::Temporary { folder: path, cache },
        OverlayKind::Kept => Place::Kept { path, cache },
    };
    let (size, limit) = (config.size.map(|size| size.0), config.overlay_limit.map(|limit| limit.0));
    Ok(OverlayStore::open(&base, &OverlayOptions { place, size, limit })?)
}

fn open_file(path: &Path, config: &DeviceConfig) -> Result<FileStore, StoreError> {
    check_ring(path)?;
    Ok(FileStore::open(&FileOptions {
        path: path.to_owned(),
        read_only: config.read_only,
        cache: file_cache(config),
        size: config.size.map(|size| size.0),
        fixed_buffers: config.fixed_buffers,
        iopoll: config.iopoll,
    })?)
}

/// A store that is no plain file.
fn open_plain(config: &DeviceConfig, entrance: &Entrance) -> Result<Arc<dyn Store>, StoreError> {
    let size = config.size_or_default();
    let disk = |source| StoreError::Disk { socket_path: config.socket_path.clone(), size: Size(size), source };
    Ok(match (config.store_kind(), &config.blk_file) {
        (StoreKind::Null, _) => Arc::new(NullStore::new(size).map_err(disk)?),
        (StoreKind::Nbd, _) => Arc::new(open_nbd(config, config.read_only)?),
        (kind @ (StoreKind::Qcow2 | StoreKind::Vmdk), Some(path)) => {
            Arc::new(ImageStore::open(&image_options(kind, path, config), entrance)?)
        }
        _ => Arc::new(MemoryStore::new(size).map_err(disk)?),
    })
}

fn image_options(kind: StoreKind, path: &Path, config: &DeviceConfig) -> ImageOptions {
    ImageOptions {
        path: path.to_owned(),
        format: if kind == StoreKind::Vmdk { Format::Vmdk } else { Format::Qcow2 },
        read_only: config.read_only,
        cache: file_cache(config),
        size: config.size.map(|size| size.0),
    }
}

fn open_nbd(config: &DeviceConfig, read_only: bool) -> Result<NbdStore, StoreError> {
    let uri = config.nbd_uri.as_ref().ok_or(InvalidDevice::NoNbdUri)?;
    let no_ring = |source| StoreError::NbdUring { uri: uri.to_string(), source };
    try_ring(&Waker::new().map_err(StoreError::Descriptor)?).map_err(no_ring)?;
    Ok(NbdStore::open(NbdOptions {
        uri: uri.clone(),
        read_only,
        connections: config.nbd_connections(),
        deadline: Duration::from_secs(config.nbd_deadline().into()),
        credentials: config.nbd_credentials().map_err(InvalidDevice::from)?,
    })?)
}

/// Each worker makes a ring of its own; whether it can is to be known before a guest finds out.
fn check_ring(path: &Path) -> Result<(), StoreError> {
    let no_ring = |source| StoreError::Uring { blk_file: path.to_owned(), source };
    try_ring(&Waker::new().map_err(StoreError::Descriptor)?).map_err(no_ring)
}

/// Whether a ring could be had.
static WENT_WELL: OnceLock<()> = OnceLock::new();

/// Whether rings can be had, as far as was tried.
pub(crate) fn has_rings() -> bool {
    WENT_WELL.get().is_some()
}

/// Tries whether the layers before a store can have what they need.
///
/// # Errors
/// What is missing.
pub(crate) fn try_layers(config: &DeviceConfig) -> Result<(), StoreError> {
    let no_ring = |source| StoreError::LayersUring { socket_path: config.socket_path.clone(), source };
    try_ring(&Waker::new().map_err(StoreError::Descriptor)?).map_err(no_ring)
}

/// Tries whether rings can be had, until it went well once: in the sandbox, where devices may be added later, nobody can try.
///
/// # Errors
/// What is missing.
pub(crate) fn try_ring(waker: &Waker) -> Result<(), UringError> {
    if WENT_WELL.get().is_none() {
        Uring::new(waker)?;
        let _already = WENT_WELL.set(());
    }
    Ok(())
}

fn file_cache(config: &DeviceConfig) -> file::Cache {
    match config.cache() {
        Cache::None => file::Cache::None,
        Cache::Writeback => file::Cache::Writeback,
        Cache::Writethrough => file::Cache::Writethrough,
    }
}

/// What it is, in a few words.
pub fn describe(config: &DeviceConfig) -> String {
    if let Some(kind) = config.overlay() {
        let own = match (kind, &config.overlay_file) {
            (OverlayKind::Kept, Some(path)) => format!("overlay {}", path.display()),
            (OverlayKind::Temporary, _) => "temporary overlay".to_owned(),
            _ => "overlay in memory".to_owned(),
        };
        return format!("{own} of {}", describe_plain(config, config.image()));
    }
    describe_plain(config, config.blk_file.as_deref())
}

fn describe_plain(config: &DeviceConfig, file: Option<&Path>) -> String {
    match (config.store_kind(), file) {
        (StoreKind::Null, _) => "null".to_owned(),
        (StoreKind::File, Some(path)) => path.display().to_string(),
        (StoreKind::Nbd, _) => config.nbd_uri.as_ref().map(ToString::to_string).unwrap_or_default(),
        (StoreKind::Qcow2, Some(path)) => format!("{} (qcow2)", path.display()),
        (StoreKind::Vmdk, Some(path)) => format!("{} (vmdk)", path.display()),
        _ => "memory".to_owned(),
    }
}
