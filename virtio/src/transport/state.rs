//! The state of the transport in a form that outlives the process.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::queue_registers::QueueRegistersState;

/// Everything that the driver and the client told the transport, but for the client's interrupt
/// lines and masks. The fields without a comment are the registers of the same names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the fields are the registers of the same names")]
pub struct TransportState {
    /// The layout of this structure, [`TransportState::VERSION`].
    pub version: u32,
    /// The PCI function: configuration space and interrupts, the ISR status among them.
    pub function: pci::FunctionState,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    /// What driver_feature reads for driver_feature_select 0 to 3.
    pub driver_features: [u32; 4],
    pub config_msix_vector: u16,
    pub device_status: u8,
    /// The driver wrote 0 to device_status, and the reset was not done.
    pub resetting: bool,
    pub config_generation: u8,
    pub queue_select: u16,
    /// One for every queue.
    pub queues: Vec<QueueRegistersState>,
}

impl TransportState {
    /// The version that this crate writes, and the only one that it reads.
    pub const VERSION: u32 = 1;
}

/// Why a state was refused. It changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ImportError {
    /// The layout is of another version.
    #[error("the transport's state has version {got}, this program reads {}", TransportState::VERSION)]
    Version {
        /// The version found.
        got: u32,
    },
    /// The PCI function refused its part.
    #[error("the state of the PCI function can't be taken over")]
    Function(#[source] pci::ImportError),
    /// The driver works with features that this device does not offer, or without VIRTIO_F_VERSION_1.
    #[error("the driver accepted the features {got:#x}, the device offers {offered:#x} and needs VIRTIO_F_VERSION_1")]
    Features {
        /// What the driver accepted, the low 64 bits.
        got: u64,
        /// What the device offers.
        offered: u64,
    },
    /// A device status that no sequence of writes leads to.
    #[error("no driver can have left the device status {status:#x}")]
    Status {
        /// The device status.
        status: u8,
    },
    /// The device has another number of queues.
    #[error("the state has {got} queues, the device {expected}")]
    Queues {
        /// The number found.
        got: usize,
        /// The device's own.
        expected: usize,
    },
    /// A queue has a size that it can't have, or is enabled or being reset when it can't be.
    #[error("no driver can have set up queue {queue} as the state has it")]
    Queue {
        /// The queue.
        queue: usize,
    },
    /// A vector that the function does not have.
    #[error("the function has no MSI-X vector {vector}")]
    Vector {
        /// The vector.
        vector: u16,
    },
}
