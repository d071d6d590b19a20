//! What lies between a device's queues and its store, and can be exchanged while the device is served.
//!
//! A request passes, from the guest to the blocks: the limits, the fabric, and then the store as it was opened, with its faults
//! before it. So limits count what the guest asks for, and what has to wait for them is not on the wire; what goes wrong
//! goes wrong at the other end of the fabric. A layer that nobody asks for is not there, and costs nothing.

use std::sync::Arc;

use crate::backend::Store;
use crate::backend::fabric::{DistantStore, Fabric};
use crate::backend::limits::{LimitedStore, Limits};
use crate::config::{FabricChoice, RateLimits};

/// What an operator said, and what that means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said<S, M> {
    pub(crate) said: S,
    pub(crate) means: M,
}

/// How fast a device may be used.
pub(crate) type SaidLimits = Said<RateLimits, Limits>;
/// How far away its store is.
pub(crate) type SaidFabric = Said<FabricChoice, Fabric>;

/// A store, and what lies before it.
pub(crate) struct Layers {
    store: Arc<dyn Store>,
    limits: Option<Limits>,
    fabric: Option<Fabric>,
    /// All of it, which queues are attached to.
    outermost: Arc<dyn Store>,
}

impl Layers {
    /// Before a store that nobody uses yet.
    pub(crate) fn new(store: Arc<dyn Store>, limits: Option<Limits>, fabric: Option<Fabric>) -> Self {
        let outermost = compose(&store, limits.as_ref(), fabric, LimitedStore::new);
        Self { store, limits, fabric, outermost }
    }

    /// What queues are attached to from now on.
    pub(crate) fn outermost(&self) -> &Arc<dyn Store> {
        &self.outermost
    }

    /// Exchanges the limits, for queues that are attached from now on.
    pub(crate) fn set_limits(&mut self, limits: Option<Limits>) {
        self.limits = limits;
        self.outermost = compose(&self.store, self.limits.as_ref(), self.fabric, LimitedStore::in_use);
    }

    /// Exchanges the fabric, for queues that are attached from now on.
    pub(crate) fn set_fabric(&mut self, fabric: Option<Fabric>) {
        self.fabric = fabric;
        self.outermost = compose(&self.store, self.limits.as_ref(), self.fabric, LimitedStore::in_use);
    }
}

fn compose(
    store: &Arc<dyn Store>,
    limits: Option<&Limits>,
    fabric: Option<Fabric>,
    limited: fn(Arc<dyn Store>, &Limits) -> LimitedStore,
) -> Arc<dyn Store> {
    let mut outermost = Arc::clone(store);
    if let Some(fabric) = fabric {
        outermost = Arc::new(DistantStore::new(outermost, fabric));
    }
    if let Some(limits) = limits {
        outermost = Arc::new(limited(outermost, limits));
    }
    outermost
}
