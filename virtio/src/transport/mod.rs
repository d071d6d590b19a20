//! The PCI transport: a [`VirtioDevice`] as a PCI function (virtio 1.3, section 4.1).
//!
//! The function has the identity of a non-transitional device. BAR 0 has the MSI-X table and the
//! Pending Bit Array, BAR 2 the windows: common configuration, ISR status, device configuration and
//! notifications, each on a page of its own. The registers are here; the queues are not. What a write
//! asks of them is an [`Effect`], and whoever runs them reports back:
//!
//! - `Reset`: stop all queues, drain them, call [`VirtioPci::reset_done`]. Until then the device
//!   status keeps its value, which is how the driver knows.
//! - `StopQueue(q)`: stop and drain one, call [`VirtioPci::queue_stopped`].
//! - `Start`, `StartQueue(q)`: run the queues, or the queue, that [`VirtioPci::queue`] says are enabled.
//! - `Stop`: pause all queues, with their state. `Start` follows if the driver sets bus mastering again.

mod capabilities;
mod common_config;
mod fields;
mod notification;
mod queue_registers;
mod state;
mod windows;

use std::sync::Arc;

#[cfg(doc)]
use pci::Effect;
use pci::{ConfigSpace, Identity, Interrupt, Interrupts, Irq, Region};
use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_F_NOTIF_CONFIG_DATA, VIRTIO_F_RING_RESET, VIRTIO_F_SR_IOV, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::capabilities::{BAR, NOTIFY_OFF_MULTIPLIER, PAGE, PciCfg, Window};
use self::common_config::CommonConfig;
pub use self::queue_registers::{QueueRegistersState, QueueSetup};
pub use self::state::{ImportError, TransportState};
use crate::device::VirtioDevice;

const VENDOR_ID: u16 = 0x1af4;
/// The PCI device ID is this plus the virtio device ID (section 4.1.2).
const DEVICE_ID_BASE: u16 = 0x1040;
/// Non-transitional devices have revision 1 or higher.
const REVISION_ID: u8 = 1;
/// QEMU's, which Windows drivers match; at least 0x40 for a non-transitional device (section 4.1.2.1).
const SUBSYSTEM_ID: u16 = 0x1100;

/// The feature bits of rings and negotiation (section 2.2).
const TRANSPORT_FEATURES: u64 = (1 << 42) - (1 << 24);
/// VIRTIO_F_ADMIN_VQ.
const ADMIN_VQ: u32 = 41;
/// What this transport can't do.
const UNSUPPORTED: u64 = 1 << VIRTIO_F_NOTIF_CONFIG_DATA | 1 << VIRTIO_F_SR_IOV | 1 << ADMIN_VQ;

/// What the owner of a transport chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The feature bits of rings and transport, 24 to 41, that are offered besides VIRTIO_F_VERSION_1,
    /// which always is. Bits of features that the transport does not have are ignored.
    pub features: u64,
    /// The number of MSI-X vectors, 1 to 256. One a queue and one for the configuration is plenty.
    pub msix_vectors: u16,
}

impl Options {
    /// Indirect descriptors, event index and queue reset, and a vector for each queue and the
    /// configuration.
    pub fn for_device(device: &dyn VirtioDevice) -> Options {
        Options {
            features: 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_RING_RESET,
            msix_vectors: device.num_queues().saturating_add(1).min(Interrupts::MAX_VECTORS),
        }
    }
}

/// Why a device can't be a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BuildError {
    /// The number of queues.
    #[error("the device has {0} queues: the notification window has room for 1 to {max}", max = PAGE / NOTIFY_OFF_MULTIPLIER)]
    Queues(u16),
    /// The size of its queues.
    #[error("the device's queues have {0} descriptors: it must be a power of 2")]
    QueueSize(u16),
    /// The length of its configuration.
    #[error("the device configuration has {0} bytes: its window has {PAGE}")]
    ConfigLength(usize),
    /// The PCI configuration space.
    #[error("the configuration space can't be laid out")]
    ConfigSpace(#[from] pci::BuildError),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    pci_cfg: PciCfg,
    interrupts: Arc<Interrupts>,
    common: CommonConfig,
}

impl VirtioPci {
    /// A function for this device, out of reset.
    pub fn new(device: Box<dyn VirtioDevice>, options: &Options) -> Result<VirtioPci, BuildError> {
        let (queues, max_size) = (device.num_queues(), device.max_queue_size());
        if queues == 0 || usize::from(queues) > PAGE / NOTIFY_OFF_MULTIPLIER {
            return Err(BuildError::Queues(queues));
        }
        if !max_size.is_power_of_two() {
            return Err(BuildError::QueueSize(max_size));
        }
        if device.config_len() > PAGE {
            return Err(BuildError::ConfigLength(device.config_len()));
        }
        let identity = Identity {
            vendor_id: VENDOR_ID,
            device_id: DEVICE_ID_BASE.wrapping_add(device.device_id()),
            revision_id: REVISION_ID,
            class_code: device.class_code(),
            subsystem_vendor_id: VENDOR_ID,
            subsystem_id: SUBSYSTEM_ID,
        };
        let interrupts = Arc::new(Interrupts::new(options.msix_vectors));
        let mut builder = ConfigSpace::builder(&identity, interrupts.clone());
        let pci_cfg = capabilities::declare(&mut builder, device.config_len(), queues)?;
        let transport = options.features & TRANSPORT_FEATURES & !UNSUPPORTED | 1 << VIRTIO_F_VERSION_1;
        let offered = device.features() & !TRANSPORT_FEATURES | transport;
        let common = CommonConfig::new(offered, queues, max_size, &interrupts);
        Ok(VirtioPci { device, config: builder.build(), pci_cfg, interrupts, common })
    }

    /// The interrupts of the function, which the session configures.
    pub fn interrupts(&self) -> Arc<Interrupts> {
        self.interrupts.clone()
    }

    /// What signals the driver that a queue has used buffers: the vector that the driver chose
    /// last, or the ISR status and INTx. `None` if there is no such queue.
    pub fn queue_interrupt(&self, queue: u16) -> Option<Arc<dyn Interrupt>> {
        self.common.queue(queue).map(|queue| queue.source.clone() as Arc<dyn Interrupt>)
    }

    /// What signals the driver that the configuration changed.
    pub fn config_interrupt(&self) -> Arc<dyn Interrupt> {
        self.common.source().clone()
    }

    /// How many queues the device has.
    pub fn num_queues(&self) -> u16 {
        self.common.num_queues()
    }

    /// How the driver set up a queue; `None` if there is no such queue.
    pub fn queue(&self, queue: u16) -> Option<QueueSetup> {
        self.common.queue(queue).map(|queue| queue.setup())
    }

    /// Where the driver notifies a queue: the BAR and the offset in it. For a client that is given a
    /// file descriptor or a page in place of messages.
    pub fn notify_address(&self, queue: u16) -> Option<(Region, u64)> {
        self.common.queue(queue)?;
        let offset = Window::Notify.offset().saturating_add(usize::from(queue) * NOTIFY_OFF_MULTIPLIER);
        Some((BAR, offset as u64))
    }

    /// The features in force, 0 before FEATURES_OK.
    pub fn driver_features(&self) -> u64 {
        self.common.driver_features()
    }

    /// Whether the enabled queues may be started: DRIVER_OK is set, the function is bus master, and the
    /// device neither needs a reset nor is being reset.
    pub fn is_running(&self) -> bool {
        self.may_access_memory() && !self.common.needs_reset()
    }

    /// Whether queues that were started may go on.
    fn may_access_memory(&self) -> bool {
        self.common.driver_ok() && self.config.bus_master()
    }

    /// The reset that [`Effect::Reset`] asked for is done: all queues have stopped and nothing
    /// touches memory or signals any more. The device status reads 0 from now on. Without such a
    /// reset nothing happens.
    pub fn reset_done(&mut self) {
        if self.common.is_resetting() {
            self.common.reset();
            self.interrupts.forget();
            self.device.reset();
        }
    }

    /// The stop that [`Effect::StopQueue`] asked for is done. The driver may set the queue up again. Without
    /// such a stop nothing happens.
    pub fn queue_stopped(&mut self, queue: u16) {
        self.common.queue_stopped(queue);
    }

    /// The driver broke the rules, and the device can't go on (section 2.1.1). Sets
    /// DEVICE_NEEDS_RESET and interrupts the driver, once until the next reset.
    pub fn set_needs_reset(&mut self) {
        if self.common.set_needs_reset() {
            self.common.source().signal();
        }
    }

    /// The device configuration changed: counts the generation on and interrupts the driver.
    pub fn config_changed(&mut self) {
        self.common.next_generation();
        if self.common.driver_ok() {
            self.common.source().signal();
        }
    }

    /// The state of the transport. That of the device and its queues is not in it.
    pub fn export(&self) -> TransportState {
        self.common.export(self.config.export())
    }

    /// Takes over a state, whoever it comes from, and resets the device to the features in it. The
    /// queues are stopped, so that resets which had been asked for are done here; afterwards
    /// [`is_running`](Self::is_running) and [`queue`](Self::queue) say what to start.
    pub fn import(&mut self, state: &TransportState) -> Result<(), ImportError> {
        if state.version != TransportState::VERSION {
            return Err(ImportError::Version { got: state.version });
        }
        self.common.check_import(state, self.interrupts.count(Irq::Msix))?;
        self.config.import(&state.function).map_err(ImportError::Function)?;
        self.common.import(state);
        self.device.reset();
        if self.common.features_ok() {
            self.device.features_acked(self.common.driver_features());
        }
        self.reset_done();
        Ok(())
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
