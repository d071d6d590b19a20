//! What stands before a device's store for good, as its description says.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::StoreError;
use crate::backend::Store;
use crate::backend::faults::{Faults, FaultyStore};
use crate::backend::file::DeviceSize;
use crate::backend::hold::{Held, HoldStore, OnError};
use crate::backend::overlay::OverlayStore;
use crate::backend::power_cut::PowerCutStore;
use crate::config::{self, DeviceConfig};
use crate::sandbox::Entrance;

/// What operators do to a device's layers while it is served.
#[derive(Clone, Default)]
pub(crate) struct BuiltIn {
    /// The overlay that the device's blocks are in; `None` if they are in no overlay. The device owns it.
    pub(crate) overlay: Option<Weak<OverlayStore>>,
    /// What has failed and waits; `None` if failures are reported.
    pub(crate) held: Option<Arc<Held>>,
    /// The cache that loses its power; `None` if there is none. The device owns it.
    pub(crate) power: Option<Weak<PowerCutStore>>,
    /// The size of the block device that the blocks are in; `None` if they are in none.
    pub(crate) device_size: Option<DeviceSize>,
}

/// Puts a device's layers before its store: from the guest to the store, first what becomes of errors, then what goes wrong on
/// purpose, so that these errors are met too, and last the cache that a power cut empties.
pub(super) fn with_layers(
    store: Arc<dyn Store>,
    overlay: Option<Weak<OverlayStore>>,
    config: &DeviceConfig,
    faults: &Arc<Faults>,
    entrance: &Entrance,
) -> Result<(Arc<dyn Store>, BuiltIn), StoreError> {
    let mut built_in = BuiltIn { overlay, ..BuiltIn::default() };
    let mut store = store;
    if config.power_cut {
        let socket_path = || config.socket_path.clone();
        let cache = PowerCutStore::new(store, config.power_cut_cache(), entrance)
            .map_err(|source| StoreError::PowerCut { socket_path: socket_path(), source })?;
        let cache = Arc::new(cache);
        built_in.power = Some(Arc::downgrade(&cache));
        store = cache;
    }
    store = Arc::new(FaultyStore::new(store, Arc::clone(faults)));
    let on_error = match config.on_error() {
        config::OnError::Report => return Ok((store, built_in)),
        config::OnError::Hold => OnError::Hold,
        config::OnError::Retry => OnError::Retry(Duration::from_secs(config.retry_deadline().into())),
    };
    let holding = HoldStore::new(store, on_error, &name(config));
    built_in.held = Some(holding.held());
    Ok((Arc::new(holding), built_in))
}

/// By which an operator finds the device.
fn name(config: &DeviceConfig) -> String {
    let socket_path = || std::path::absolute(&config.socket_path).unwrap_or_else(|_| config.socket_path.clone());
    config.name.clone().unwrap_or_else(|| socket_path().display().to_string())
}
