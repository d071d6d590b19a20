//! The common configuration: feature negotiation, the device status, and the setup of the queues
//! (virtio 1.3, sections 2.1, 2.2, 3.1.1 and 4.1.4.3).
//!
//! A driver accesses a register in its natural width (section 4.1.3.1). Any other access works too:
//! what it leaves out of a register keeps the value that the register reads. A write that touches several
//! registers is applied in ascending order up to and including the first that has an effect.

use std::sync::Arc;

use pci::{Effect, Interrupts};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
};

use super::fields::{Field, overlap, touched};
use super::notification::{ISR_CONFIG, NO_VECTOR, Source};
use super::queue_registers::QueueRegisters;
use super::state::{ImportError, TransportState};

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// The bits that a driver sets. NEEDS_RESET is the device's.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

pub(super) struct CommonConfig {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    /// 128 bits, so that a driver that accepts what nobody offered is found out.
    driver_features: [u32; 4],
    status: u8,
    /// The driver asked for a reset, which is not done yet. Until then no register changes.
    resetting: bool,
    config_generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    source: Arc<Source>,
}

impl CommonConfig {
    pub(super) fn new(offered: u64, num_queues: u16, max_size: u16, interrupts: &Arc<Interrupts>) -> CommonConfig {
        CommonConfig {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: [0; 4],
            status: 0,
            resetting: false,
            config_generation: 0,
            queue_select: 0,
            queues: (0..num_queues).map(|_| QueueRegisters::new(max_size, interrupts)).collect(),
            source: Source::new(interrupts, ISR_CONFIG),
        }
    }

    pub(super) fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    pub(super) fn queue(&self, queue: u16) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(queue))
    }

    pub(super) fn source(&self) -> &Arc<Source> {
        &self.source
    }

    pub(super) fn features_ok(&self) -> bool {
        self.status & FEATURES_OK != 0
    }

    /// DRIVER_OK is set, and no reset asked for.
    pub(super) fn driver_ok(&self) -> bool {
        self.status & DRIVER_OK != 0 && !self.resetting
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.status & NEEDS_RESET != 0
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// The features in force: those that the driver accepted, once FEATURES_OK is set.
    pub(super) fn driver_features(&self) -> u64 {
        if self.features_ok() { self.accepted() } else { 0 }
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (field, bytes) in touched(offset, data.len()) {
            let value = self.get(field).to_le_bytes();
            overlap(value, &bytes, data.iter_mut(), offset).for_each(|(from, to)| *to = from);
        }
    }

    /// Effects are those of a function that is bus master; the caller knows whether it is.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        for (field, bytes) in touched(offset, data.len()) {
            let mut value = self.get(field).to_le_bytes();
            overlap(&mut value, &bytes, data, offset).for_each(|(to, from)| *to = *from);
            match self.set(field, u64::from_le_bytes(value)) {
                Effect::None => {}
                effect => return effect,
            }
        }
        Effect::None
    }

    /// The queue's stop, which its reset waited for (section 2.6.1).
    pub(super) fn queue_stopped(&mut self, queue: u16) {
        if let Some(queue) = self.queues.get_mut(usize::from(queue)).filter(|queue| queue.resetting) {
            queue.reset();
        }
    }

    /// Sets DEVICE_NEEDS_RESET; true if it was not set before.
    pub(super) fn set_needs_reset(&mut self) -> bool {
        let first = self.driver_ok() && !self.needs_reset();
        if first {
            self.status |= NEEDS_RESET;
        }
        first
    }

    /// The device configuration changed: the driver must not take one half of a field from before and
    /// one from after (section 4.1.4.3.1).
    pub(super) fn next_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// Returns every register to its reset value, but for the generation, which only counts on.
    pub(super) fn reset(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = [0; 4];
        self.status = 0;
        self.resetting = false;
        self.queue_select = 0;
        self.source.set_vector(NO_VECTOR);
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    fn get(&self, field: Field) -> u64 {
        let queue = self.queue(self.queue_select);
        let of_queue = |value: fn(&QueueRegisters) -> u64| queue.map_or(0, value);
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select.into(),
            Field::DeviceFeature => match self.device_feature_select {
                0 => self.offered & u64::from(u32::MAX),
                1 => self.offered >> 32,
                _ => 0,
            },
            Field::DriverFeatureSelect => self.driver_feature_select.into(),
            Field::DriverFeature => {
                let word = usize::try_from(self.driver_feature_select).ok();
                word.and_then(|word| self.driver_features.get(word)).copied().unwrap_or(0).into()
            }
            Field::ConfigMsixVector => self.source.vector().into(),
            Field::NumQueues => self.num_queues().into(),
            Field::DeviceStatus => self.status.into(),
            Field::ConfigGeneration => self.config_generation.into(),
            Field::QueueSelect => self.queue_select.into(),
            Field::QueueSize => of_queue(|queue| queue.size().into()),
            Field::QueueMsixVector => queue.map_or(NO_VECTOR, |queue| queue.source.vector()).into(),
            Field::QueueEnable => of_queue(|queue| queue.enabled.into()),
            Field::QueueNotifyOff => queue.map_or(0, |_| self.queue_select.into()),
            Field::QueueDesc => of_queue(|queue| queue.desc),
            Field::QueueDriver => of_queue(|queue| queue.driver),
            Field::QueueDevice => of_queue(|queue| queue.device),
            Field::QueueReset => of_queue(|queue| queue.resetting.into()),
            // VIRTIO_F_NOTIF_CONFIG_DATA and VIRTIO_F_ADMIN_VQ are never offered.
            Field::QueueNotifConfigData | Field::AdminQueueIndex | Field::AdminQueueNum => 0,
        }
    }

    /// `value` has no more bits than the field.
    fn set(&mut self, field: Field, value: u64) -> Effect {
        if self.resetting {
            return Effect::None;
        }
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Field::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Field::DriverFeature if !self.features_ok() => {
                let word = usize::try_from(self.driver_feature_select).ok();
                if let Some(word) = word.and_then(|word| self.driver_features.get_mut(word)) {
                    *word = value as u32;
                }
            }
            Field::ConfigMsixVector => self.source.set_vector(value as u16),
            Field::DeviceStatus => return self.set_status(value as u8),
            Field::QueueSelect => self.queue_select = value as u16,
            _ => return self.set_of_queue(field, value),
        }
        Effect::None
    }

    fn set_of_queue(&mut self, field: Field, value: u64) -> Effect {
        let (features_ok, driver_ok) = (self.features_ok(), self.driver_ok());
        let packed = self.negotiated(VIRTIO_F_RING_PACKED);
        let ring_reset = self.negotiated(VIRTIO_F_RING_RESET);
        let number = self.queue_select;
        let Some(queue) = self.queues.get_mut(usize::from(number)) else { return Effect::None };
        match (field, queue.enabled) {
            (Field::QueueMsixVector, _) => queue.source.set_vector(value as u16),
            (Field::QueueSize, false) => queue.set_size(value as u16, packed),
            (Field::QueueDesc, false) => queue.desc = value,
            (Field::QueueDriver, false) => queue.driver = value,
            (Field::QueueDevice, false) => queue.device = value,
            // Before FEATURES_OK nobody knows what the ring looks like.
            (Field::QueueEnable, false) if value == 1 && features_ok => {
                queue.enabled = true;
                if driver_ok {
                    return Effect::StartQueue(number);
                }
            }
            (Field::QueueReset, true) if value == 1 && ring_reset && !queue.resetting => {
                if driver_ok {
                    queue.resetting = true;
                    return Effect::StopQueue(number);
                }
                // It never ran.
                queue.reset();
            }
            _ => {}
        }
        Effect::None
    }

    /// Bits are only ever added; writing 0 asks for a reset. FEATURES_OK stays clear if the driver's
    /// features are not acceptable, and DRIVER_OK without FEATURES_OK: such a driver is a legacy one,
    /// which this transport does not serve.
    fn set_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            if self.status == 0 {
                // No driver was there since the last reset: nothing runs that had to stop.
                self.reset();
                return Effect::None;
            }
            self.resetting = true;
            return Effect::Reset;
        }
        let mut added = value & DRIVER_BITS & !self.status;
        if !self.is_acceptable(self.driver_features) {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 { Effect::Start } else { Effect::None }
    }

    fn accepted(&self) -> u64 {
        accepted(self.driver_features)
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.driver_features() & (1 << feature) != 0
    }

    /// Whether the device works with these features: all of them offered, and VIRTIO_F_VERSION_1
    /// among them (section 6.2).
    fn is_acceptable(&self, features: [u32; 4]) -> bool {
        let accepted = accepted(features);
        features[2..] == [0, 0] && accepted & !self.offered == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    pub(super) fn export(&self, function: pci::FunctionState) -> TransportState {
        TransportState {
            version: TransportState::VERSION,
            function,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            config_msix_vector: self.source.vector(),
            device_status: self.status,
            resetting: self.resetting,
            config_generation: self.config_generation,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(QueueRegisters::export).collect(),
        }
    }

    pub(super) fn check_import(&self, state: &TransportState, vectors: u32) -> Result<(), ImportError> {
        let status = state.device_status;
        let has = |bit| status & bit != 0;
        let features = if has(FEATURES_OK) { accepted(state.driver_features) } else { 0 };
        if has(FEATURES_OK) && !self.is_acceptable(state.driver_features) {
            return Err(ImportError::Features { got: accepted(state.driver_features), offered: self.offered });
        }
        if status & !(DRIVER_BITS | NEEDS_RESET) != 0
            || has(DRIVER_OK) && !has(FEATURES_OK)
            || has(NEEDS_RESET) && !has(DRIVER_OK)
            || state.resetting && status == 0
        {
            return Err(ImportError::Status { status });
        }
        if state.queues.len() != self.queues.len() {
            return Err(ImportError::Queues { got: state.queues.len(), expected: self.queues.len() });
        }
        let vector_exists = |vector: u16| vector == NO_VECTOR || u32::from(vector) < vectors;
        if !vector_exists(state.config_msix_vector) {
            return Err(ImportError::Vector { vector: state.config_msix_vector });
        }
        let packed = features & (1 << VIRTIO_F_RING_PACKED) != 0;
        let may_reset = features & (1 << VIRTIO_F_RING_RESET) != 0 && has(DRIVER_OK);
        for (number, (queue, registers)) in state.queues.iter().zip(&self.queues).enumerate() {
            if !registers.check_import(queue, packed)
                || queue.enabled && !has(FEATURES_OK)
                || queue.resetting && !may_reset
            {
                return Err(ImportError::Queue { queue: number });
            }
            if !vector_exists(queue.msix_vector) {
                return Err(ImportError::Vector { vector: queue.msix_vector });
            }
        }
        Ok(())
    }

    /// Takes over a state that `check_import` accepted. No queue runs, so that a queue's reset that
    /// was asked for is done.
    pub(super) fn import(&mut self, state: &TransportState) {
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.driver_features = state.driver_features;
        self.source.set_vector(state.config_msix_vector);
        self.status = state.device_status;
        self.resetting = state.resetting;
        self.config_generation = state.config_generation;
        self.queue_select = state.queue_select;
        for (queue, state) in self.queues.iter_mut().zip(&state.queues) {
            queue.import(state);
            if queue.resetting {
                queue.reset();
            }
        }
    }
}

fn accepted(features: [u32; 4]) -> u64 {
    u64::from(features[0]) | u64::from(features[1]) << 32
}
