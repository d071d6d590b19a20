//! What overlays lie over: opened once, however many devices name it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use super::{StoreError, check_ring, image_options, open_nbd};
use crate::backend::file::{Cache, FileOptions, FileStore};
use crate::backend::image::{ImageOptions, ImageStore};
use crate::backend::overlay::Base;
use crate::config::{DeviceConfig, StoreKind};
use crate::sandbox::Entrance;

/// What a base is, whatever it is called.
#[derive(PartialEq, Eq, Hash)]
enum Identity {
    /// A file, as plain blocks or as an image.
    File {
        device: u64,
        inode: u64,
        plain: bool,
    },
    BlockDevice(u64),
    /// An export, by its URI.
    Export(String),
}

/// The bases of a server's devices.
#[derive(Default)]
pub(crate) struct Bases(HashMap<Identity, Base>);

impl Bases {
    /// The base of a device with an overlay, which is opened unless it is here.
    pub(super) fn open(&mut self, config: &DeviceConfig, entrance: &Entrance) -> Result<Base, StoreError> {
        let known = identity(config);
        if let Some(base) = known.as_ref().and_then(|identity| self.0.get(identity)) {
            return Ok(base.clone());
        }
        let base = open(config, entrance)?;
        self.0.extend(known.map(|identity| (identity, base.clone())));
        Ok(base)
    }
}

/// To be read, through the page cache: what one guest has read is there for all.
fn open(config: &DeviceConfig, entrance: &Entrance) -> Result<Base, StoreError> {
    let path = config.image().unwrap_or(Path::new(""));
    let unread = |source| StoreError::Base { base: path.to_owned(), source };
    let (read_only, cache, size) = (true, Cache::Writeback, None);
    match config.store_kind() {
        StoreKind::Nbd => {
            let uri = config.nbd_uri.as_ref().map(ToString::to_string).unwrap_or_default();
            Ok(Base::named(Arc::new(open_nbd(config, read_only)?), &uri))
        }
        kind @ (StoreKind::Qcow2 | StoreKind::Vmdk) => {
            let options = ImageOptions { read_only, cache, size, ..image_options(kind, path, config) };
            Base::of_image(Arc::new(ImageStore::open(&options, entrance)?), path).map_err(unread)
        }
        StoreKind::File | StoreKind::Memory | StoreKind::Null => {
            check_ring(path)?;
            let path = path.to_owned();
            let options = FileOptions { path, read_only, cache, size, fixed_buffers: false, iopoll: false };
            let store = FileStore::open(&options)?;
            Base::of_file(store, &options.path).map_err(unread)
        }
    }
}

/// `None` if there is no such file, as who opens it will find.
fn identity(config: &DeviceConfig) -> Option<Identity> {
    if config.store_kind() == StoreKind::Nbd {
        return config.nbd_uri.as_ref().map(|uri| Identity::Export(uri.to_string()));
    }
    let metadata = fs::metadata(config.image()?).ok()?;
    Some(if metadata.file_type().is_block_device() {
        Identity::BlockDevice(metadata.rdev())
    } else {
        let plain = config.store_kind() == StoreKind::File;
        Identity::File { device: metadata.dev(), inode: metadata.ino(), plain }
    })
}
