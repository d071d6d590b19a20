//! The registers of one queue in the common configuration (virtio 1.3, section 4.1.4.3).

use std::sync::Arc;

use pci::Interrupts;
use serde::{Deserialize, Serialize};

use super::notification::{ISR_QUEUE, NO_VECTOR, Source};

/// How the driver set up a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// The number of descriptors: at most `max_queue_size`, a power of 2 if the ring is split.
    pub size: u16,
    /// The address of the descriptor area, unchecked.
    pub desc: u64,
    /// The address of the driver area (avail ring), unchecked.
    pub driver: u64,
    /// The address of the device area (used ring), unchecked.
    pub device: u64,
    /// The driver enabled the queue and did not ask for its reset: it is to be served while the
    /// device runs.
    pub enabled: bool,
}

/// The registers of one queue.
pub(super) struct QueueRegisters {
    max_size: u16,
    size: u16,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) enabled: bool,
    /// The driver wrote queue_reset, and the queue has not stopped yet.
    pub(super) resetting: bool,
    pub(super) source: Arc<Source>,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16, interrupts: &Arc<Interrupts>) -> QueueRegisters {
        QueueRegisters {
            max_size,
            size: max_size,
            desc: 0,
            driver: 0,
            device: 0,
            enabled: false,
            resetting: false,
            source: Source::new(interrupts, ISR_QUEUE),
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Takes over a size that a queue can have, keeps the old one otherwise.
    pub(super) fn set_size(&mut self, size: u16, packed: bool) {
        if is_size(size, self.max_size, packed) {
            self.size = size;
        }
    }

    pub(super) fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: self.size,
            desc: self.desc,
            driver: self.driver,
            device: self.device,
            enabled: self.is_served(),
        }
    }

    pub(super) fn is_served(&self) -> bool {
        self.enabled && !self.resetting
    }

    pub(super) fn reset(&mut self) {
        self.size = self.max_size;
        self.desc = 0;
        self.driver = 0;
        self.device = 0;
        self.enabled = false;
        self.resetting = false;
        self.source.set_vector(NO_VECTOR);
    }

    pub(super) fn export(&self) -> QueueRegistersState {
        QueueRegistersState {
            size: self.size,
            msix_vector: self.source.vector(),
            desc: self.desc,
            driver: self.driver,
            device: self.device,
            enabled: self.enabled,
            resetting: self.resetting,
        }
    }

    pub(super) fn check_import(&self, state: &QueueRegistersState, packed: bool) -> bool {
        is_size(state.size, self.max_size, packed) && (state.enabled || !state.resetting)
    }

    pub(super) fn import(&mut self, state: &QueueRegistersState) {
        self.size = state.size;
        self.source.set_vector(state.msix_vector);
        self.desc = state.desc;
        self.driver = state.driver;
        self.device = state.device;
        self.enabled = state.enabled;
        self.resetting = state.resetting;
    }
}

/// Whether a queue can have this size: a power of 2 for a split ring (section 2.7), anything for a
/// packed one (section 2.8.10.1).
fn is_size(size: u16, max_size: u16, packed: bool) -> bool {
    (1..=max_size).contains(&size) && (packed || size.is_power_of_two())
}

/// The registers of one queue, exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are the registers of the same names")]
pub struct QueueRegistersState {
    pub size: u16,
    pub msix_vector: u16,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
    pub enabled: bool,
    /// queue_reset reads 1.
    pub resetting: bool,
}
